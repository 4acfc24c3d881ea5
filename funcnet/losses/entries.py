"""Losses that treat each entry alone: the mean, over an example's entries, of a function of prediction and target.

With prediction z and target t [B, ..], m 1 where a mask lets an entry through and 0 elsewhere (1 without a mask), n the
sum of m over an example and g = dy of that example:

    l = sum(m f(z, t)) / n        dz = g m df/dz / n        dt = g m df/dt / n

A mask comes with the target, as {"target": t, "mask": m}, m booleans like t. Entries where m is False have no
influence, whatever they hold, NaN included: they are replaced by zeros before f is evaluated. An example whose mask
lets no entry through has value 0 and gradients 0, and does not count in a mean. With a mask the target's cotangent is
{"target": dt, "mask": None}.

Residuals: z and the target.
Numerics: half-precision predictions and targets are cast to float32 before anything is computed from them. Where the
cotangent is 0, a slope that is not finite counts as 0; f and df return 0 for 0 times infinity where that is the limit.
"""

from collections.abc import Callable, Mapping
from math import prod
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from funcnet._internal import expect
from funcnet._internal.errors import InputError, describe
from funcnet._internal.numerics import sum_dtype
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
        fits: (z, t, values) raises `InputError` for dtypes and values that do not fit. z and t have the same shape;
            values() returns the entries of t that the mask lets through, in float64, or none where they are traced.
        metrics: those of the loss; they receive the target as it was given, with its mask.
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
    """Prediction and target in float32 or wider, with zeros where the mask is False, and the mask."""
    t, mask = opened(target)
    if mask is not None:
        z, t = (lax.select(mask, a, jnp.zeros_like(a)) for a in (z, t))
    return z.astype(sum_dtype(z.dtype)), t.astype(sum_dtype(z.dtype)), mask


def mean(values: Array, mask: Array | None = None) -> Array:
    """The mean [B] of an example's values [B, ..] over the entries that the mask lets through; 0 if there are none."""
    if mask is None:
        return jnp.mean(values.reshape(values.shape[0], -1), axis=1)
    kept = jnp.where(mask, values, 0.0)
    return jnp.sum(kept.reshape(kept.shape[0], -1), axis=1) / _count(mask, kept.dtype)


def spread(dy: Any, like: Array, mask: Array | None = None) -> Array:
    """The VJP of `mean`: dy [B] divided by the number of an example's entries, shaped to multiply arrays [B, ..]."""
    dy = expect.cotangent(dy, like.shape[:1], sum_dtype(like.dtype))
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
    """factor * a with 0 * infinity = 0: the limit as a grows and the factor is 0, or tends to 0 faster than a grows."""
    return factor * jnp.where((factor == 0) & jnp.isinf(a), 0.0, a)


def share_right(boundary: float) -> Callable[[Any, Any], Array]:
    """A metric: of an example's entries that the mask lets through, the share for which [z > 0] = [t > boundary]."""

    def accuracy(z, target):
        t, mask = opened(target)
        t = jnp.asarray(t)
        t = t if mask is None else lax.select(jnp.asarray(mask), t, jnp.zeros_like(t))
        return mean(((z > 0) == (t.astype(jnp.float32) > boundary)).astype(jnp.float32), mask)

    return accuracy
