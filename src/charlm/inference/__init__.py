"""Use a trained model: scoring, sampling, dynamic evaluation."""
