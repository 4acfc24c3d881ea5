"""A layer as a subject of the checker: at a point that is given, drawn or initialised."""

import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from funcnet._internal.casting import cast
from funcnet._internal.errors import describe
from funcnet._internal.expect import is_floating
from funcnet.check.plain import trace
from funcnet.check.spec import drawn
from funcnet.check.subject import Subject, quickly
from funcnet.layer import Layer, unrounded

Tree = Any


def layer_at(layer: Layer, x: Tree, params: Tree, state: Tree, dtype: Any, seed: int) -> Subject:
    """The layer at a point: what is not given is drawn or initialised."""
    x64 = dtype == jnp.float64 or jax.config.read("jax_enable_x64")
    key, rng = jax.random.key(seed), np.random.default_rng([seed, 3])
    with jax.enable_x64(x64):
        x = cast(jax.tree.map(np.asarray, drawn(x, seed)), dtype)
        params, state = drawn(params, seed), drawn(state, seed)
        fresh, own_state = _initial(layer, key, x) if params is None or state is None else (None, None)
        params = jax.tree.map(lambda p: moved(p, rng), fresh) if params is None else params
        params = cast(jax.tree.map(_array, params), dtype, unrounded(layer))
        # a state keeps the dtype that the layer gave it: statistics may be wider than x
        state = own_state if state is None else cast(jax.tree.map(_array, state), dtype)
        plain = trace(lambda params, x: layer.fwd(params, state, x, key)[0], params, x)

    return Subject(layer.name, (params, x), ("params", "x"), pulling(layer, state, key), plain, x64, layer, state, key)


def _initial(layer: Layer, key: Any, x: Tree) -> tuple[Tree, Tree]:
    """What `init` gives for x. The parameters, which are moved at random anyway, are made for x in float32, where the
    layer takes that and they fit: so one compiled program serves every dtype.
    """
    params, state = jax.eval_shape(layer.init, key, x)
    if jax.tree.leaves(state):
        state = quickly(lambda key, x: layer.init(key, x)[1])(key, x)
    if not jax.tree.leaves(params):
        return params, state
    try:
        with jax.enable_x64(False), warnings.catch_warnings(), np.errstate(over="raise", under="raise"):
            warnings.simplefilter("error")
            found = quickly(layer.init)(key, cast(x, "float32"))[0]
            return jax.tree.map(_like, found, params), state
    except Exception:  # whatever prevents it in float32: then x itself is used
        return quickly(layer.init)(key, x)[0], state


def _like(leaf: Any, like: Any) -> np.ndarray:
    """The leaf in another floating dtype; refused where that is not all that differs."""
    if leaf.shape != like.shape or (leaf.dtype != like.dtype and not is_floating(leaf)):
        raise ValueError(f"{describe(leaf)} in float32, {describe(like)} otherwise")
    return np.asarray(leaf).astype(like.dtype)


def pulling(layer: Layer, state: Tree, key: Any) -> Callable[[tuple], tuple[Tree, Callable[[Tree], tuple]]]:
    """(params, x) -> (y, pullback), by the layer's own rule."""

    def pull(args):
        params, x = args
        y, _, residuals = layer.fwd(params, state, x, key)
        return y, lambda dy: layer.bwd(params, residuals, dy)

    return pull


def _array(leaf: Any) -> Any:
    return leaf if isinstance(leaf, jax.Array) else np.asarray(leaf)


def moved(leaf: Any, rng: np.random.Generator) -> Any:
    return np.asarray(leaf) + (0.3 * rng.standard_normal(leaf.shape)).astype(leaf.dtype) if is_floating(leaf) else leaf
