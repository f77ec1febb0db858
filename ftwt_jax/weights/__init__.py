"""Weights to and from PyTorch: files, names and arrays."""
