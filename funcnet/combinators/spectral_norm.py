"""Kernels divided by their largest singular value.

A kernel [.., F] is read as W [N, F], one column for each feature. With sigma = right^T W left, which is W's largest
singular value where left and right are its singular vectors:

    W' = W / sigma          dW = (dW' - <dW', W'> right left^T) / sigma

The vectors are kept in state, as constants of the step, and each training pass returns those of `iterations` more:
left <- W^T right, then right <- W left, each scaled to length 1. So `fwd` and `apply` use the vectors as they were
given, and dW is the exact gradient. PyTorch iterates before it uses them, and leaves the vectors' dependence on W out
of its gradient.

Residuals: the layer's own, and the vectors, which `bwd` does not receive otherwise.
Numerics: sigma and gradients in float32 for half precision. A sigma of 0 divides by 1.
Source: Miyato et al. 2018, arXiv:1802.05957, algorithm 1.
"""

from collections.abc import Mapping
from functools import partial
from itertools import count
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from funcnet._internal import expect
from funcnet._internal.errors import by
from funcnet.combinators.kernels import (
    at_kernels,
    checked,
    columns,
    depths_of,
    each_layer,
    only_kernels,
    reparametrized,
    through,
)
from funcnet.gradients.contraction import total
from funcnet.gradients.factor import mapped
from funcnet.layer import Layer, child
from funcnet.layers.normalize import unit
from funcnet.structure import constructor

Tree = Any


class SpectralNormResiduals(NamedTuple):
    """Residuals of `spectral_norm`: the layer's, and the vectors by kernel."""

    layer: Tree
    vectors: Tree


@constructor
def spectral_norm(
    layer: Layer, names: tuple[str, ...] = ("kernel",), iterations: int = 1
) -> Layer[Any, dict, SpectralNormResiduals]:
    """The same layer with every kernel divided by its largest singular value, as far as power iteration knows it.

    Params are the layer's own; state is {"layer": its state, "vectors": {.., kernel: {"left": [F], "right": [N]}}}, in
    float32 or wider. `fwd` and `apply` divide by right^T W left, and `fwd` returns the vectors after `iterations` more.
    `init` runs 15 iterations. Do the same for params that come from elsewhere: call `fwd` several times, and keep its
    state. Each of several stacked kernels has its own vectors, as in repeat(spectral_norm(layer), times).

    Args:
        layer: any layer with such params.
        names: of the leaves that are divided.
        iterations: of the power method in each training pass.

    Raises:
        InputError: if the layer has no such params.
    """
    names, iterations = checked(layer, names), expect.count(iterations, "iterations")

    def divided(kernel: Array, vectors: Mapping[str, Array]) -> tuple[Array, Array]:
        """The matrix over sigma, [F, N], and sigma."""
        matrix = columns(kernel)
        left, right = (vectors[name].astype(matrix.dtype) for name in ("left", "right"))
        sigma = jnp.dot(left, matrix @ right)
        sigma = jnp.where(sigma == 0, jnp.ones_like(sigma), sigma)
        return matrix / sigma, sigma

    def iterated(kernel: Array, vectors: Mapping[str, Array], times: int) -> dict[str, Array]:
        matrix = columns(jax.lax.stop_gradient(kernel))
        left, right = (vectors[name].astype(matrix.dtype) for name in ("left", "right"))
        for _ in range(times):
            left = _unless_zero(unit(matrix @ right)[0], left)
            right = _unless_zero(unit(left @ matrix)[0], right)
        return {"left": left.astype(vectors["left"].dtype), "right": right.astype(vectors["right"].dtype)}

    def of_one(kernel: Array, vectors: Mapping[str, Array]) -> Array:
        return divided(kernel, vectors)[0].T.reshape(kernel.shape).astype(kernel.dtype)

    def whole(kernel: Array, vectors: Mapping[str, Array]) -> Array:
        return each_layer(depth(vectors), of_one)(kernel, vectors)

    def depth(vectors: Mapping[str, Array]) -> int:
        return vectors["left"].ndim - 1

    def pull_kernel(saved: tuple[Array, Mapping[str, Array]], dkernel: Array) -> Array:
        kernel, vectors = saved
        matrix, sigma = divided(kernel, vectors)
        d = columns(dkernel)
        along = jnp.sum(d * matrix) * vectors["left"].astype(d.dtype)[:, None]
        return ((d - along * vectors["right"].astype(d.dtype)[None]) / sigma).T.reshape(dkernel.shape)

    def made(params: Tree, vectors: Tree) -> Tree:
        with by("spectral_norm"):
            return at_kernels(names, whole, params, vectors)

    def init(key, x):
        params, state = layer.init(child(key, 0), x)
        keys = (child(child(key, 1), i) for i in count())  # two for each kernel

        def first(kernel, depth):
            front, matrix = kernel.shape[:depth], jax.eval_shape(columns, kernel[(0,) * depth])
            left, right = (unit(jax.random.normal(next(keys), (*front, n), matrix.dtype))[0] for n in matrix.shape)
            return each_layer(depth, partial(iterated, times=15))(kernel, {"left": left, "right": right})

        with by("spectral_norm"):
            depths = depths_of(layer, names, params, state, x)
            return params, {"layer": state, "vectors": only_kernels(names, first, params, depths)}

    @by("spectral_norm")
    def vectors_of(state: Tree) -> Tree:
        expect.keys(state, ("layer", "vectors"), "state")
        return state["vectors"]

    def apply(params, state, x):
        return layer.apply(made(params, vectors_of(state)), state["layer"], x)

    def fwd(params, state, x, key):
        vectors = vectors_of(state)
        y, inner, residuals = layer.fwd(made(params, vectors), state["layer"], x, key)
        move = lambda kernel, v: each_layer(depth(v), partial(iterated, times=iterations))(kernel, v)
        moved = only_kernels(names, move, params, vectors)
        return y, {"layer": inner, "vectors": moved}, SpectralNormResiduals(residuals, vectors)

    def bwd(params, residuals, dy, contract=total):
        def answer(param, kernel, factor, vectors):
            return contract(mapped(factor, kernel, (param, vectors), pull_kernel), param)

        kernels, vectors = made(params, residuals.vectors), residuals.vectors
        return through(layer, names, kernels, params, residuals.layer, dy, contract, answer, vectors)

    return reparametrized(layer, "spectral_norm", init, apply, fwd, bwd)


def _unless_zero(new: Array, old: Array) -> Array:
    """`new`, but `old` where `new` is 0: a zero matrix has no directions, and a vector of 0 would stay 0 for ever."""
    return jnp.where(jnp.any(new != 0), new, old)
