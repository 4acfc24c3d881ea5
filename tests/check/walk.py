"""The table of cases at points that are drawn without compiling anything, for tests that walk all of it."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from funcnet._internal.casting import cast
from funcnet._internal.expect import is_floating
from funcnet.check.cases import Case
from funcnet.check.spec import Spec, drawn, specs
from funcnet.check.subject import quickly

Tree = Any
KEY = jax.random.key(3)


def dtype_of(case: Case) -> str:
    """float32, or float64 where that is all the case has."""
    return "float32" if "float32" in case.dtypes else case.dtypes[0]


def widest(case: Case) -> str:
    """float64, where a difference is a mistake and no rounding, or else float32."""
    return "float64" if "float64" in case.dtypes else "float32"


def inputs(case: Case, seed: int = 0, batch: int | None = None, dtype: str | None = None) -> Tree:
    """Its input as NumPy arrays, where wanted with another first axis or in another dtype."""

    resized = lambda spec: spec if batch is None else replace(spec, sizes=(batch, *spec.sizes[1:]))
    given = jax.tree.map(resized, specs(case.x), is_leaf=lambda leaf: isinstance(leaf, Spec))
    return cast(jax.tree.map(np.asarray, drawn(given, seed)), dtype or dtype_of(case))


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


def passes(case: Case, params: Tree, state: Tree, x: Tree, key: Any) -> tuple[Tree, Tree]:
    """What the layer says of x: its evaluation, and y, with its gradients for a cotangent that depends on y alone."""
    evaluated = case.layer.apply(params, state, x)
    y, _, residuals = case.layer.fwd(params, state, x, key)
    dy = jax.tree.map(lambda leaf: jnp.cos(jnp.clip(leaf, -9, 9)) if is_floating(leaf) else None, y)
    return (evaluated, y), case.layer.bwd(params, residuals, dy)
