"""Parameters to and from PyTorch."""
