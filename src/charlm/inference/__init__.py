"""What needs parameters and no training step: scoring, sampling, dynamic evaluation."""
