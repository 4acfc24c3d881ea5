"""Points to ask single oracles at: a function or a layer, with its arguments, before any report is made."""

import jax
import numpy as np

from funcnet.check.algebra import structure
from funcnet.check.function import function
from funcnet.check.layer import layer_at
from funcnet.check.subject import Point


def ruled(f, fwd, bwd):
    """f with a rule of its own."""
    g = jax.custom_vjp(f)
    g.defvjp(fwd, bwd)
    return g


def point_of(f, *args, x64=False, seed=0, directions=2):
    """The point of a function, its structure already looked at, as every oracle finds it."""
    point = Point(function(f, args, None, x64, seed), seed, directions)
    structure(point)
    return point


def layer_point(layer, x, seed=0):
    """The same of a layer in float64, its parameters and state drawn by NumPy."""
    params, state = jax.eval_shape(layer.init, jax.random.key(0), x)
    rng = np.random.default_rng(1)
    params, state = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(leaf.dtype), (params, state))
    point = Point(layer_at(layer, x, params, state, np.dtype("float64"), seed), seed, 2)
    structure(point)
    return point
