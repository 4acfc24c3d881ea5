"""Bridges to plain JAX, safetensors and PyTorch."""
