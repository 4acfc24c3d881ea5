"""Whole training steps, funcnet beside its peers: `python -m benchmarks --help`."""
