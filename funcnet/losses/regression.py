"""Losses of the difference r between prediction and target, the mean over an example's n entries.

With g = dy of that example:

    mse      l = mean(r^2)      dp = g 2 r / n                         dt = -dp
    mae      l = mean(|r|)      dp = g sign(r) / n, 0 at r = 0         dt = -dp
    huber    l = mean(h(r))     dp = g clip(r, -delta, delta) / n      dt = -dp

Residual: r.
Numerics: in float32 for half precision, r itself rounded to it.
Source: Huber 1964, "Robust estimation of a location parameter".
"""

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array

from funcnet.arithmetic import wide
from funcnet.expect import InputError
from funcnet.losses.loss import Loss, mean, one_an_example, same_dtype, same_shape, spread, stateless_loss


def mse() -> Loss:
    """Mean of (prediction - target)^2 over the entries of an example: [B, ..] to [B]. Residual: the difference."""
    return _regression("mse", jnp.square, lambda r: 2 * r)


def mae() -> Loss:
    """Mean of |prediction - target| over the entries of an example: [B, ..] to [B]; 0 at the kink. Residual: r."""
    return _regression("mae", lambda r: r * jnp.sign(r), jnp.sign)


def huber(delta: float = 1.0) -> Loss:
    """Mean over the entries of an example of r^2 / 2 for |r| <= delta, else delta (|r| - delta / 2): [B, ..] to [B].

    Args:
        delta: where the parabola turns into a line, positive; its unit is the target's.

    Residual: r = prediction - target. Source: Huber 1964, "Robust estimation of a location parameter".
    """
    if not delta > 0:
        raise InputError("a positive delta", f"delta={delta}", "use the default, 1.0")

    def f(r):
        inside = jnp.abs(r) <= delta
        return jnp.where(inside, 0.5 * jnp.square(jnp.where(inside, r, 0.0)), delta * (jnp.abs(r) - 0.5 * delta))

    return _regression("huber", f, lambda r: jnp.clip(r, -delta, delta))


def _regression(name: str, f: Callable[[Array], Array], df: Callable[[Array], Array]) -> Loss:
    """The mean of f(prediction - target) over each example, df its derivative."""

    def check(prediction, target):
        same_shape(prediction, target)
        same_dtype(prediction, target)

    def fwd(params, x):
        check(*x)
        r = x[0] - x[1]
        return mean(f(r.astype(wide(r.dtype)))), r

    def bwd(params, r, dy, contract):
        d = (spread(dy, r) * df(r.astype(wide(r.dtype)))).astype(r.dtype)
        return {}, (d, -d)

    return stateless_loss(name, fwd, bwd, one_an_example, {}, check)
