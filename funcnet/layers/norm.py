"""Normalisation over the last axis, of each position by itself.

Layer norm:

    x_hat = (x - mean(x)) * rstd        rstd = 1 / sqrt(var(x) + eps)        y = scale * x_hat + bias

Backward, with g = scale * dy and means over the last axis D:

    dx = rstd * (g - mean(g) - x_hat * mean(g * x_hat))

RMS norm leaves the mean where it is: x_hat = x * rstd with rstd = 1 / sqrt(mean(x^2) + eps), no bias, and

    dx = rstd * (g - x_hat * mean(g * x_hat))

For both dscale is the factor Scale(x_hat, dy), and layer norm's dbias the factor Shift(dy).

Residuals: x_hat [.., D] in x's dtype, rstd [.., 1] in the dtype of the statistics.  Why these: they are all that dx
and dscale need; x, mean and variance are not kept.
Numerics: statistics and sums over D in float32 for half precision. Layer norm centres twice, so that rows far from zero
lose nothing, and a constant row gives x_hat = 0 to rounding, and finite gradients. Where x_hat explains nearly all of
g, dx is a small difference of large terms: `pulled` forms it so that an error of rstd does not enter. In half precision
x_hat is kept rounded, so dx is off by as much of g * rstd as that rounding.
Source: Ba, Kiros and Hinton 2016, arXiv:1607.06450; Zhang and Sennrich 2019, arXiv:1910.07467.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from funcnet import expect
from funcnet.arithmetic import in_front, placed, wide
from funcnet.factors import Scale, Shift
from funcnet.layer import Layer, stateless


class Normalised(NamedTuple):
    """Residuals of a norm: x_hat [.., D] and rstd [.., 1]."""

    x_hat: Array
    rstd: Array


def layer_norm(eps: float = 1e-6) -> Layer[dict[str, Array], tuple[()], Normalised]:
    """y = scale * (x - mean) * rstd + bias over the last axis of x [.., D]; params scale [D] (ones), bias [D] (zeros).

    Args:
        eps: added to the variance, inside the root.

    Raises:
        expect.InputError: if x is not floating, its last axis is not D, or its dtype is not the parameters'.
    """
    return _norm("layer_norm", eps, centred=True)


def rms_norm(eps: float = 1e-6) -> Layer[dict[str, Array], tuple[()], Normalised]:
    """y = scale * x * rstd over the last axis of x [.., D], rstd = 1 / sqrt(mean(x^2) + eps); params scale [D] (ones).

    Args:
        eps: added to the mean square, inside the root.

    Raises:
        expect.InputError: if x is not floating, its last axis is not D, or its dtype is not the parameters'.
    """
    return _norm("rms_norm", eps, centred=False)


def _norm(name: str, eps: float, centred: bool) -> Layer:
    if not eps > 0:
        raise expect.InputError("a positive eps", f"eps={eps}", "use the default, 1e-6")
    names = ("scale", "bias") if centred else ("scale",)

    def init(key: Array, x: Any) -> dict[str, Array]:
        expect.float_array(x)
        fill = {"scale": jnp.ones, "bias": jnp.zeros}
        return {name: fill[name](x.shape[-1], expect.dtype(x)) for name in names}

    def fwd(params: dict[str, Array], x: Array) -> tuple[Array, Normalised]:
        expect.float_array(x, features=expect.size(params, "scale"))
        expect.fields(params, x.dtype, dict.fromkeys(names, x.shape[-1:]))
        high = x.astype(wide(x.dtype))
        if centred:
            high = high - _mean(high)
            high = high - _mean(high)  # takes off the rounding error of the first mean
        rstd = lax.rsqrt(_mean(jnp.square(high)) + eps)
        x_hat = (high * rstd).astype(x.dtype)
        y = x_hat * in_front(params["scale"], x.ndim)
        if centred:
            y = y + in_front(params["bias"], x.ndim)
        return y, Normalised(x_hat, rstd)

    def bwd(params, residuals, dy, contract):
        x_hat, rstd = residuals
        expect.fields(params, x_hat.dtype, dict.fromkeys(names, x_hat.shape[-1:]))
        dy = expect.cotangent(dy, x_hat.shape, x_hat.dtype)
        x_high, g = x_hat.astype(rstd.dtype), (dy * in_front(params["scale"], dy.ndim)).astype(rstd.dtype)
        dx = pulled(g - _mean(g) if centred else g, x_high, rstd, eps, _mean)
        dparams = {"scale": contract(Scale(x_hat, dy), params["scale"])}
        if centred:
            dparams["bias"] = contract(Shift(dy), params["bias"])
        return dparams, placed(dx.astype(dy.dtype), x_hat)

    return stateless(name, init, fwd, bwd)


def pulled(g: Array, x_hat: Array, rstd: Array, eps: float, mean: Callable[[Array], Array]) -> Array:
    """rstd * (g - x_hat * mean(g * x_hat)), where mean(x_hat^2) + eps rstd^2 is 1 but for the rounding of rstd.

    With g written as g times that sum, what rstd is off by is in both terms of the difference alike.
    """
    rest = g * mean(jnp.square(x_hat)) - x_hat * mean(g * x_hat)
    return rstd * (g * (eps * jnp.square(rstd)) + rest)


def _mean(x: Array) -> Array:
    return jnp.mean(x, axis=-1, keepdims=True)
