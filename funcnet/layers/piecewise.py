"""Piecewise linear activations that are learned: by a slope of their own, or by the layer before.

    prelu     y = x where x > 0, else slope * x        dx = dy where x > 0, else slope * dy
                                                       dslope: the factor Scale(min(x, 0), dy)
    maxout    y = max_k x_k, x = [x_1, .., x_K]        dx_k = dy where x_k is the first of the largest, else 0

At the kink x = 0 prelu has the derivative slope; where pieces of maxout are equal the first takes all of dy.

Residuals: x for prelu; for maxout the index of the largest piece, in 8 bits up to 128 pieces.
Numerics: computed in x's dtype; dslope summed in float32 for half precision. NaN stays NaN.
Source: He et al. 2015, arXiv:1502.01852; Goodfellow et al. 2013, arXiv:1302.4389.
"""

from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from funcnet._internal import expect
from funcnet._internal.errors import InputError, describe
from funcnet._internal.numerics import in_front
from funcnet.gradients.common_factors import Scale
from funcnet.layer import Layer, no_params, stateless
from funcnet.structure import constructor


@constructor
def prelu(slope: float = 0.25) -> Layer[dict[str, Array], tuple[()], Array]:
    """y = x for x > 0, else slope * x, with a learned slope for each channel of x [.., C]; params slope [C].

    Args:
        slope: its first value.

    Raises:
        InputError: if x is not floating, its last axis is not C, or its dtype is not the parameter's.
    """

    slope = expect.number(slope, "slope")

    def init(key: Array, x: Any) -> dict[str, Array]:
        expect.float_array(x)
        return {"slope": jnp.full(x.shape[-1], slope, expect.dtype(x))}

    def slopes(params: dict[str, Array], x: Array) -> Array:
        expect.float_array(x, features=expect.size(params, "slope"))
        expect.fields(params, x.dtype, {"slope": x.shape[-1:]})
        return in_front(params["slope"], x.ndim)

    def fwd(params: dict[str, Array], x: Array) -> tuple[Array, Array]:
        return jnp.where(x <= 0, slopes(params, x) * x, x), x

    def bwd(params, x, dy, contract):
        dy = expect.cotangent(dy, x.shape, x.dtype)
        dx = jnp.where(x <= 0, slopes(params, x) * dy, dy)
        return {"slope": contract(Scale(jnp.where(x <= 0, x, 0.0), dy), params["slope"])}, dx

    return stateless("prelu", init, fwd, bwd, positionwise=True)


@constructor
def maxout(pieces: int) -> Layer[dict, tuple[()], Array]:
    """The largest of K pieces of the last axis, entry by entry: x = [x_1, .., x_K] [.., K F] to [.., F].

    A `dense(pieces * features)` in front makes them.

    Args:
        pieces: K, which divides the size of the last axis.

    Raises:
        InputError: if x is not floating, or its last axis is no multiple of K.
    """
    pieces = expect.count(pieces, "pieces")
    index = jnp.int8 if pieces <= 128 else jnp.int32

    def fwd(params: dict, x: Array) -> tuple[Array, Array]:
        expect.float_array(x)
        if x.shape[-1] % pieces:
            wanted = f"features on the last axis in {pieces} pieces of one size"
            raise InputError(wanted, describe(x), "make the layer in front a multiple of pieces wide")
        x = x.reshape(*x.shape[:-1], pieces, -1)
        largest = lax.argmax(x, x.ndim - 2, index)
        # The entry itself, not a maximum, of which autodiff would divide the cotangent among equal entries.
        return jnp.take_along_axis(x, largest[..., None, :].astype(jnp.int32), axis=-2)[..., 0, :], largest

    def bwd(params, largest, dy, contract):
        expect.float_array(dy)
        dy = expect.cotangent(dy, largest.shape, expect.dtype(dy))
        number = lax.broadcasted_iota(largest.dtype, (*dy.shape[:-1], pieces, dy.shape[-1]), dy.ndim - 1)
        dx = jnp.where(largest[..., None, :] == number, dy[..., None, :], 0.0)
        return {}, dx.reshape(*dy.shape[:-1], -1)

    return stateless("maxout", no_params, fwd, bwd, positionwise=True)
