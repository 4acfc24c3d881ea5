"""An MLP in the size of MNIST, 1.9 million parameters: a few matrix products and Adam's memory traffic."""

from benchmarks.harness import Workload
from benchmarks.workloads._mlp import mlp


def workload(dtype: str = "float32") -> Workload:
    return mlp([784, 1024, 1024, 10], batch=128, dtype=dtype)
