"""Normalisation over the last axis, of each position by itself.

Layer norm:

    x_hat = (x - mean(x)) * rstd        rstd = 1 / sqrt(var(x) + eps)        y = scale * x_hat + bias

Backward, with g = scale * dy and means over the last axis D:

    dx = rstd * (g - mean(g) - x_hat * mean(g * x_hat))

RMS norm leaves the mean where it is: x_hat = x * rstd with rstd = 1 / sqrt(mean(x^2) + eps), no bias, and

    dx = rstd * (g - x_hat * mean(g * x_hat))

For both dscale is the factor Scale(x_hat, dy), and layer norm's dbias the factor Shift(dy).

Residuals: x [.., D], and the mean, the mean square and rstd [.., 1] in the dtype of the statistics.  Why these: x is
mostly alive anyhow, as the stream that a block adds to, where x_hat would be an array of its own; in half precision x
is exact, x_hat rounded.
Numerics: in float32 for half precision, rounded once. Layer norm centres twice, so that rows far from zero lose
nothing, and a constant row gives x_hat = 0 to rounding, and finite gradients: its mean is kept as the two that are
taken off one after the other. Where x_hat explains nearly all of g, dx is a small difference of large terms: `pulled`
forms it so that an error of rstd does not enter. A row whose mean square overflows, in float32 from 2e19 on, gives
x_hat = 0 and dx = 0.
Source: Ba, Kiros and Hinton 2016, arXiv:1607.06450; Zhang and Sennrich 2019, arXiv:1910.07467.
"""

from collections.abc import Callable
from functools import reduce
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from funcnet import expect
from funcnet.arithmetic import in_front, placed, wide
from funcnet.factors import Scale, Shift
from funcnet.layer import Layer, stateless


class Statistics(NamedTuple):
    """Residuals of a norm: x; the means to take off it, one after the other; the mean square of the rest, and rstd."""

    x: Array
    means: tuple[Array, ...]
    square: Array
    rstd: Array


def layer_norm(eps: float = 1e-6) -> Layer[dict[str, Array], tuple[()], Statistics]:
    """y = scale * (x - mean) * rstd + bias over the last axis of x [.., D]; params scale [D] (ones), bias [D] (zeros).

    Args:
        eps: added to the variance, inside the root.

    Raises:
        expect.InputError: if x is not floating, its last axis is not D, or its dtype is not the parameters'.
    """
    return _norm("layer_norm", eps, centred=True)


def rms_norm(eps: float = 1e-6) -> Layer[dict[str, Array], tuple[()], Statistics]:
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

    def fwd(params: dict[str, Array], x: Array) -> tuple[Array, Statistics]:
        expect.float_array(x, features=expect.size(params, "scale"))
        expect.fields(params, x.dtype, dict.fromkeys(names, x.shape[-1:]))
        high, saved = statistics(x, x.astype(wide(x.dtype)), 2 * centred, eps, _mean)
        y = high * saved.rstd * in_front(params["scale"].astype(high.dtype), x.ndim)
        if centred:
            y = y + in_front(params["bias"].astype(high.dtype), x.ndim)
        return y.astype(x.dtype), saved

    def bwd(params, residuals, dy, contract):
        x, means, square, rstd = unshared(residuals)
        expect.fields(params, x.dtype, dict.fromkeys(names, x.shape[-1:]))
        dy = expect.cotangent(dy, x.shape, x.dtype)
        high = centre(x.astype(square.dtype), *means)
        g = dy.astype(square.dtype) * in_front(params["scale"].astype(square.dtype), dy.ndim)
        dx = pulled(g - _mean(g) if centred else g, high, square, rstd, eps, _mean)
        dparams = {"scale": contract(Scale(high * rstd, dy), params["scale"])}
        if centred:
            dparams["bias"] = contract(Shift(dy), params["bias"])
        return dparams, placed(dx.astype(dy.dtype), x)

    return stateless(name, init, fwd, bwd)


def statistics(
    x: Array, high: Array, centrings: int, eps: float, mean: Callable[[Array], Array]
) -> tuple[Array, Statistics]:
    """`high`, which is x made wide, centred, and its statistics."""
    means = ()
    for _ in range(centrings):  # each takes off the rounding error of the one before
        means += (mean(high),)
        high = centre(high, means[-1])
    square = mean(jnp.square(high))
    return high, Statistics(x, means, square, lax.rsqrt(square + eps))


def centre(high: Array, *means: Array) -> Array:
    """Take the means off, one after the other."""
    return reduce(jnp.subtract, means, high)


def unshared(saved: Statistics) -> Statistics:
    """The same, behind a barrier: the compiler would find x_hat in the forward pass, and keep that beside x."""
    return Statistics(saved.x, *lax.optimization_barrier(saved[1:]))


def pulled(g: Array, x: Array, square: Array, rstd: Array, eps: float, mean: Callable[[Array], Array]) -> Array:
    """rstd * (g - x_hat * mean(g * x_hat)), where x_hat = x * rstd, rstd = 1 / sqrt(square + eps), square = mean(x^2).

    Written as rstd^3 * (g * eps + (g * square - x * mean(g * x))): no rounding of rstd enters the difference. One rstd
    is multiplied into the numbers of each row first, so that nothing overflows or vanishes; where square has, dx is 0.
    """
    by_rstd = lambda row: jnp.where(rstd > 0, row * rstd, 0.0)
    return rstd * rstd * (g * by_rstd(eps) + (g * by_rstd(square) - x * by_rstd(mean(g * x))))


def _mean(x: Array) -> Array:
    return jnp.mean(x, axis=-1, keepdims=True)
