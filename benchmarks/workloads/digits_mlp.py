"""A small MLP in the size of scikit-learn's digits: a step so short that dispatch decides."""

from benchmarks.harness import Workload
from benchmarks.workloads._mlp import mlp


def workload(dtype: str = "float32") -> Workload:
    return mlp([64, 128, 10], batch=128, dtype=dtype)
