"""One training step as a pure function: the loss, its gradient, metrics and the optimizer."""
