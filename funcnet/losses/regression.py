"""Losses of the difference r between prediction and target, the mean over an example's n entries.

With g = dy of that example:

    mse      l = mean(r^2)      dp = g 2 r / n                         dt = -dp
    mae      l = mean(|r|)      dp = g sign(r) / n, 0 at r = 0         dt = -dp
    huber    l = mean(h(r))     dp = g clip(r, -delta, delta) / n      dt = -dp

Residuals: prediction and target.  Why these: they are in memory anyway, as the model's output and the data, and in half
precision r itself would have to be kept in float32, which takes as much memory as both.
Numerics: r is formed in float32 for half precision, so values are right even where the difference of two half-precision
numbers is out of their range: 40000 - (-40000) is beyond float16. Gradients are cast back to the prediction's dtype:
one beyond its range, as 2 r / n may be, is infinite.
Infinite r: the value is infinite; the slopes are the limits, 2 r, sign(r) and +-delta. Where prediction and target are
the same infinity, their difference has no limit: value and slopes are NaN.
Source: Huber 1964, "Robust estimation of a location parameter".
"""

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array

from funcnet._internal import expect
from funcnet.losses.entries import of_entries
from funcnet.losses.loss import Loss, same_dtype
from funcnet.structure import constructor


@constructor
def mse() -> Loss:
    """Mean of (prediction - target)^2 over the entries of an example: [B, ..] to [B].

    Target: like the prediction in shape and dtype, or {"target": t, "mask": m}, m booleans like t: the mean is then
    over the entries where m is True, and what the others hold, NaN included, has no influence.
    Residuals: prediction and target.
    """
    return _regression("mse", jnp.square, lambda r: 2 * r)


@constructor
def mae() -> Loss:
    """Mean of |prediction - target| over the entries of an example: [B, ..] to [B]; slope 0 at the kink.

    Target, mask and residuals: as for `mse`.
    """
    return _regression("mae", lambda r: r * jnp.sign(r), jnp.sign)


@constructor
def huber(delta: float = 1.0) -> Loss:
    """Mean over the entries of an example of r^2 / 2 for |r| <= delta, else delta (|r| - delta / 2): [B, ..] to [B].

    Here r = prediction - target. Target, mask and residuals: as for `mse`.

    Args:
        delta: where the parabola turns into a line, positive; its unit is the target's.

    Source: Huber 1964, "Robust estimation of a location parameter".
    """
    delta = expect.positive(delta, "delta", "use the default, 1.0")

    def f(r):
        inside = jnp.abs(r) <= delta
        return jnp.where(inside, 0.5 * jnp.square(jnp.where(inside, r, 0.0)), delta * (jnp.abs(r) - 0.5 * delta))

    return _regression("huber", f, lambda r: jnp.clip(r, -delta, delta))


def _regression(name: str, f: Callable[[Array], Array], df: Callable[[Array], Array]) -> Loss:
    """The mean of f(prediction - target) over each example, df its derivative."""

    def slopes(prediction, target):
        d = df(prediction - target)
        return d, -d

    fits = lambda prediction, target, values: same_dtype(prediction, target)
    return of_entries(name, lambda prediction, target: f(prediction - target), slopes, fits)
