"""Losses of the angle between two vectors.

With c = <p / |p|, t / |t|> and g = dy of that row:

    cosine    l = 1 - c        dp = -g (t / |t| - c p / |p|) / |p|, dt likewise

Residuals: p and t.
Numerics: in float32 for half precision; lengths are taken of x / max |x|, so no square overflows or vanishes.
"""

import jax.numpy as jnp

from funcnet import expect
from funcnet.layers.normalize import unit, unit_pullback
from funcnet.losses.loss import Loss, one_a_row, same_dtype, same_shape, stateless_loss


def cosine() -> Loss:
    """1 - <p, t> / (|p| |t|) over the last axis: prediction p and target t, both [.., D], to [..].

    Where one of them is 0 and has no direction the loss is 1 and both gradients are 0. No square overflows or vanishes.
    Target: like p in shape and dtype. Residuals: p and t.
    """

    def check(p, t):
        same_shape(p, t)
        same_dtype(p, t)

    def fwd(params, x):
        check(*x)
        p, t = (unit(a)[0] for a in x)
        return 1 - jnp.sum(p * t, axis=-1), x

    def bwd(params, x, dy, contract):
        p, t = (unit(a) for a in x)
        g = expect.cotangent(dy, x[0].shape[:-1], p[0].dtype)[..., None]
        dp, dt = unit_pullback(*p, -g * t[0]), unit_pullback(*t, -g * p[0])
        return {}, (dp.astype(x[0].dtype), dt.astype(x[1].dtype))

    return stateless_loss("cosine", fwd, bwd, one_a_row, {}, check)
