"""Cross-entropy of logits, with integer or soft labels.

With p = softmax(z), q the label's distribution and g = dy of that value:

    l = -sum_v q_v log p_v        dz = g (p sum_v q_v - q)        dq = -g log p

Residuals: z, and its row's maximum and sum of exponentials; softmax is formed again in `bwd`.
Numerics: in float32 for half precision; the maximum is taken out of every exponential.
Source: Bridle 1990, "Probabilistic interpretation of feedforward classification network outputs"; label smoothing:
Szegedy et al. 2016, arXiv:1512.00567, section 7.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from funcnet import expect
from funcnet.arithmetic import in_front, whole, wide
from funcnet.expect import InputError, describe
from funcnet.losses.loss import Loss, stateless_loss


class Softmax(NamedTuple):
    """Residuals of `cross_entropy`: softmax = exp(logits - top) / total; top and total are [.., 1]."""

    logits: Array
    top: Array
    total: Array
    target: Array


def cross_entropy(label_smoothing: float = 0.0, ignore_index: int | None = None) -> Loss:
    """-sum_v q_v log softmax(logits)_v over the last axis of logits [.., V]: one value for each entry of [..].

    q is the one-hot vector of an integer label, or the soft label itself, mixed with the uniform distribution:
    q <- (1 - s) q + s / V. With top = max_v z_v and total = sum_v exp(z_v - top), -log softmax_v is
    log(total) - (z_v - top), which does not overflow for any finite logits; -inf logits are masked classes.

    Residuals: logits, top, total, target.  Why these: softmax is formed again in `bwd` from the logits, so that a
    half-precision model keeps its logits in half precision and loses nothing in softmax - q, which cancels.

    Args:
        label_smoothing: s, 0 <= s < 1. A positive one asks for a share of every class, so a masked class (a logit of
            -inf) makes the loss infinite.
        ignore_index: integer labels of this value have loss 0 and do not count in a mean.

    Target: integers [..] in [0, V), or floats [.., V], non-negative. Integer labels out of range are refused where they
    can be read; under `jit` they give NaN. Metric: accuracy.

    Source: Bridle 1990; label smoothing: Szegedy et al. 2016, arXiv:1512.00567, section 7.
    """
    label_smoothing = expect.fraction(label_smoothing, "label_smoothing", "use 0 for plain labels")
    ignore_index = ignored(ignore_index)

    def check(logits, target):
        expect.float_array(logits)
        _labels(logits, target, ignore_index)

    def distribution(logits, target):
        """q [.., V], and for each value a factor: 1, 0 where ignored, NaN for a label out of range."""
        classes, dtype = logits.shape[-1], wide(logits.dtype)
        if expect.is_floating(target):
            q, factor = target.astype(dtype), jnp.ones((*target.shape[:-1], 1), dtype)
        else:
            label = whole(target)[..., None]
            factor = jnp.where((label >= 0) & (label < classes), 1.0, jnp.nan).astype(dtype)
            if ignore_index is not None:
                factor = jnp.where(label == ignore_index, 0.0, factor)
            q = (label == in_front(jnp.arange(classes, dtype=label.dtype), logits.ndim)).astype(dtype)
        return (1 - label_smoothing) * q + label_smoothing / classes, factor

    def fwd(params, x):
        logits, target = x
        check(logits, target)
        z = logits.astype(wide(logits.dtype))
        top = jax.lax.stop_gradient(jnp.max(z, axis=-1, keepdims=True))
        total = jnp.sum(jnp.exp(z - top), axis=-1, keepdims=True)
        q, factor = distribution(logits, target)
        terms = q * _finite_where_zero(jnp.log(total) - (z - top), q)
        loss = jnp.where(factor == 0, 0.0, factor * jnp.sum(terms, axis=-1, keepdims=True))
        return loss[..., 0], Softmax(logits, top, total, target)

    def bwd(params, residuals, dy, contract):
        logits, top, total, target = residuals
        floating = expect.is_floating(target)
        dy = expect.cotangent(dy, logits.shape[:-1], top.dtype)[..., None]
        shifted = logits.astype(top.dtype) - top
        q, factor = distribution(logits, target)
        mass = jnp.sum(q, axis=-1, keepdims=True) if floating else 1.0
        slope = jnp.exp(shifted) / total * mass - q
        dlogits = jnp.where(factor == 0, 0.0, factor * dy * slope)
        dtarget = (1 - label_smoothing) * dy * _finite_where_zero(jnp.log(total) - shifted, q)
        return {}, (dlogits.astype(logits.dtype), dtarget.astype(target.dtype) if floating else None)

    def counted(target):
        return jnp.ones(target.shape[:-1], bool) if expect.is_floating(target) else counts(target, ignore_index)

    def accuracy(logits, target):
        label = jnp.argmax(target, axis=-1) if expect.is_floating(target) else jnp.asarray(target)
        return jnp.argmax(logits, axis=-1).astype(jnp.int32) == label.astype(jnp.int32)

    return stateless_loss("cross_entropy", fwd, bwd, counted, {"accuracy": accuracy}, check)


def _finite_where_zero(minus_log_p: Array, q: Array) -> Array:
    """-log p, but 0 for a masked class (-inf logits) that q does not ask for: 0 * inf would be NaN."""
    return jnp.where(jnp.isinf(minus_log_p) & (q == 0), 0.0, minus_log_p)


def _labels(logits: Any, target: Any, ignore_index: int | None) -> None:
    """Refuse labels of the wrong shape or dtype and, where they can be read, of a value out of range."""
    classes = logits.shape[-1]
    if expect.is_floating(target):
        wanted = f"integer labels {list(logits.shape[:-1])} or soft labels like the logits, {describe(logits)}"
        if target.shape != logits.shape:
            raise InputError(wanted, describe(target), "convert class numbers with labels.astype(jnp.int32)")
        if expect.dtype(target) != expect.dtype(logits):
            raise InputError(wanted, describe(target), f"convert them with labels.astype(jnp.{logits.dtype})")
        if expect.is_concrete(target) and np.any(np.asarray(target, np.float64) < 0):
            raise InputError(
                "soft labels that are not negative", f"a least value of {np.min(target)}", "give probabilities"
            )
        return
    integer_labels(target, logits.shape[:-1], classes, f"logits {describe(logits)}", ignore_index)


def ignored(index: Any) -> int | None:
    """`index` if it is a label that may be left out of a mean, or None."""
    if index is None:
        return None
    if isinstance(index, bool) or not hasattr(index, "__index__"):
        raise InputError("ignore_index as a whole number, or None", repr(index), "give the label, such as -1 or 0")
    return int(index)


def counts(label: Array, ignore_index: int | None) -> Array:
    """Which integer labels count."""
    return jnp.ones(label.shape, bool) if ignore_index is None else whole(label) != ignore_index


def integer_labels(target: Any, shape: tuple[int, ...], classes: int, given: str, ignore_index: int | None) -> None:
    """Refuse labels that are no integers of this shape or, where they can be read, out of range."""
    if not expect.is_array(target):
        raise InputError("labels as an array", describe(target), "convert them with jnp.asarray")
    if target.shape != shape or not jnp.issubdtype(target.dtype, jnp.integer):
        remedy = "give one integer for each row"
        raise InputError(f"integer labels {list(shape)} for {given}", describe(target), remedy)
    if expect.is_concrete(target):
        labels = np.asarray(target)
        bad = (labels < 0) | (labels >= classes)
        if ignore_index is not None:
            bad &= labels != ignore_index
        if bad.any():
            where = tuple(int(i) for i in np.argwhere(bad)[0])
            received = f"label {labels[where]} at index {where}, and {int(bad.sum()) - 1} more"
            remedy = "correct the labels, widen the last layer, or name the value as ignore_index"
            raise InputError(f"labels from 0 to {classes - 1}, for {given}", received, remedy)
