"""Kernels in plain PyTorch, for all devices and dtypes."""
