"""The same residual MLP of 24 blocks as a scan over stacked parameters."""

from benchmarks.harness import Workload
from benchmarks.workloads._residual import residual


def workload(dtype: str = "float32") -> Workload:
    return residual(dtype, stacked=True)
