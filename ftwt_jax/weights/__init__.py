"""Weights from and to PyTorch: files, names and arrays."""
