"""Losses of one entry at a time: the mean over an example's entries of a function of prediction and target.

With prediction z and target t [B, ..], m 1 where a mask lets an entry through and 0 elsewhere (1 without a mask), n the
sum of m over an example and g = dy of that example:

    l = sum(m f(z, t)) / n        dz = g m df/dz / n        dt = g m df/dt / n

A mask comes with the target, as {"target": t, "mask": m}, m booleans like t. What it holds back has no influence,
whatever stands there, NaN included: zeros take its place before f is asked. An example of which nothing is let through
has value 0 and gradients 0, and does not count in a mean. The target's cotangent is then {"target": dt, "mask": None}.

Residuals: z and the target.
Numerics: prediction and target are made float32, if they are half precision, before anything is computed of them. A
cotangent of 0 silences a slope that is not finite; f and df give 0 times infinity as 0 where that is the limit.
"""

from collections.abc import Callable, Mapping
from math import prod
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from funcnet import expect
from funcnet.arithmetic import wide
from funcnet.expect import InputError, describe
from funcnet.losses.loss import Loss, one_an_example, same_shape, silenced, stateless_loss


def of_entries(
    name: str,
    f: Callable[[Array, Array], Array],
    df: Callable[[Array, Array], tuple[Array, Array]],
    fits: Callable[[Any, Any, Callable[[], np.ndarray]], None],
    metrics: Mapping[str, Callable[[Any, Any], Array]] | None = None,
) -> Loss:
    """The mean of f(z, t) over the entries of each example that the target's mask lets through: z [B, ..] to [B].

    Args:
        name: the loss's.
        f: (z, t) -> the loss of each entry, in float32 or wider; finite at z = t = 0.
        df: (z, t) -> its derivatives in z and in t.
        fits: (z, t, values) raises `InputError` for dtypes and values that do not fit. z and t are of one shape;
            values() reads those of t that are let through, in float64, or none where they are traced.
        metrics: of the loss; they are given the target as it came.
    """

    def check(z, target):
        t, mask = opened(target)
        same_shape(z, t)
        if mask is not None and not (expect.is_array(mask) and mask.shape == t.shape and mask.dtype == bool):
            wanted = f"a mask like the target, bool[{', '.join(map(str, t.shape))}]"
            raise InputError(wanted, describe(mask), "make it booleans, True where an entry counts: weights > 0")
        fits(z, t, lambda: _readable(t, mask))

    def fwd(params, x):
        check(*x)
        z, t, mask = _entries(*x)
        return mean(f(z, t), mask), x

    def bwd(params, x, dy, contract):
        z, t, mask = _entries(*x)
        given, _ = opened(x[1])
        g = spread(dy, x[0], mask)
        dz, dt = (g * silenced(g, slope) for slope in df(z, t))
        dt = dt.astype(given.dtype) if expect.is_floating(given) else None
        if mask is not None:
            dt = {"target": dt, "mask": None}
        return {}, (dz.astype(x[0].dtype), dt)

    def counted(target):
        t, mask = opened(target)
        return one_an_example(t) if mask is None else jnp.any(mask, axis=tuple(range(1, mask.ndim)))

    return stateless_loss(name, fwd, bwd, counted, metrics or {}, check)


def opened(target: Any) -> tuple[Any, Any]:
    """A target's values and its mask, None if it has none."""
    if not isinstance(target, Mapping):
        return target, None
    if target.keys() != {"target", "mask"} or target["mask"] is None:
        raise InputError("a target as an array, or {target: .., mask: ..}", describe(target), "give both, or the array")
    return target["target"], target["mask"]


def _readable(t: Any, mask: Any) -> np.ndarray:
    """The values of a target that its mask lets through; none where either is traced."""
    if not expect.is_concrete(t) or not (mask is None or expect.is_concrete(mask)):
        return np.zeros(0)
    values = np.asarray(t, np.float64)
    return values.reshape(-1) if mask is None else values[np.asarray(mask)]


def _entries(z: Array, target: Any) -> tuple[Array, Array, Array | None]:
    """Prediction and target in float32 or wider, zeros where the mask holds them back, and the mask."""
    t, mask = opened(target)
    if mask is not None:
        z, t = (lax.select(mask, a, jnp.zeros_like(a)) for a in (z, t))
    return z.astype(wide(z.dtype)), t.astype(wide(z.dtype)), mask


def mean(values: Array, mask: Array | None = None) -> Array:
    """[B, ..] to [B], over the entries that the mask lets through; 0 where those are none."""
    if mask is None:
        return jnp.mean(values.reshape(values.shape[0], -1), axis=1)
    kept = jnp.where(mask, values, 0.0)
    return jnp.sum(kept.reshape(kept.shape[0], -1), axis=1) / _count(mask, kept.dtype)


def spread(dy: Any, like: Array, mask: Array | None = None) -> Array:
    """The cotangent of `mean`: dy [B] divided by an example's entries, with axes to multiply [B, ..] by."""
    dy = expect.cotangent(dy, like.shape[:1], wide(like.dtype))
    count = prod(like.shape[1:]) if mask is None else _count(mask, dy.dtype)
    g = (dy / count).reshape((-1,) + (1,) * (like.ndim - 1))
    if mask is not None:
        g = jnp.where(mask, g, 0.0)
    return g


def _count(mask: Array, dtype: Any) -> Array:
    """How many entries of each example the mask lets through, at least 1."""
    count = jnp.sum(mask.reshape(mask.shape[0], -1), axis=1, dtype=jnp.int32)
    return jnp.maximum(count, 1).astype(dtype)


def times(factor: Array | float, a: Array) -> Array:
    """factor * a, where 0 times infinity is 0: the limit for a that grows while the factor is 0, or vanishes faster."""
    return factor * jnp.where((factor == 0) & jnp.isinf(a), 0.0, a)


def share_right(boundary: float) -> Callable[[Any, Any], Array]:
    """For each example the share of its entries, of those let through, on the right side: [z > 0] = [t > boundary]."""

    def accuracy(z, target):
        t, mask = opened(target)
        t = jnp.asarray(t)
        t = t if mask is None else lax.select(jnp.asarray(mask), t, jnp.zeros_like(t))
        return mean(((z > 0) == (t.astype(jnp.float32) > boundary)).astype(jnp.float32), mask)

    return accuracy
