"""Gated linear units: the last axis in two halves, x = [a, b], of which the second is the gate.

    y = a * s(b)        da = dy * s(b)        db = dy * a * s'(b)

    glu       s = sigmoid
    swiglu    s = silu
    geglu     s = gelu

They have no parameters: a `dense(2 * features)` in front makes both halves. The order is the same in all three, that of
the first paper; a kernel packed as [gate, values], as some language models have it, needs its halves exchanged.

Residuals: x [.., 2 F].  Why this: s(b) is computed again in `bwd`, and x is the output of the layer before.
Numerics: as in `funcnet.layers.activation`: half precision in float32, rounded once.
Source: Dauphin et al. 2017, arXiv:1612.08083; Shazeer 2020, arXiv:2002.05202.
"""

import jax.numpy as jnp
from jax import Array

from funcnet._internal import expect
from funcnet._internal.errors import InputError, describe
from funcnet._internal.numerics import sum_dtype
from funcnet.layer import no_params, stateless
from funcnet.layers.activation import GELU_IN_HALF, GELU_TANH_IN_HALF, SIGMOID_IN_HALF, Activation, gelu, sigmoid, silu
from funcnet.structure import constructor


@constructor
def glu() -> Activation:
    """y = a * sigmoid(b) for x = [a, b] [.., 2 F]: to [.., F].

    Raises:
        InputError: if x is not floating, or its last axis is odd.
    """
    return _gated("glu", sigmoid(), SIGMOID_IN_HALF)


@constructor
def swiglu() -> Activation:
    """y = a * silu(b) for x = [a, b] [.., 2 F]: to [.., F]. Raises as `glu`."""
    return _gated("swiglu", silu(), silu())


@constructor
def geglu(*, approximate: bool = False) -> Activation:
    """y = a * gelu(b) for x = [a, b] [.., 2 F]: to [.., F]; `approximate` as for `gelu`. Raises as `glu`."""
    return _gated("geglu", gelu(approximate=approximate), GELU_TANH_IN_HALF if approximate else GELU_IN_HALF)


def _gated(name: str, single: Activation, half: Activation) -> Activation:
    """The layer gated by `single`, or where x is of half precision by `half`, computed in float32."""

    def halves(x: Array) -> tuple[Activation, Array, Array]:
        """The gate, a and b, both in the accumulation dtype."""
        expect.float_array(x)
        if x.shape[-1] % 2:
            raise InputError(
                "an even number of features on the last axis", describe(x), "double those of the layer before"
            )
        a, b = jnp.split(x, 2, axis=-1)
        high = sum_dtype(x.dtype)
        return single if x.dtype == high else half, a.astype(high), b.astype(high)

    def fwd(params: dict, x: Array) -> tuple[Array, Array]:
        gate, a, b = halves(x)
        return (a * gate.apply({}, (), b)).astype(x.dtype), x

    def bwd(params, x, dy, contract):
        gate, a, b = halves(x)
        dy = expect.cotangent(dy, a.shape, x.dtype).astype(a.dtype)
        s, _, saved = gate.fwd({}, (), b, None)
        db = gate.bwd({}, saved, dy * a)[1]
        return {}, jnp.concatenate([dy * s, db], axis=-1).astype(x.dtype)

    return stateless(name, no_params, fwd, bwd, positionwise=True)
