"""Every kernel in plain PyTorch, for all devices and dtypes."""
