"""Kernels as directions and lengths.

With a vector v and a number g for each feature, a kernel [.., F] is read as W [N, F], one column for each feature:

    W = g v / |v|           dg = <v / |v|, dW>          dv = g (dW - (v / |v|) dg) / |v|

Residuals: the layer's own.
Numerics: lengths and gradients in float32 for half precision. A feature whose v is 0 has the kernel 0 and the gradient
0.
Source: Salimans and Kingma 2016, arXiv:1602.07868, section 2.1.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jax import Array

from funcnet._internal import expect
from funcnet._internal.errors import by
from funcnet.combinators.kernels import at_kernels, checked, columns, depths_of, each_layer, reparametrized, through
from funcnet.gradients.contraction import total
from funcnet.gradients.factor import mapped
from funcnet.layer import Layer
from funcnet.layers.normalize import unit, unit_pullback
from funcnet.structure import constructor

Tree = Any


@constructor
def weight_norm(layer: Layer, names: tuple[str, ...] = ("kernel",)) -> Layer[dict, Any, Any]:
    """The same layer, every kernel a direction and a length for each feature: W = scale * direction / |direction|.

    A leaf kernel [.., F] of the layer's params, at any depth, becomes {"direction": [.., F], "scale": [F]}; `init`
    makes them so that W is the layer's own. weight_norm(repeat(layer)) is repeat(weight_norm(layer)).

    Args:
        layer: any layer with such params.
        names: of the leaves that are reparametrised.

    Raises:
        InputError: if the layer has no such params.
    """
    names = checked(layer, names)

    def of_parts(parts: Mapping[str, Array]) -> Array:
        direction, _ = unit(columns(parts["direction"]))
        kernel = direction.T * parts["scale"].astype(direction.dtype)[None]
        return kernel.reshape(parts["direction"].shape).astype(parts["direction"].dtype)

    def whole(parts: Mapping[str, Array]) -> Array:
        expect.keys(parts, ("direction", "scale"), "params")
        return each_layer(jnp.ndim(parts["scale"]) - 1, of_parts)(parts)

    def pull_direction(parts: Mapping[str, Array], dkernel: Array) -> Array:
        direction, length = unit(columns(parts["direction"]))
        d = columns(dkernel)
        return unit_pullback(direction, length, d * parts["scale"].astype(d.dtype)[:, None]).T.reshape(dkernel.shape)

    def pull_scale(parts: Mapping[str, Array], dkernel: Array) -> Array:
        direction, _ = unit(columns(parts["direction"]))
        return jnp.sum(direction * columns(dkernel), axis=1)

    def made(params: Tree) -> Tree:
        with by("weight_norm"):
            return at_kernels(names, whole, params)

    def init(key, x):
        params, state = layer.init(key, x)

        def split(kernel, depth):
            _, length = each_layer(depth, lambda kernel: unit(columns(kernel)))(kernel)
            return {"direction": kernel, "scale": length[..., 0].astype(kernel.dtype)}

        with by("weight_norm"):
            return at_kernels(names, split, params, depths_of(layer, names, params, state, x)), state

    def apply(params, state, x):
        return layer.apply(made(params), state, x)

    def fwd(params, state, x, key):
        return layer.fwd(made(params), state, x, key)

    def bwd(params, residuals, dy, contract=total):
        pulls = {"direction": pull_direction, "scale": pull_scale}

        def answer(parts, kernel, factor):
            return {name: contract(mapped(factor, kernel, parts, pull), parts[name]) for name, pull in pulls.items()}

        return through(layer, names, made(params), params, residuals, dy, contract, answer)

    return reparametrized(layer, "weight_norm", init, apply, fwd, bwd)
