"""Strict dtypes and ranks for every test, and warnings are errors (pyproject.toml).

XLA compiles without much optimisation, for speed; `XLA_FLAGS= python -m pytest` tests what it makes otherwise. Python
looks for garbage seldom: programs are large and hardly ever garbage.
"""

import gc
import os
from importlib.metadata import version

# Compiling is most of what the tests do, and half of it the last flag saves; later versions end at it as unknown.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
    + " --xla_cpu_use_fusion_emitters=false" * version("jaxlib").startswith("0.10."),
)

import jax
import pytest

from funcnet.check.table import RARELY

gc.set_threshold(*RARELY)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")


@pytest.fixture
def standard_promotion():
    """JAX's own promotion rules, for code of others, such as optax, that relies on them."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture
def x64():
    """Double precision."""
    with jax.enable_x64(True):
        yield
