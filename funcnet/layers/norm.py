"""Normalisation over the last axis, separately for each position.

Layer norm:

    x_hat = (x - mean(x)) * rstd        rstd = 1 / sqrt(var(x) + eps)        y = scale * x_hat + bias

Backward, with g = scale * dy and means over the last axis D:

    dx = rstd * (g - mean(g) - x_hat * mean(g * x_hat))

RMS norm subtracts no mean and has no bias: x_hat = x * rstd with rstd = 1 / sqrt(mean(x^2) + eps), and

    dx = rstd * (g - x_hat * mean(g * x_hat))

For both dscale is the factor Scale(x_hat, dy), and layer norm's dbias the factor Shift(dy).

The square of a large row overflows, in float32 from 2e19 on, although x_hat is of order 1. Both norms give the same for
p x with p^2 eps as for x with eps, so such a row is multiplied by a small power of two p, which rounds nothing:

    x_hat = (p x - mean(p x)) * rstd_p      rstd_p = 1 / sqrt(var(p x) + p^2 eps) = rstd / p      dx = p d(p x)

Residuals: x [.., D], and p, the means, the mean square and rstd_p [.., 1] in the dtype of the statistics.  Why these: x
is mostly kept alive anyway, as the residual stream that a block adds to, whereas x_hat would be one more array; in half
precision x is exact and x_hat rounded.
Numerics: in float32 for half precision, rounded once. Layer norm centres twice, so that rows far from zero lose no
digits, and a constant row gives x_hat = 0 to rounding, and finite gradients: its mean is kept as two means, which are
subtracted one after the other. Where g is nearly a multiple of x_hat, dx is a small difference of large terms: `pulled`
forms it so that an error of rstd does not enter. p is 1 for a row whose sums are finite, and changes nothing there. A
large row is right up to the largest finite number, whatever the other rows are, and so are equal values of any size.
Where there is such a row, one with a NaN, or one whose deviations may be the rounding error of its mean, the sums are
formed again, under `lax.cond`: a second pass over all of x, which costs nothing where no row needs it.
Source: Ba, Kiros and Hinton 2016, arXiv:1607.06450; Zhang and Sennrich 2019, arXiv:1910.07467; the power of two as in
Blue 1978, "A portable Fortran program to find the Euclidean norm of a vector", doi:10.1145/355769.355771.
"""

from collections.abc import Callable
from functools import partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from funcnet._internal import expect
from funcnet._internal.numerics import in_front, sum_dtype
from funcnet._internal.sharding import placed
from funcnet.gradients.common_factors import Scale, Shift
from funcnet.layer import Layer, stateless
from funcnet.structure import constructor


class NormResiduals(NamedTuple):
    """Residuals of a norm: x, and the power of two p that it is multiplied by, 1 if it is not large.

    Of p x: the means to subtract, one after the other; the mean square of what they leave; rstd_p, from it and p^2 eps.
    """

    x: Array
    power: Array
    means: tuple[Array, ...]
    square: Array
    rstd: Array


@constructor
def layer_norm(*, eps: float = 1e-6) -> Layer[dict[str, Array], tuple[()], NormResiduals]:
    """y = scale * (x - mean) * rstd + bias over the last axis of x [.., D]; params scale [D] (ones), bias [D] (zeros).

    Args:
        eps: added to the variance, inside the root.

    Raises:
        InputError: if x is not floating, its last axis is not D, or its dtype is not the parameters'.
    """
    return _norm("layer_norm", eps, centred=True)


@constructor
def rms_norm(*, eps: float = 1e-6) -> Layer[dict[str, Array], tuple[()], NormResiduals]:
    """y = scale * x * rstd over the last axis of x [.., D], rstd = 1 / sqrt(mean(x^2) + eps); params scale [D] (ones).

    Args:
        eps: added to the mean square, inside the root.

    Raises:
        InputError: if x is not floating, its last axis is not D, or its dtype is not the parameters'.
    """
    return _norm("rms_norm", eps, centred=False)


def _norm(name: str, eps: float, centred: bool) -> Layer:
    eps = expect.positive(eps, "eps", "use the default, 1e-6")
    names = ("scale", "bias") if centred else ("scale",)

    def init(key: Array, x: Any) -> dict[str, Array]:
        expect.float_array(x)
        fill = {"scale": jnp.ones, "bias": jnp.zeros}
        return {name: fill[name](x.shape[-1], expect.dtype(x)) for name in names}

    def fwd(params: dict[str, Array], x: Array) -> tuple[Array, NormResiduals]:
        expect.float_array(x, features=expect.size(params, "scale"))
        expect.fields(params, x.dtype, dict.fromkeys(names, x.shape[-1:]))
        high, saved = statistics(x, x, 2 * centred, eps, _mean)
        y = high * saved.rstd * in_front(params["scale"].astype(high.dtype), x.ndim)
        if centred:
            y = y + in_front(params["bias"].astype(high.dtype), x.ndim)
        return y.astype(x.dtype), saved

    def bwd(params, residuals, dy, contract):
        saved = unshared(residuals)
        x, dtype = saved.x, saved.rstd.dtype
        expect.fields(params, x.dtype, dict.fromkeys(names, x.shape[-1:]))
        dy = expect.cotangent(dy, x.shape, x.dtype)
        high = centre(x, saved)
        g = dy.astype(dtype) * in_front(params["scale"].astype(dtype), dy.ndim)
        if centred:
            g = g - _mean(g)
            dx = pulled(g, high, _mean(g * high), saved, eps) * saved.power
            x_hat = high * saved.rstd
        else:  # from x itself, else the compiler forms p x for the mean and x_hat, and keeps it in addition to x
            x, g = x.astype(dtype), g * saved.power
            dx = pulled(g, high, saved.power * _mean(g * x), saved, eps)
            x_hat = x * (4 * saved.power * saved.rstd) / 4  # p rstd_p of the largest rows is subnormal
        dparams = {"scale": contract(Scale(x_hat, dy), params["scale"])}
        if centred:
            dparams["bias"] = contract(Shift(dy), params["bias"])
        return dparams, placed(dx.astype(dy.dtype), saved.x)

    return stateless(name, init, fwd, bwd, positionwise=True)


def statistics(
    x: Array, values: Array, centrings: int, eps: float, mean: Callable[[Array], Array], sparing: bool = False
) -> tuple[Array, NormResiduals]:
    """p x centred, in the accumulation dtype and the shape of `values` (x, or x regrouped for `mean`); its statistics.

    Args:
        x: to be kept as a residual.
        values: what `mean` takes, and what is centred.
        centrings: how many means are subtracted, none or two; the second removes the rounding error of the first.
        eps: added to the mean square.
        mean: over the values that share statistics, axes kept; a function of a module, not a new one at each call.
        sparing: leave the second mean 0 where the first is within 8 standard deviations of 0.
    """
    power, means, square = _moments(values, centrings, mean, sparing)
    saved = NormResiduals(x, power, means, square, lax.rsqrt(square + eps * power * power))
    return centre(values, saved), saved


@partial(jax.jit, static_argnums=(1, 2, 3))
def _moments(
    values: Array, centrings: int, mean: Callable[[Array], Array], sparing: bool
) -> tuple[Array, tuple[Array, ...], Array]:
    """p, the means to subtract from p x, and the mean square of what they leave.

    Computed again where sums overflow, or where what the means leave may be their rounding error alone: less than 2^-40
    of the mean, or 1/8 where only one was subtracted. Compiled as one, so that without `jit` too no infinite sum shows.
    """

    def doubtful(means: tuple[Array, ...], square: Array) -> Array:
        """The mean square, infinite where it is to be computed again."""
        if not means:
            return square
        least = jnp.square(means[0] * (2.0**-3 if sparing else 2.0**-40))
        return jnp.where((square == 0) | (least <= square), square, jnp.inf)

    def again(values: Array, once: Any) -> Any:
        high = values.astype(once[-1].dtype)
        power = jnp.where(jnp.isfinite(once[-1]), 1.0, _power(high, mean)).astype(high.dtype)
        high = high * power
        means: tuple[Array, ...] = ()
        if centrings:
            first = mean(high)
            first = first + mean(high - first)  # for equal values now the value itself
            means = first, mean(high - first)
        square = mean(jnp.square(reduce(jnp.subtract, means, high)))
        back = jnp.where(square == 0, 1 / power, jnp.ones_like(power))  # equal values take p = 1: p^2 eps would be 0
        power, means = power * back, tuple(m * back for m in means)
        fits = jnp.isfinite(doubtful(*once[1:]))
        return jax.tree.map(partial(jnp.where, fits), once, (power, means, square))

    high = values.astype(sum_dtype(values.dtype))
    means: tuple[Array, ...] = ()
    for _ in range(centrings - sparing):
        means += (mean(high),)
        high = high - means[-1]
    square = mean(jnp.square(high))
    most = jnp.max(doubtful(means, square))
    once = jnp.ones_like(square), means + sparing * (jnp.zeros_like(square),), square
    return lax.cond(jnp.isfinite(most), lambda values, once: once, again, values, once)


def _power(high: Array, mean: Callable[[Array], Array]) -> Array:
    """A power of two near 1 / mean(|x|), at least 4 times the smallest normal number, where mean(|x|) is large."""
    info = jnp.finfo(high.dtype)
    size = lax.stop_gradient(mean(jnp.abs(high) * 2.0**-32))  # no sum of fewer than 2^32 terms overflows
    return lax.reduce_precision(jnp.maximum(2.0**-32 / size, 4 * float(info.tiny)), info.nexp, 0)


def centre(values: Array, saved: NormResiduals) -> Array:
    """p x minus the means, one after the other, in the shape of `values`."""
    return reduce(jnp.subtract, saved.means, values.astype(saved.power.dtype) * saved.power)


def unshared(saved: NormResiduals) -> NormResiduals:
    """The same behind a barrier, else the compiler takes x_hat from the forward pass and keeps it in addition to x."""
    return NormResiduals(saved.x, *lax.optimization_barrier(saved[1:]))


def pulled(g: Array, high: Array, inner: Array, saved: NormResiduals, eps: float) -> Array:
    """d(p x) = rstd_p * (g - x_hat * mean(g * x_hat)), x_hat = high * rstd_p.

    `high` is p x centred, `inner` mean(g * high). Written as rstd_p^3 * (g * p^2 eps + (g * square - high * inner)): no
    rounding of rstd_p enters the difference. One rstd_p is multiplied into the numbers per row first, so that nothing
    overflows or underflows; the factor of 4 keeps rstd_p^2 a normal number. For dx multiply g or the result by p: the
    result where rows are centred, since g p times the deviations of a nearly constant row would underflow.
    """
    power, square, rstd = saved.power, saved.square, saved.rstd
    by_rstd = lambda row: jnp.where(rstd > 0, row * (rstd / 4), 0.0)
    return 4 * rstd * rstd * (g * by_rstd(eps * power * power) + (g * by_rstd(square) - high * by_rstd(inner)))


def _mean(x: Array) -> Array:
    return jnp.mean(x, axis=-1, keepdims=True)
