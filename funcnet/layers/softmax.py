"""Softmax and its logarithm over the last axis, as layers.

    softmax        y = e^x / sum(e^x)              dx = y (dy - sum(y dy))
    log_softmax    y = x - log(sum(e^x))           dx = dy - softmax(x) sum(dy)

For a loss on class probabilities use `cross_entropy`, a layer over logits that suffers no cancellation.

Residuals: y for softmax; x, max(x) and log(sum(e^(x - max))) for log_softmax, whose y rounded to half precision would
not give softmax(x) back.
Numerics: in float32 for half precision, and with the maximum subtracted: finite for any finite x. -inf is a masked
entry, with probability 0; a row of nothing else is NaN. In softmax dy is centred twice: where y is near 1, dy minus
its mean under y is as small as 1 - y, and a rounded y puts a larger error than that into the first mean, which the
second removes. log_softmax near 0 is -log(1 + r) of a small r, and 1 + r is rounded: its error is that of a float32
near 1, as in `jax.nn`.
Source: Bridle 1990, "Probabilistic interpretation of feedforward classification network outputs".
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from funcnet._internal import expect
from funcnet._internal.numerics import sum_dtype
from funcnet.layer import Layer, no_params, stateless
from funcnet.structure import constructor


class LogSoftmaxResiduals(NamedTuple):
    """Residuals of `log_softmax`: x [.., V]; top = max(x) and log_total = log(sum(e^(x - top))), both [.., 1]."""

    x: Array
    top: Array
    log_total: Array


@constructor
def softmax() -> Layer[dict, tuple[()], Array]:
    """y = e^x / sum(e^x) over the last axis of x [.., V].

    Raises:
        InputError: if x is not floating.
    """

    def fwd(params: dict, x: Array) -> tuple[Array, Array]:
        expect.float_array(x)
        e = jnp.exp(x.astype(sum_dtype(x.dtype)) - _top(x))
        y = (e / jnp.sum(e, axis=-1, keepdims=True)).astype(x.dtype)
        return y, y

    def bwd(params, y, dy, contract):
        dy = expect.cotangent(dy, y.shape, y.dtype)
        p, g = y.astype(sum_dtype(y.dtype)), dy.astype(sum_dtype(y.dtype))
        for _ in range(2):  # the second removes the error of the first
            g = g - jnp.sum(p * g, axis=-1, keepdims=True)
        return {}, (p * g).astype(y.dtype)

    return stateless("softmax", no_params, fwd, bwd, positionwise=True)


@constructor
def log_softmax() -> Layer[dict, tuple[()], LogSoftmaxResiduals]:
    """y = x - log(sum(e^x)) over the last axis of x [.., V].

    Raises:
        InputError: if x is not floating.
    """

    def fwd(params: dict, x: Array) -> tuple[Array, LogSoftmaxResiduals]:
        expect.float_array(x)
        top = _top(x)
        shifted = x.astype(top.dtype) - top
        log_total = jnp.log(jnp.sum(jnp.exp(shifted), axis=-1, keepdims=True))
        return (shifted - log_total).astype(x.dtype), LogSoftmaxResiduals(x, top, log_total)

    def bwd(params, residuals, dy, contract):
        x, top, log_total = residuals
        dy = expect.cotangent(dy, x.shape, x.dtype)
        g = dy.astype(top.dtype)
        p = jnp.exp(x.astype(top.dtype) - top - log_total)
        return {}, (g - p * jnp.sum(g, axis=-1, keepdims=True)).astype(x.dtype)

    return stateless("log_softmax", no_params, fwd, bwd, positionwise=True)


def _top(x: Array) -> Array:
    """max(x) [.., 1] in float32 or wider. y does not depend on it, so no cotangent flows back through it."""
    return lax.stop_gradient(jnp.max(x, axis=-1, keepdims=True).astype(sum_dtype(x.dtype)))
