"""Losses of the angle between two vectors.

With u = p / |p|, v = t / |t| and g = dy of that row:

    cosine    l = 1 - <u, v> = |u - v|^2 / 2        dp = g (d - u <u, d>) / |p| with d = u - v        dt likewise

where d = -v, the slope of 1 - <u, v> in u, would give the same dp, since it differs from u - v only along u.

With u = a / |a|, v = b / |b| for B pairs (a_i, b_i), and S = u v^T / temperature [B, B]:

    contrastive    l_i = (log sum_j e^S_ij + log sum_j e^S_ji) / 2 - S_ii

the mean of two cross-entropies: one to find b_i for a_i among all b, one to find a_i for b_i among all a. With p_ij the
softmax over j of S_ij and q_ij that over i:

    dS_ij = (g_i p_ij + g_j q_ij) / 2 - [i = j] g_i        du = dS v / temperature        dv = dS^T u / temperature

and da = (du - u <u, du>) / |a|, db likewise. Every gradient depends on every g: an example has no loss of its own.

Residuals: p and t; a and b.
Numerics: in float32 for half precision; lengths are computed from x / max |x|, so no square overflows or vanishes.
u - v keeps correct digits for vectors so near in direction that 1 - <u, v> has none left, or is negative. The largest
cosine of a row is subtracted before the division by the temperature, so that no error is added to the cosines' own
rounding, and l_i is not negative either. A value of cosine of weight g = 0 has a gradient of 0 even where it is NaN.
Vectors must be finite: x / |x| has no limit as entries grow, and the results are NaN.
Source: van den Oord et al. 2018, arXiv:1807.03748 (InfoNCE); Radford et al. 2021, arXiv:2103.00020 (both directions).
"""

from typing import Any

import jax.numpy as jnp
from jax import lax, nn

from funcnet._internal import expect
from funcnet._internal.errors import InputError, describe
from funcnet.gradients.contraction import refuse_single_examples
from funcnet.layers.normalize import unit, unit_pullback
from funcnet.losses.loss import Loss, one_a_row, one_an_example, same_dtype, same_shape, silenced, stateless_loss
from funcnet.structure import constructor


@constructor
def cosine() -> Loss:
    """1 - <p, t> / (|p| |t|) over the last axis: prediction p and target t, both [.., D], to [..].

    Where p or t is 0 and has no direction the loss is 1 and both gradients are 0. No square overflows or vanishes.
    Target: like p in shape and dtype. Residuals: p and t.
    """

    def check(p, t):
        same_shape(p, t)
        same_dtype(p, t)

    def fwd(params, x):
        check(*x)
        (p, p_length), (t, t_length) = (unit(a) for a in x)
        half = jnp.sum(jnp.square(p - t), axis=-1) / 2
        return jnp.where(((p_length == 0) | (t_length == 0))[..., 0], 1.0, half), x

    def bwd(params, x, dy, contract):
        p, t = (unit(a) for a in x)
        g = expect.cotangent(dy, x[0].shape[:-1], p[0].dtype)[..., None]
        across = jnp.where((p[1] == 0) | (t[1] == 0), 0.0, p[0] - t[0])
        dp, dt = (g * silenced(g, unit_pullback(*a, d)) for a, d in ((p, across), (t, -across)))
        return {}, (dp.astype(x[0].dtype), dt.astype(x[1].dtype))

    return stateless_loss("cosine", fwd, bwd, one_a_row, {}, check)


@constructor
def contrastive(temperature: float = 0.07) -> Loss:
    """InfoNCE of B pairs, both ways: a [B, D] and b [B, D] to [B]; the others of the batch are the negatives.

    The cosines of all a_i with all b_j, divided by the temperature, are logits of two cross-entropies: b_i is to be
    found for a_i, and a_i for b_i; the value of a pair is their mean. A zero vector has cosine 0 with all, gradient 0.

    Where a model makes both, loss and model are one layer with a value for each pair:
    `fn.serial(fn.parallel(f, g), fn.contrastive())`.

    Since a pair's value depends on all others, no example has a gradient of its own: `fn.per_example` and
    `fn.squared_norm` are refused, also for the model in front. Each micro-batch (`accumulate`) has its own negatives.

    Args:
        temperature: positive; the smaller, the more the nearest negatives count.

    Target: b, like the prediction a in shape and dtype. No metrics.
    """
    temperature = expect.positive(temperature, "temperature", "use the default, 0.07")

    def check(a: Any, b: Any) -> None:
        same_shape(a, b)
        same_dtype(a, b)
        if len(a.shape) != 2:
            raise InputError("one vector an example, [B, D]", describe(a), "flatten the other axes")

    def fwd(params, x):
        check(*x)
        u, v = (unit(a)[0] for a in x)
        c = u @ v.T
        return (of_the_diagonal(c, 1) + of_the_diagonal(c, 0)) / 2, x

    def bwd(params, x, dy, contract):
        refuse_single_examples(contract)
        (u, a_length), (v, b_length) = (unit(a) for a in x)
        g = expect.cotangent(dy, u.shape[:1], u.dtype)
        c = u @ v.T
        by_row, by_column = g[:, None] * nn.softmax(shifted(c, 1), 1), g[None] * nn.softmax(shifted(c, 0), 0)
        ds = ((by_row + by_column) / 2 - jnp.diag(g)) / temperature
        da, db = unit_pullback(u, a_length, ds @ v), unit_pullback(v, b_length, ds.T @ u)
        return {}, (da.astype(x[0].dtype), db.astype(x[1].dtype))

    def of_the_diagonal(c, axis):
        """The cross-entropies along an axis, each with the entry on the diagonal as its label."""
        z = shifted(c, axis)
        return jnp.log(jnp.sum(jnp.exp(z), axis)) - jnp.diagonal(z)

    def shifted(c, axis):
        """S less its largest entries along an axis, from the cosines c."""
        return (c - lax.stop_gradient(jnp.max(c, axis, keepdims=True))) / temperature

    return stateless_loss("contrastive", fwd, bwd, one_an_example, {}, check)
