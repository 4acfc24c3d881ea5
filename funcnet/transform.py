"""Combinators that change how a layer runs, not what it computes: `remat` saves memory, `mixed` sets dtypes.

Both are transparent: name, params and parts are those of the layer they are given.
"""

from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from funcnet import expect
from funcnet.expect import InputError, describe, is_floating
from funcnet.factors import total
from funcnet.layer import Layer, a_layer, around
from funcnet.order import after

Tree = Any


class Rerun(NamedTuple):
    """Residuals of `remat`: what `fwd` was called with, beside the params."""

    state: Tree
    x: Tree
    key: Array | None


def remat(layer: Layer) -> Layer:
    """The same layer, which saves only its input and runs `fwd` again in `bwd`: less memory for one more forward pass.

    Names, params and results are the layer's own.
    """

    a_layer(layer)

    def fwd(params, state, x, key):
        y, new_state, _ = layer.fwd(params, state, x, key)
        return y, new_state, Rerun(state, x, key)

    def bwd(params, saved, dy, contract=total):
        return layer.bwd(params, rerun(layer, params, saved, dy), dy, contract)

    return around(layer, replace(layer, fwd=fwd, bwd=bwd), remat, "remat")


def rerun(layer: Layer, params: Tree, saved: Rerun, dy: Tree) -> Tree:
    """The residuals that `fwd` gave when `remat` dropped them, computed after dy: in the backward pass, not before."""
    return layer.fwd(params, saved.state, after(dy, saved.x), saved.key)[2]


class Mixed(NamedTuple):
    """Residuals of `mixed`: the layer's own, and for each of its outputs an empty array of the dtype it returned."""

    residuals: Tree
    outputs: Tree


def mixed(layer: Layer, param: Any = "float32", compute: Any = "bfloat16", output: Any = "float32") -> Layer:
    """The same layer with a dtype each for its params, its computation and its input and output.

    Floating params and inputs are cast to `compute` on the way in, outputs to `output` on the way out; cotangents go
    the other way, in the dtype that the layer itself returned: that of a loss's values is float32 whatever it is given.
    Gradients are contracted wide and handed out in the params' own dtype, not rounded to `compute` first. Residuals are
    in `compute`. Names and params are the layer's own.

    Args:
        param: dtype of the params that `init` makes and `bwd` returns gradients in.
        compute: dtype that the layer works in.
        output: dtype of y, and of x and dx where they are floating.

    Raises:
        InputError: if a floating input is not of dtype `output`.
    """
    a_layer(layer)
    param, compute, output = map(jnp.dtype, (param, compute, output))

    @expect.by("mixed")
    def check(x):
        if any(is_floating(leaf) and expect.dtype(leaf) != output for leaf in jax.tree.leaves(x)):
            raise InputError(
                f"an input of dtype {output}", describe(x), "convert it, or give mixed another output dtype"
            )

    def enter(x):
        check(x)
        return cast(jax.tree.map(jnp.asarray, x), compute)

    def init(key, x):
        check(x)
        params, state = layer.init(key, jax.eval_shape(lambda x: cast(x, param), x))
        return cast(params, param), state

    def apply(params, state, x):
        return cast(layer.apply(cast(params, compute), state, enter(x)), output)

    def fwd(params, state, x, key):
        y, state, residuals = layer.fwd(cast(params, compute), state, enter(x), key)
        outputs = jax.tree.map(lambda leaf: jnp.zeros((0,), leaf.dtype), y)
        return cast(y, output), state, Mixed(residuals, outputs)

    def bwd(params, saved, dy, contract=total):
        in_param_dtype = replace(contract, of=lambda factor, p: contract.of(factor, p.astype(param)))
        fits = jax.tree.structure(dy, lambda leaf: leaf is None) == jax.tree.structure(saved.outputs)
        if fits:  # else the layer inside says what is wrong
            dy = jax.tree.map(lambda like, leaf: cast(leaf, like.dtype), saved.outputs, dy)
        dparams, dx = layer.bwd(cast(params, compute), saved.residuals, dy, in_param_dtype)
        return dparams, cast(dx, output)

    def again(layer):
        return mixed(layer, param, compute, output)

    return around(layer, replace(layer, init=init, apply=apply, fwd=fwd, bwd=bwd), again, "mixed")


def cast(tree: Tree, dtype: Any) -> Tree:
    """`tree` with its floating arrays in `dtype`; integers, booleans and keys as they are."""
    return jax.tree.map(lambda leaf: leaf.astype(dtype) if is_floating(leaf) else leaf, tree)
