"""The table of cases at points that are drawn without compiling anything, for tests that walk all of it."""

from typing import Any

import jax
import numpy as np

from funcnet.check.cases import Case
from funcnet.check.spec import drawn, specs
from funcnet.check.subject import quickly
from funcnet.expect import is_floating
from funcnet.transform import cast

Tree = Any
KEY = jax.random.key(3)


def dtype_of(case: Case) -> str:
    """float32, or float64 where that is all the case has."""
    return "float32" if "float32" in case.dtypes else case.dtypes[0]


def inputs(case: Case, seed: int = 0) -> Tree:
    """Its input as NumPy arrays."""
    return cast(jax.tree.map(np.asarray, drawn(specs(case.x), seed)), dtype_of(case))


def start(case: Case, x: Tree) -> tuple[Tree, Tree]:
    """Params, drawn, and the state that init gives."""
    params, state = jax.eval_shape(case.layer.init, KEY, x)
    if jax.tree.leaves(state):
        state = jax.tree.map(np.asarray, quickly(lambda key, x: case.layer.init(key, x)[1])(KEY, x))
    return random(params, 1), state


def random(tree: Tree, seed: int) -> Tree:
    """Arrays of the tree's shapes and dtypes, drawn normally; None for integers, which have no cotangent."""
    rng = np.random.default_rng(seed)
    one = lambda leaf: rng.standard_normal(leaf.shape).astype(leaf.dtype) if is_floating(leaf) else None
    return jax.tree.map(one, tree)
