"""Losses of binary targets: binary cross-entropy, and focal loss, in which predictions already right count less.

With s = sigmoid(z), n the entries of an example, g = dy of that example, w the weight of positives, and P as in
`focal`:

    binary_cross_entropy   l = mean(w t softplus(-z) + (1 - t) softplus(z))
                           dz = g ((1 - t) s - w t (1 - s)) / n        dt = g (w softplus(-z) - softplus(z)) / n
    focal                  l = mean(t P(z) + (1 - t) P(-z))
                           dz = g (t P'(z) - (1 - t) P'(-z)) / n       dt = g (P(z) - P(-z)) / n

Residuals: z and t.
Numerics: in float32 for half precision. Neither log s nor 1 - s is computed from s: with one exponential e = e^-|z|,

    softplus(z) = log1p(e) + max(z, 0)        s and 1 - s are 1 / (1 + e) and e / (1 + e), or the other way round
    l = mean((1 + (w - 1) t) log1p(e) + (w t if z < 0 else 1 - t) |z|)
    dt = g ((w - 1) log1p(e) + (w if z < 0 else -1) |z|) / n

Infinite logits: value and slopes are the limits of the formulas. Where such a logit is right, the value and dz are 0;
where it is wrong, or t is between 0 and 1, the value is infinite and dz is its constant limit, such as -g w t / n at
-infinity. dt is infinite, unless the term that grows has a weight of 0.
Source: Cox 1958, "The regression analysis of binary sequences"; Lin et al. 2017, arXiv:1708.02002.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, nn

from funcnet._internal import expect
from funcnet._internal.errors import InputError, describe
from funcnet._internal.numerics import in_front
from funcnet.losses.entries import of_entries, share_right, times
from funcnet.losses.loss import Loss, same_dtype
from funcnet.structure import constructor


@constructor
def binary_cross_entropy(*, pos_weight: float | Sequence[float] | np.ndarray | Array | None = None) -> Loss:
    """w t softplus(-z) + (1 - t) softplus(z), the mean over the entries of an example: logits z [B, ..] to [B].

    Equal to -w t log s - (1 - t) log(1 - s) with s = sigmoid(z), without forming s: safe for any z, also infinite ones.

    Args:
        pos_weight: w, not negative: a number for all entries, or [C] of them, one for each entry of the last axis of
            logits [B, .., C]; None for 1. Above 1 it trades precision for recall. As in PyTorch, the mean is still
            divided by the number of entries.

    Target: like the logits in shape, floats in [0, 1] of their dtype, or integers or booleans 0 and 1. Values out of
    range are refused where they can be read. With a mask for each entry: {"target": t, "mask": m}, m booleans like t;
    the mean is over the entries where m is True, and what the others hold, NaN included, has no influence.
    Metric: accuracy, the share of entries with [z > 0] = [t > 1/2]. Residuals: z and t.
    Source: Cox 1958; the weight: torch.nn.BCEWithLogitsLoss.
    """
    weight = _weight(1.0 if pos_weight is None else pos_weight)

    def of_positives(z: Array) -> Array:
        return in_front(jnp.asarray(weight, z.dtype), z.ndim)

    def f(z, t):
        w, far = of_positives(z), _magnitude(z)
        return (1 + (w - 1) * t) * jnp.log1p(jnp.exp(-far)) + times(jnp.where(z < 0, w * t, 1 - t), far)

    def df(z, t):
        w, far, below = of_positives(z), _magnitude(z), z < 0
        e = jnp.exp(-far)
        large = 1 / (1 + e)
        small = e * large
        dz = (1 - t) * jnp.where(below, small, large) - w * t * jnp.where(below, large, small)
        return dz, (w - 1) * jnp.log1p(e) + times(jnp.where(below, w, -1.0), far)

    def fits(z, t, values):
        _binary(z, t, values)
        if weight.ndim and (z.ndim < 2 or z.shape[-1:] != weight.shape):
            wanted = f"logits [B, .., {weight.size}] for a pos_weight [{weight.size}]"
            raise InputError(wanted, describe(z), "give a weight for each entry of the last axis, or one number")

    return of_entries("binary_cross_entropy", f, df, fits, {"accuracy": share_right(0.5)})


@constructor
def focal(gamma: float = 2.0, *, alpha: float | None = None) -> Loss:
    """Binary cross-entropy in which examples already right count less: the mean over entries, logits z [B, ..] to [B].

        l = t w P(z) + (1 - t) w' P(-z)        P(z) = (1 - s)^gamma (-log s),  s = sigmoid(z)

    With softplus(z) = -log(1 - s), P(z) = e^(-gamma softplus(z)) softplus(-z), and

        P'(z) = -e^(-gamma softplus(z)) (gamma s softplus(-z) + 1 - s)

    For every gamma, P and P' both tend to 0 as z tends to infinity, and to infinity and -1 as z tends to -infinity.

    Args:
        gamma: how much less they count, not negative; 0 gives `binary_cross_entropy`.
        alpha: w = alpha and w' = 1 - alpha are the weights of ones and zeros; None for w = w' = 1.

    Target, mask, metric and residuals: as for `binary_cross_entropy`. The loss is linear in a target between 0 and 1.
    Source: Lin et al. 2017, arXiv:1708.02002.
    """
    gamma = expect.not_negative(gamma, "gamma", "use the default, 2.0")
    alpha = None if alpha is None else expect.number(alpha, "alpha")
    if alpha is not None and not 0 <= alpha <= 1:
        raise InputError("alpha from 0 to 1, or None", f"alpha={alpha}", "use None for no weights")
    ones, zeros = (1.0, 1.0) if alpha is None else (alpha, 1 - alpha)

    def missing(z):
        """(1 - s)^gamma."""
        return jnp.exp(-times(gamma, nn.softplus(z)))

    def of_right(z):
        return missing(z) * nn.softplus(-z)

    def slope(z):
        return -missing(z) * (gamma * times(nn.sigmoid(z), nn.softplus(-z)) + nn.sigmoid(-z))

    def f(z, t):
        return times(ones * t, of_right(z)) + times(zeros * (1 - t), of_right(-z))

    def df(z, t):
        dz = ones * t * slope(z) - zeros * (1 - t) * slope(-z)
        return dz, times(ones, of_right(z)) - times(zeros, of_right(-z))

    return of_entries("focal", f, df, _binary, {"accuracy": share_right(0.5)})


def _magnitude(z: Array) -> Array:
    """|z|, with slope 1 at 0, where the slopes of the terms of |z| in a formula then add up to the right one."""
    return jnp.where(z < 0, -z, z)


def _weight(given: Any) -> np.ndarray:
    """`given`, a number or [C] of them, in float64, if none is negative or infinite."""
    if isinstance(given, Sequence) or (expect.is_array(given) and given.shape != ()):
        return expect.weights(given, "pos_weight")
    return np.asarray(expect.not_negative(given, "pos_weight", "use None for 1"))


def _binary(z: Any, t: Any, values: Callable[[], np.ndarray]) -> None:
    """Refuse targets that are neither probabilities in the logits' dtype nor integers or booleans 0 and 1."""
    if expect.is_floating(t):
        same_dtype(z, t)
    read = values()
    if np.any((read < 0) | (read > 1)):
        raise InputError("targets from 0 to 1", f"values from {read.min()} to {read.max()}", "give probabilities")
