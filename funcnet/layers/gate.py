"""Gated linear units: the last axis in two halves, x = [a, b], of which the second is the gate.

    y = a * s(b)        da = dy * s(b)        db = dy * a * s'(b)

    glu       s = sigmoid
    swiglu    s = silu
    geglu     s = gelu

They have no parameters: a `dense(2 * features)` in front makes both halves. The order is the same in all three, that of
the first paper; a kernel packed as [gate, values], as some language models have it, needs its halves exchanged.

Residuals: x [.., 2 F].  Why this: s(b) is computed again in `bwd`, and x is the output of the layer in front.
Numerics: computed in x's dtype, the gate as in `funcnet.layers.activation`.
Source: Dauphin et al. 2017, arXiv:1612.08083; Shazeer 2020, arXiv:2002.05202.
"""

import jax.numpy as jnp
from jax import Array

from funcnet import expect
from funcnet.expect import InputError, describe
from funcnet.layer import no_params, stateless
from funcnet.layers.activation import Activation, gelu, sigmoid, silu


def glu() -> Activation:
    """y = a * sigmoid(b) for x = [a, b] [.., 2 F]: to [.., F].

    Raises:
        expect.InputError: if x is not floating, or its last axis is odd.
    """
    return _gated("glu", sigmoid())


def swiglu() -> Activation:
    """y = a * silu(b) for x = [a, b] [.., 2 F]: to [.., F]. Raises as `glu`."""
    return _gated("swiglu", silu())


def geglu(approximate: bool = False) -> Activation:
    """y = a * gelu(b) for x = [a, b] [.., 2 F]: to [.., F]; `approximate` as for `gelu`. Raises as `glu`."""
    return _gated("geglu", gelu(approximate))


def _gated(name: str, gate: Activation) -> Activation:
    def halves(x: Array) -> list[Array]:
        expect.float_array(x)
        if x.shape[-1] % 2:
            raise InputError(
                "an even number of features on the last axis", describe(x), "double those of the layer before"
            )
        return jnp.split(x, 2, axis=-1)

    def fwd(params: dict, x: Array) -> tuple[Array, Array]:
        a, b = halves(x)
        return a * gate.apply({}, (), b), x

    def bwd(params, x, dy, contract):
        a, b = halves(x)
        dy = expect.cotangent(dy, a.shape, a.dtype)
        s, _, saved = gate.fwd({}, (), b, None)
        db = gate.bwd({}, saved, dy * a)[1]
        return {}, jnp.concatenate([dy * s, db], axis=-1)

    return stateless(name, no_params, fwd, bwd)
