"""Losses that are zero once a margin is kept.

With n the entries of an example and g = dy of that example:

    hinge     l = mean(max(0, 1 - t z))        dz = -g t [t z < 1] / n        dt = -g z [t z < 1] / n

With anchor a, positive p, negative n, the unit vectors u = (a - p) / |a - p|, v = (a - n) / |a - n|, and h = g [l > 0]:

    triplet   l = max(0, |a - p| - |a - n| + margin)        da = h (u - v)        dp = -h u        dn = h v

Residuals: z and t; a, p and n.
Numerics: in float32 for half precision. Slope 0 at the kinks: where the margin is just kept, and in triplet also where
two vectors are equal and have no direction between them. No square overflows or vanishes.
Infinite scores: hinge and its slopes have their limits, in which t z is 0 where t is 0; dt is infinite where the margin
is not kept. Triplet needs finite vectors and gives NaN for others: the limits of u and of |a - p| - |a - n| depend on
the path on which entries become infinite.
Source: Cortes and Vapnik 1995, "Support-vector networks"; Schroff et al. 2015, arXiv:1503.03832; Balntas et al. 2016,
"Learning local feature descriptors with triplets" (distances, not their squares).
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from funcnet._internal import expect
from funcnet._internal.errors import InputError, describe
from funcnet._internal.numerics import sum_dtype
from funcnet.layers.normalize import unit
from funcnet.losses.entries import of_entries, share_right, times
from funcnet.losses.loss import Loss, one_a_row, same_dtype, same_shape, silenced, stateless_loss
from funcnet.structure import constructor


@constructor
def hinge() -> Loss:
    """max(0, 1 - t z), the mean over the entries of an example: scores z [B, ..] to [B]; slope 0 at the kink t z = 1.

    Target: like the scores in shape, -1 or 1 as integers, or floats in [-1, 1] of their dtype. Others are refused where
    they can be read; labels 0 and 1 are converted by 2 * t - 1. With a mask for each entry: {"target": t, "mask": m}, m
    booleans like t; the mean is over the entries where m is True, and what the others hold, NaN included, has no
    influence. Metric: accuracy, the share of entries with [z > 0] = [t > 0]. Residuals: z and t.
    Source: Cortes and Vapnik 1995, "Support-vector networks".
    """

    def fits(z, t, values):
        if expect.is_floating(t):
            same_dtype(z, t)
        elif not jnp.issubdtype(t.dtype, jnp.signedinteger):
            raise InputError("targets -1 and 1, integers with a sign or floats", describe(t), "convert with 2 * t - 1")
        read = values()
        if np.any(np.abs(read) > 1 if expect.is_floating(t) else np.abs(read) != 1):
            received = f"values from {read.min()} to {read.max()}"
            raise InputError("targets -1 and 1", received, "convert labels 0 and 1 with 2 * t - 1")

    def f(z, t):
        margin = 1 - times(t, z)
        return jnp.where(margin <= 0, 0.0, margin)

    def df(z, t):
        kept = 1 - times(t, z) <= 0
        return jnp.where(kept, 0.0, -t), jnp.where(kept, 0.0, -z)

    return of_entries("hinge", f, df, fits, {"accuracy": share_right(0.0)})


@constructor
def triplet(margin: float = 1.0) -> Loss:
    """max(0, |a - p| - |a - n| + margin) over the last axis: anchor a and (positive, negative), all [.., D], to [..].

    The prediction is the anchor, the target the pair of a positive, which is to be nearer, and a negative. Where models
    make all three, loss and models are one layer: `fn.serial(fn.parallel(f, fn.parallel(g, h)), fn.triplet())`.

    Args:
        margin: by how much nearer the positive is to be; a positive number, in the unit of the distances.

    Target: a tuple (positive, negative), both like the anchor in shape and dtype. Residuals: all three.
    """
    margin = expect.positive(margin, "margin", "use the default, 1.0")

    def check(anchor: Any, others: Any) -> None:
        if not isinstance(others, tuple) or len(others) != 2:
            raise InputError("a target (positive, negative)", describe(others), "give the anchor both as a tuple")
        for other in others:
            same_shape(anchor, other)
            same_dtype(anchor, other)

    def differences(x):
        """Unit vectors [.., D] and distances [.., 1] from the positive, and from the negative, to the anchor."""
        anchor, positive, negative = (a.astype(sum_dtype(a.dtype)) for a in (x[0], *x[1]))
        return unit(anchor - positive), unit(anchor - negative)

    def value(near: Array, far: Array) -> Array:
        excess = (near - far)[..., 0] + margin
        return jnp.where(excess <= 0, 0.0, excess)

    def fwd(params, x):
        check(*x)
        (_, near), (_, far) = differences(x)
        return value(near, far), x

    def bwd(params, x, dy, contract):
        (u, near), (v, far) = differences(x)
        g = expect.cotangent(dy, near.shape[:-1], near.dtype)
        g, h = (a[..., None] for a in (g, (value(near, far) > 0).astype(g.dtype)))
        slopes = (h * (u - v), -h * u, h * v)
        danchor, dpositive, dnegative = ((g * silenced(g, d)).astype(x[0].dtype) for d in slopes)
        return {}, (danchor, (dpositive, dnegative))

    return stateless_loss("triplet", fwd, bwd, lambda others: one_a_row(others[0]), {}, check)
