"""Cross-entropy of logits, with integer or soft labels.

With p = softmax(z), q the label's distribution, times the class weights if there are any, and g = dy of that value:

    l = -sum_v q_v log p_v        dz = g (p sum_v q_v - q)        dq = -g log p

Residuals: z, and the maximum and sum of exponentials of each row; softmax is formed again in `bwd`.
Numerics: in float32 for half precision; the maximum is subtracted in every exponential. The logits of an ignored label
have no influence, and a value of weight g = 0 has a gradient of 0 even where it is infinite or NaN.
Source: Bridle 1990, "Probabilistic interpretation of feedforward classification network outputs"; label smoothing:
Szegedy et al. 2016, arXiv:1512.00567, section 7; class weights: as PyTorch's `CrossEntropyLoss`.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from funcnet._internal import expect
from funcnet._internal.errors import InputError, describe
from funcnet._internal.numerics import in_front, sum_dtype, whole
from funcnet._internal.sharding import sharded_as
from funcnet.losses.loss import Loss, silenced, stateless_loss
from funcnet.structure import constructor


class CrossEntropyResiduals(NamedTuple):
    """Residuals of `cross_entropy`: softmax = exp(logits - top) / total; top and total are [.., 1]."""

    logits: Array
    top: Array
    total: Array
    target: Array


@constructor
def cross_entropy(
    *,
    label_smoothing: float = 0.0,
    ignore_index: int | None = None,
    class_weights: Sequence[float] | np.ndarray | Array | None = None,
) -> Loss:
    """-sum_v w_v q_v log softmax(logits)_v over the last axis of logits [.., V]: one value for each entry of [..].

    q is the one-hot vector of an integer label, or the soft label itself, mixed with the uniform distribution:
    q <- (1 - s) q + s / V. With top = max_v z_v and total = sum_v exp(z_v - top), -log softmax_v is
    log(total) - (z_v - top), which does not overflow as long as z_v - top does not; -inf logits are masked classes. A
    logit of +inf takes all of softmax: the loss tends to 0 for its class and to infinity for others. Several such
    logits share it, though the limit depends on the path; a row of -inf alone has no limit, and gives NaN.

    Residuals: logits, top, total, target.  Why these: softmax is formed again in `bwd` from the logits, so that a
    half-precision model keeps its logits in half precision and loses nothing in softmax - q, which cancels.

    Args:
        label_smoothing: s, 0 <= s < 1. A positive s gives every class a probability in the target, so a masked class
            (a logit of -inf) makes the loss infinite, unless its weight is 0.
        ignore_index: integer labels of this value have loss 0 and do not count in a mean. A value that the labels'
            dtype cannot represent, such as -1 for unsigned integers, matches no label.
        class_weights: w [V], finite and not negative; None for ones. As in PyTorch's `CrossEntropyLoss(weight=w)`, the
            mean over integer labels y is divided by the sum of their w_y, the mean over soft labels by their number.
            Metrics are not weighted.

    Target: integers [..] in [0, V), or floats [.., V], non-negative. Integer labels out of range are refused where they
    can be read; under `jit` they give NaN. Metric: accuracy.

    Source: Bridle 1990; label smoothing: Szegedy et al. 2016, arXiv:1512.00567, section 7; class weights: PyTorch.
    """
    label_smoothing = expect.fraction(label_smoothing, "label_smoothing", "use 0 for plain labels")
    ignore_index = ignored(ignore_index)
    class_weights = None if class_weights is None else expect.weights(class_weights, "class_weights")

    def check(logits, target):
        expect.float_array(logits)
        if class_weights is not None and len(class_weights) != logits.shape[-1]:
            wanted = f"logits of {len(class_weights)} classes, one for each of class_weights"
            raise InputError(wanted, describe(logits), "give a weight for each class")
        _labels(logits, target, ignore_index)

    def scores(logits, target):
        """The logits in the accumulation dtype, with 0 in place of those of an ignored label."""
        z = logits.astype(sum_dtype(logits.dtype))
        if ignore_index is None or expect.is_floating(target):
            return z
        return jnp.where(counts(target, ignore_index)[..., None], z, 0.0)

    def distribution(logits, target):
        """w q [.., V], and for each value a factor: 1, 0 where ignored, NaN for a label out of range."""
        classes, dtype = logits.shape[-1], sum_dtype(logits.dtype)
        if expect.is_floating(target):
            q, factor = target.astype(dtype), jnp.ones((*target.shape[:-1], 1), dtype)
        else:
            label = whole(target)[..., None]
            factor = standing(label, classes, ignore_index).astype(dtype)
            q = (label == in_front(jnp.arange(classes, dtype=label.dtype), logits.ndim)).astype(dtype)
        return weights(dtype, q.ndim) * ((1 - label_smoothing) * q + label_smoothing / classes), factor

    def weights(dtype, rank):
        """w, to be broadcast against arrays of `rank` axes with the classes on the last."""
        return 1.0 if class_weights is None else in_front(jnp.asarray(class_weights, dtype), rank)

    def fwd(params, x):
        logits, target = x
        check(logits, target)
        z = scores(logits, target)
        top = jax.lax.stop_gradient(jnp.max(z, axis=-1, keepdims=True))
        shifted = _below(z, top)
        total = jnp.sum(jnp.exp(shifted), axis=-1, keepdims=True)
        q, factor = distribution(logits, target)
        terms = q * _finite_where_zero(jnp.log(total) - shifted, q)
        loss = jnp.where(factor == 0, 0.0, factor * jnp.sum(terms, axis=-1, keepdims=True))
        return loss[..., 0], CrossEntropyResiduals(logits, top, total, target)

    def bwd(params, residuals, dy, contract):
        logits, top, total, target = residuals
        floating = expect.is_floating(target)
        dy = expect.cotangent(dy, logits.shape[:-1], top.dtype)[..., None]
        shifted = _below(scores(logits, target), top)
        q, factor = distribution(logits, target)
        g = jnp.where(factor == 0, 0.0, dy * silenced(dy, factor))
        mass = jnp.sum(q, axis=-1, keepdims=True) if floating or class_weights is not None else 1.0
        silent = (g == 0) & ~(jnp.isfinite(top) & jnp.isfinite(mass / total))  # where both are finite, so is dlogits
        dlogits = jnp.where(silent, 0.0, g * (jnp.exp(shifted) / total * mass - q))
        w = weights(top.dtype, logits.ndim)
        dtarget = (1 - label_smoothing) * dy * silenced(dy, w * _finite_where_zero(jnp.log(total) - shifted, q))
        return {}, (dlogits.astype(logits.dtype), dtarget.astype(target.dtype) if floating else None)

    def counted(target):
        return jnp.ones(target.shape[:-1], bool) if expect.is_floating(target) else counts(target, ignore_index)

    def accuracy(logits, target):
        label = jnp.argmax(target, axis=-1) if expect.is_floating(target) else whole(jnp.asarray(target))
        return jnp.argmax(logits, axis=-1).astype(label.dtype) == label

    loss = stateless_loss("cross_entropy", fwd, bwd, counted, {"accuracy": accuracy}, check)
    return replace(loss, mass=label_mass(class_weights, ignore_index))


def _below(z: Array, top: Array) -> Array:
    """z - top, but 0 where z and top are both +inf."""
    at_infinity = jnp.isposinf(z)
    return jnp.where(at_infinity, 0.0, z) - jnp.where(at_infinity, 0.0, top)


def _finite_where_zero(minus_log_p: Array, q: Array) -> Array:
    """-log p, but 0 where it is infinite (a masked class, of logit -inf) and q is 0, since 0 * inf would be NaN."""
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
    """`index` as a label to be left out of a mean, if it is a whole number, or None."""
    if index is None:
        return None
    if not expect.is_whole(index):
        raise InputError("ignore_index as a whole number, or None", repr(index), "give the label, such as -1 or 0")
    return int(index)


def counts(label: Any, ignore_index: int | None) -> Array:
    """Which integer labels count; an `ignore_index` that their dtype cannot represent equals none of them."""
    held = jnp.iinfo(label.dtype)
    if ignore_index is None or not held.min <= ignore_index <= held.max:
        return jnp.ones(label.shape, bool)
    return label != np.asarray(ignore_index, label.dtype)


def standing(label: Array, classes: int, ignore_index: int | None) -> Array:
    """The factor of each integer label's value: 1, or 0 where the label is ignored, or NaN where it is out of range."""
    counted, wrong = counts(label, ignore_index), (whole(label) < 0) | (whole(label) >= classes)
    return jnp.where(counted & wrong, jnp.nan, counted.astype(jnp.float32))


def label_weights(class_weights: np.ndarray, label: Array, dtype: Any) -> Array:
    """The weight of each label's class; of a label out of range, that of the class nearest to it."""
    table = jnp.asarray(class_weights, dtype).at[whole(label)]
    return table.get(mode="clip", wrap_negative_indices=False, out_sharding=sharded_as(label, label.ndim))


def label_mass(class_weights: np.ndarray | None, ignore_index: int | None) -> Callable[[Any], Array] | None:
    """`Loss.mass` for class weights: the weight of the label's class, 1 for soft labels; None without weights.

    It is 1 for a label out of range, whose value is NaN, so that only a weight of 0 in the mean can hide it.
    """
    if class_weights is None:
        return None

    def mass(target):
        target = jnp.asarray(target)
        if expect.is_floating(target):
            return jnp.ones(target.shape[:-1], target.dtype)
        weights = label_weights(class_weights, target, jnp.result_type(float))
        factor = standing(target, len(class_weights), ignore_index).astype(weights.dtype)
        return jnp.where(jnp.isnan(factor), 1.0, factor * weights)

    return mass


def integer_labels(target: Any, shape: tuple[int, ...], classes: int, given: str, ignore_index: int | None) -> None:
    """Refuse labels that are not integers of this shape or, where they can be read, are out of range."""
    if not expect.is_array(target):
        raise InputError("labels as an array", describe(target), "convert them with jnp.asarray")
    if target.shape != shape or not jnp.issubdtype(target.dtype, jnp.integer):
        remedy = "give one integer for each row"
        raise InputError(f"integer labels {list(shape)} for {given}", describe(target), remedy)
    if expect.is_concrete(target):
        labels = np.asarray(target)
        with jax.ensure_compile_time_eval():  # labels that a traced function closes over can be read too
            bad = ((labels < 0) | (labels >= classes)) & np.asarray(counts(labels, ignore_index))
        if bad.any():
            remedy = "correct the labels, widen the last layer, or name the value as ignore_index"
            wanted = f"labels from 0 to {classes - 1}, for {given}"
            raise InputError(wanted, expect.first_of("label", bad, labels), remedy)
