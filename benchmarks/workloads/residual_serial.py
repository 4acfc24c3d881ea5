"""A residual MLP of 24 blocks, each with parameters of its own by name."""

from benchmarks.harness import Workload
from benchmarks.workloads._residual import residual


def workload(dtype: str = "float32") -> Workload:
    return residual(dtype, stacked=False)
