"""Models for other libraries and from other libraries: PyTorch, safetensors, ONNX and StableHLO."""
