"""The workloads: one module each, with a function `workload(dtype) -> harness.Workload`. A new one is a new file."""

from collections.abc import Callable
from importlib import import_module
from pkgutil import iter_modules

from benchmarks.harness import Workload


def names() -> list[str]:
    """Every workload, by the name of its module; modules that start with an underscore are shared code."""
    return sorted(module.name for module in iter_modules(__path__) if not module.name.startswith("_"))


def load(name: str) -> Callable[[str], Workload]:
    return import_module(f"{__name__}.{name}").workload


def describe(name: str) -> str:
    """The first line of a workload's docstring."""
    return (import_module(f"{__name__}.{name}").__doc__ or "").splitlines()[0]
