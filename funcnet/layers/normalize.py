"""Normalisation over groups of channels, and to unit length.

Group norm, with mean and variance over all positions of an example and the C / G channels of a group:

    x_hat = (x - mean(x)) * rstd        rstd = 1 / sqrt(var(x) + eps)        y = scale * x_hat + bias

Backward, with g = scale * dy and the same means, as in layer norm:

    dx = rstd * (g - mean(g) - x_hat * mean(g * x_hat))

dscale is the factor Scale(x_hat, dy), dbias the factor Shift(dy). Instance norm is group norm with a channel per group.
Normalisation to unit length, over the last axis:

    y = x / |x|        dx = (dy - y <y, dy>) / |x|        both 0 at x = 0, where there is no direction

Residuals: for group norm x [B, .., C] and, each [B, 1, G, 1] in the dtype of the statistics, the power of two that x is
multiplied by, the means, the mean square and rstd; for unit length y and |x| [.., 1].
Numerics: in float32 for half precision. Group norm centres twice, as layer norm does (`norm`), so that values far from
zero lose no digits, and as there, groups whose squares overflow are right up to the largest finite number. |x| is
computed from x / max |x|, so that no square overflows or underflows, and y is right for every finite x but subnormal
ones, which CPUs take for 0; dx is 0 where 1 / |x| is subnormal.
Source: Wu and He 2018, arXiv:1803.08494; Ulyanov, Vedaldi and Lempitsky 2016, arXiv:1607.08022.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from funcnet._internal import expect
from funcnet._internal.errors import InputError, describe
from funcnet._internal.numerics import in_front, sum_dtype
from funcnet._internal.sharding import placed, regrouped
from funcnet.gradients.common_factors import Scale, Shift
from funcnet.layer import Layer, no_params, stateless
from funcnet.layers.norm import NormResiduals, centre, pulled, statistics, unshared
from funcnet.structure import constructor


class L2NormalizeResiduals(NamedTuple):
    """Residuals of `l2_normalize`: y [.., D] and |x| [.., 1]."""

    y: Array
    length: Array


@constructor
def group_norm(groups: int, *, eps: float = 1e-6) -> Layer[dict[str, Array], tuple[()], NormResiduals]:
    """Normalise groups of adjacent channels over all positions of an example: x [B, .., C] with params scale, bias [C].

    Args:
        groups: G, which divides C.
        eps: added to the variance, inside the root.

    Raises:
        InputError: if x is not floating of at least two axes, C is not the parameters' or no multiple of G, or
            the dtype is not theirs.
    """
    return _group_norm("group_norm", expect.count(groups, "groups"), eps)


@constructor
def instance_norm(*, eps: float = 1e-6) -> Layer[dict[str, Array], tuple[()], NormResiduals]:
    """Normalise each channel of an example over its positions: x [B, .., C] with params scale, bias [C].

    Without positions, or with one, every value is its own mean: y = bias, and dx = 0.

    Args:
        eps: added to the variance, inside the root.

    Raises:
        InputError: as `group_norm`.
    """
    return _group_norm("instance_norm", None, eps)


def _group_norm(name: str, groups: int | None, eps: float) -> Layer:
    """`groups` None for as many as there are channels."""
    eps = expect.positive(eps, "eps", "use the default, 1e-6")

    def check(x: Any, channels: int | None = None) -> None:
        expect.float_array(x, rank=2, features=channels)
        if x.shape[-1] % (groups or 1):
            remedy = "choose a number of groups that divides the channels"
            raise InputError(f"channels on the last axis in {groups} groups of one size", describe(x), remedy)

    def grouped(x: Array) -> Array:
        """x [B, .., C] as [B, N, G, C / G]."""
        count = groups or x.shape[-1]
        return regrouped(x, (x.shape[0], -1, count, x.shape[-1] // count))

    def init(key: Array, x: Any) -> dict[str, Array]:
        check(x)
        return {"scale": jnp.ones(x.shape[-1], expect.dtype(x)), "bias": jnp.zeros(x.shape[-1], expect.dtype(x))}

    def fwd(params: dict[str, Array], x: Array) -> tuple[Array, NormResiduals]:
        check(x, expect.size(params, "scale"))
        expect.fields(params, x.dtype, dict.fromkeys(("scale", "bias"), x.shape[-1:]))
        high, saved = statistics(x, grouped(x), 2, eps, _mean)
        x_hat = regrouped(high * saved.rstd, x.shape)
        scale, bias = (in_front(params[name].astype(high.dtype), x.ndim) for name in ("scale", "bias"))
        return (x_hat * scale + bias).astype(x.dtype), saved

    def bwd(params, residuals, dy, contract):
        saved = unshared(residuals)
        x, dtype = saved.x, saved.rstd.dtype
        expect.fields(params, x.dtype, dict.fromkeys(("scale", "bias"), x.shape[-1:]))
        dy = expect.cotangent(dy, x.shape, x.dtype)
        high = centre(grouped(x), saved)
        g = grouped(dy.astype(dtype) * in_front(params["scale"].astype(dtype), dy.ndim))
        g = g - _mean(g)
        dx = regrouped(pulled(g, high, _mean(g * high), saved, eps) * saved.power, dy.shape)
        x_hat = regrouped(high * saved.rstd, dy.shape)
        dparams = {
            "scale": contract(Scale(x_hat, dy), params["scale"]),
            "bias": contract(Shift(dy), params["bias"]),
        }
        return dparams, placed(dx.astype(dy.dtype), x)

    return stateless(name, init, fwd, bwd)


@constructor
def l2_normalize() -> Layer[dict, tuple[()], L2NormalizeResiduals]:
    """y = x / |x| over the last axis of x [.., D], |x| the Euclidean length; 0 with gradient 0 where x is 0.

    Raises:
        InputError: if x is not floating.
    """

    def fwd(params: dict, x: Array) -> tuple[Array, L2NormalizeResiduals]:
        expect.float_array(x)
        y, length = unit(x)
        y = y.astype(x.dtype)
        return y, L2NormalizeResiduals(y, length)

    def bwd(params, residuals, dy, contract):
        y, length = residuals
        dy = expect.cotangent(dy, y.shape, y.dtype)
        return {}, unit_pullback(y.astype(length.dtype), length, dy.astype(length.dtype)).astype(dy.dtype)

    return stateless("l2_normalize", no_params, fwd, bwd, positionwise=True)


def unit(x: Array) -> tuple[Array, Array]:
    """x / |x| [.., D] and |x| [.., 1] over the last axis, in float32 or wider; 0 and 0 where x is 0."""
    x = x.astype(sum_dtype(x.dtype))
    largest = lax.stop_gradient(jnp.max(jnp.abs(x), axis=-1, keepdims=True))
    zero = largest == 0
    quarter = jnp.where(largest > 1, 0.25, 1.0).astype(x.dtype)  # 1 / max |x| is subnormal near the largest number
    divisor = jnp.where(zero, 1.0, largest * quarter)
    x = x * quarter / divisor
    length = jnp.sqrt(jnp.where(zero, 1.0, jnp.sum(jnp.square(x), axis=-1, keepdims=True)))
    return jnp.where(zero, 0.0, x / length), jnp.where(zero, 0.0, length * largest)


def unit_pullback(y: Array, length: Array, dy: Array) -> Array:
    """The cotangent of x in y = x / |x|: the part of dy orthogonal to y, divided by |x|; 0 where x is 0."""
    zero = length == 0
    across = dy - y * jnp.sum(y * dy, axis=-1, keepdims=True)
    return jnp.where(zero, 0.0, across / jnp.where(zero, 1.0, length))


def _mean(x: Array) -> Array:
    """Over positions and the channels of a group: [B, N, G, K] to [B, 1, G, 1]."""
    return jnp.mean(x, axis=(1, 3), keepdims=True)
