"""A run on this host and on disk: the training loop, checkpoints, metrics, results, reproduction."""
