"""Losses of a yes or no: binary cross-entropy, and focal loss, which counts less what is right already.

With s = sigmoid(z), n the entries of an example, g = dy of that example, and P as in `focal`:

    binary_cross_entropy   l = mean(softplus(z) - z t)            dz = g (s - t) / n        dt = -g z / n
    focal                  l = mean(t P(z) + (1 - t) P(-z))       dz = g (t P'(z) - (1 - t) P'(-z)) / n

Residuals: z and t.
Numerics: in float32 for half precision; s is never formed where its logarithm is wanted.
Source: Cox 1958, "The regression analysis of binary sequences"; Lin et al. 2017, arXiv:1708.02002.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import nn

from funcnet import expect
from funcnet.arithmetic import wide
from funcnet.expect import InputError
from funcnet.losses.loss import Loss, mean, one_an_example, same_dtype, same_shape, share_right, spread, stateless_loss


def binary_cross_entropy() -> Loss:
    """t softplus(-z) + (1 - t) softplus(z), the mean over the entries of an example: logits z [B, ..] to [B].

    Equal to -t log s - (1 - t) log(1 - s) with s = sigmoid(z), without forming s: safe for any finite z.

    Target: like the logits in shape, floats in [0, 1] of their dtype, or integers or booleans 0 and 1. Values out of
    range are refused where they can be read. Metric: accuracy, the share of entries with [z > 0] = [t > 1/2].
    Residuals: z and t.
    """

    def fwd(params, x):
        _binary(*x)
        z, t = (a.astype(wide(x[0].dtype)) for a in x)
        return mean(t * nn.softplus(-z) + (1 - t) * nn.softplus(z)), x

    def bwd(params, x, dy, contract):
        z, t = (a.astype(wide(x[0].dtype)) for a in x)
        g = spread(dy, z)
        dz = (g * (nn.sigmoid(z) - t)).astype(x[0].dtype)
        return {}, (dz, (-g * z).astype(x[1].dtype) if expect.is_floating(x[1]) else None)

    return stateless_loss("binary_cross_entropy", fwd, bwd, one_an_example, {"accuracy": share_right(0.5)}, _binary)


def focal(gamma: float = 2.0, alpha: float | None = None) -> Loss:
    """Binary cross-entropy in which examples already right count less: the mean over entries, logits z [B, ..] to [B].

        l = t w P(z) + (1 - t) w' P(-z)        P(z) = (1 - s)^gamma (-log s),  s = sigmoid(z)

    With softplus(z) = -log(1 - s), P(z) = e^(-gamma softplus(z)) softplus(-z), and

        P'(z) = -e^(-gamma softplus(z)) (gamma s softplus(-z) + 1 - s)

    Args:
        gamma: how much less, not negative; 0 gives `binary_cross_entropy`.
        alpha: w = alpha and w' = 1 - alpha weigh ones and zeros; None for w = w' = 1.

    Target, metric and residuals: as for `binary_cross_entropy`. Linear in a target between 0 and 1.
    Source: Lin et al. 2017, arXiv:1708.02002.
    """
    if not gamma >= 0:
        raise InputError("a gamma that is not negative", f"gamma={gamma}", "use the default, 2.0")
    if alpha is not None and not 0 <= alpha <= 1:
        raise InputError("alpha from 0 to 1, or None", f"alpha={alpha}", "use None for no weights")
    ones, zeros = (1.0, 1.0) if alpha is None else (alpha, 1 - alpha)

    def of_right(z):
        return jnp.exp(-gamma * nn.softplus(z)) * nn.softplus(-z)

    def slope(z):
        return -jnp.exp(-gamma * nn.softplus(z)) * (gamma * nn.sigmoid(z) * nn.softplus(-z) + nn.sigmoid(-z))

    def fwd(params, x):
        _binary(*x)
        z, t = (a.astype(wide(x[0].dtype)) for a in x)
        return mean(ones * t * of_right(z) + zeros * (1 - t) * of_right(-z)), x

    def bwd(params, x, dy, contract):
        z, t = (a.astype(wide(x[0].dtype)) for a in x)
        g = spread(dy, z)
        dz = (g * (ones * t * slope(z) - zeros * (1 - t) * slope(-z))).astype(x[0].dtype)
        dt = g * (ones * of_right(z) - zeros * of_right(-z))
        return {}, (dz, dt.astype(x[1].dtype) if expect.is_floating(x[1]) else None)

    return stateless_loss("focal", fwd, bwd, one_an_example, {"accuracy": share_right(0.5)}, _binary)


def _binary(z: Any, t: Any) -> None:
    """Refuse targets that are not probabilities of the logits' shape, or numbers 0 and 1."""
    same_shape(z, t)
    if expect.is_floating(t):
        same_dtype(z, t)
    if expect.is_concrete(t):
        values = np.asarray(t, np.float64)
        if np.any((values < 0) | (values > 1)):
            raise InputError(
                "targets from 0 to 1", f"values from {values.min()} to {values.max()}", "give probabilities"
            )
