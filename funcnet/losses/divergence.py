"""The divergence of a prediction from a target distribution.

With log-probabilities p, probabilities t and g = dy of that row:

    l = sum_v t_v (log t_v - p_v)        dp = -g t        dt = g (log t + 1 - p)

Residuals: p and t.
Numerics: in float32 for half precision; 0 log 0 is 0. A value of weight g = 0 has a gradient of 0 even where it is
infinite or NaN.
Source: Kullback and Leibler 1951, "On information and sufficiency".
"""

import jax.numpy as jnp
import numpy as np

from funcnet._internal import expect
from funcnet._internal.errors import InputError
from funcnet._internal.numerics import sum_dtype
from funcnet.losses.loss import Loss, one_a_row, same_dtype, same_shape, silenced, stateless_loss
from funcnet.structure import constructor


@constructor
def kl_divergence() -> Loss:
    """sum_v t_v (log t_v - p_v) over the last axis: log-probabilities p and probabilities t, both [.., V], to [..].

    The divergence of the prediction from the target, KL(t | e^p); p comes from `log_softmax`. A t_v of 0 contributes
    nothing, whatever p_v, and the slope of t log t, infinite there, counts as 0: dt = -g p_v, or 0 for p_v = -inf.

    Target: like p in shape and dtype. Negative values are refused where they can be read. Residuals: p and t.
    Source: Kullback and Leibler 1951, "On information and sufficiency".
    """

    def check(p, t):
        same_shape(p, t)
        same_dtype(p, t)
        if expect.is_concrete(t) and np.any(np.asarray(t, np.float64) < 0):
            raise InputError("targets that are not negative", f"a least value of {np.min(t)}", "give probabilities")

    def widely(x):
        p, t = (a.astype(sum_dtype(a.dtype)) for a in x)
        return jnp.where(jnp.isneginf(p) & (t == 0), 0.0, p), t, jnp.log(jnp.where(t == 0, 1.0, t))

    def fwd(params, x):
        check(*x)
        p, t, log_t = widely(x)
        return jnp.sum(t * (log_t - p), axis=-1), x

    def bwd(params, x, dy, contract):
        p, t, log_t = widely(x)
        g = expect.cotangent(dy, p.shape[:-1], p.dtype)[..., None]
        dt = g * silenced(g, log_t - p + jnp.where(t == 0, 0.0, 1.0))
        return {}, ((-g * silenced(g, t)).astype(x[0].dtype), dt.astype(x[1].dtype))

    return stateless_loss("kl_divergence", fwd, bwd, one_a_row, {}, check)
