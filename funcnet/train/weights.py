"""How much each value of a loss counts in the mean of its batch, and a batch in the mean over several.

With the weights w_i, c_i = 1 if value i counts, else 0, and m_i = c_i or the loss's own mass, a mean over a batch is

    L = sum_i w_i c_i l_i / sum_i w_i m_i

Only ratios of the weights matter: they are first scaled by the power of two that brings the largest below 1, so that no
sum of them overflows.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from funcnet._internal.errors import InputError, describe
from funcnet._internal.expect import is_array, is_floating
from funcnet.losses.loss import Loss
from funcnet.train.batch import Batch, check_batch


def weighed(loss: Loss, targets: Any, weights: Any = None) -> tuple[Array, Array, Array]:
    """Each value's weight in the sum of the loss, w c, and what it adds to the divisor, w m, both times 2^-e; and e.

    If a weight is negative or not finite, both are NaN. e is the exponent of the largest weight of a value that counts.
    """
    counted = loss.counted(targets)
    each = mass(loss, targets).astype(jnp.result_type(float))
    if weights is None:
        return counted.astype(each.dtype), each, jnp.zeros((), jnp.int32)
    check_weights(counted.shape, weights)
    weights = jnp.asarray(weights).astype(each.dtype)
    fit, weights = jnp.all(may_weigh(weights)), jnp.where(counted, weights, 0.0)
    e = jnp.frexp(jnp.max(weights))[1]
    weights = jnp.where(fit, _times_power_of_two(weights, -e), jnp.nan)
    return weights * counted.astype(each.dtype), weights * each, e


def may_weigh(weights: Any) -> Any:
    """Which of these numbers can be a weight of a mean."""
    return (weights >= 0) & (weights < np.inf)


def _times_power_of_two(a: Array, n: Array) -> Array:
    """a 2^n: products, since `jnp.ldexp` has a wrong derivative at a = 0, and two, since one factor may overflow."""
    one = jnp.ones((), a.dtype)
    return a * jnp.ldexp(one, n // 2) * jnp.ldexp(one, n - n // 2)


def mass(loss: Loss, targets: Any) -> Array:
    """What each value of the loss adds to the divisor of a mean, where all weights are 1."""
    return loss.counted(targets) if loss.mass is None else loss.mass(targets)


def check_weights(shape: tuple[int, ...], weights: Any) -> None:
    """Refuse weights of a batch that are not floating or boolean, or not one for each value of the loss."""
    boolean = is_array(weights) and weights.dtype == bool
    if weights.shape != shape or not (boolean or is_floating(weights)):
        wanted = f"weights {list(shape)} in the batch, floating or boolean, one for each value of the loss"
        remedy = "give each value its own weight; convert integers with weights.astype(jnp.float32)"
        raise InputError(wanted, describe(weights), remedy)


class Share(NamedTuple):
    """How much the means of a batch count in means over several batches: the loss by its mass, metrics by its weight.

    Both are scaled by 2^-e.
    """

    mass: Any
    weight: Any
    e: Any


def share(loss: Loss, batch: Batch) -> Share:
    """sum(w m) and sum(w c) of a batch, scaled as its weights are."""
    _, targets, weights = check_batch(batch)
    counting, each, e = weighed(loss, targets, weights)
    return Share(jnp.sum(each), jnp.sum(counting), e)


def weighted(weights: Array, values: Array) -> Array:
    """sum(weights * values), where a weight of 0 silences any value, also one that is not finite."""
    weights = weights.astype(values.dtype)
    return jnp.sum(weights * jnp.where((weights == 0) & ~jnp.isfinite(values), 0.0, values))
