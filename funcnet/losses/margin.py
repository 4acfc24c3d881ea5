"""Losses that are zero once a margin is kept.

With n the entries of an example and g = dy of that example:

    hinge     l = mean(max(0, 1 - t z))        dz = -g t [t z < 1] / n        dt = -g z [t z < 1] / n

Residuals: z and t.
Numerics: in float32 for half precision. Slope 0 at the kink.
Source: Cortes and Vapnik 1995, "Support-vector networks".
"""

import jax.numpy as jnp
import numpy as np

from funcnet import expect
from funcnet.expect import InputError, describe
from funcnet.factors import wide
from funcnet.losses.loss import Loss, mean, one_an_example, same_dtype, same_shape, share_right, spread, stateless_loss


def hinge() -> Loss:
    """max(0, 1 - t z), the mean over the entries of an example: scores z [B, ..] to [B]; slope 0 at the kink t z = 1.

    Target: like the scores in shape, -1 or 1 as integers, or floats in [-1, 1] of their dtype. Others are refused where
    they can be read: labels 0 and 1 become these by 2 * t - 1. Metric: accuracy, the share of entries with
    [z > 0] = [t > 0]. Residuals: z and t.
    Source: Cortes and Vapnik 1995, "Support-vector networks".
    """

    def check(z, t):
        same_shape(z, t)
        if expect.is_floating(t):
            same_dtype(z, t)
        elif not jnp.issubdtype(t.dtype, jnp.signedinteger):
            raise InputError("targets -1 and 1, integers with a sign or floats", describe(t), "convert with 2 * t - 1")
        if expect.is_concrete(t):
            values = np.asarray(t, np.float64)
            if np.any(np.abs(values) > 1) or (not expect.is_floating(t) and np.any(values == 0)):
                received = f"values from {values.min()} to {values.max()}"
                raise InputError("targets -1 and 1", received, "convert labels 0 and 1 with 2 * t - 1")

    def fwd(params, x):
        check(*x)
        z, t = (a.astype(wide(x[0].dtype)) for a in x)
        margin = 1 - t * z
        return mean(jnp.where(margin <= 0, 0.0, margin)), x

    def bwd(params, x, dy, contract):
        z, t = (a.astype(wide(x[0].dtype)) for a in x)
        g = jnp.where(1 - t * z <= 0, 0.0, -spread(dy, z))
        return {}, ((g * t).astype(x[0].dtype), (g * z).astype(x[1].dtype) if expect.is_floating(x[1]) else None)

    return stateless_loss("hinge", fwd, bwd, one_an_example, {"accuracy": share_right(0.0)}, check)
