"""Connectionist temporal classification: the likelihood of a sequence of labels, summed over all its alignments.

An alignment gives each of T steps a class or the blank; with repeats merged, and then blanks removed, it reads as the
labels l_1 .. l_N. The labels, with blanks around and between them, are the states s = 0 .. 2N, of class c_s. An
alignment is a walk that starts at s <= 1, ends at s >= 2N - 1, and in each step stays, moves on by one, or moves on by
two where a label follows a different one. With log p = log softmax(z), forward and backward in time:

    a_t(s) = log p_t(c_s) + log(e^a_{t-1}(s) + e^a_{t-1}(s-1) + [skip s] e^a_{t-1}(s-2))
    b_t(s) = log(e^{b_{t+1}(s) + log p_{t+1}(c_s)} + .. (s+1) + [skip s+2] .. (s+2))
    l      = -log(e^a_T(2N) + e^a_T(2N-1))

Backward, with g = dy of that example: the share of the alignments that is in state s at step t is

    r_t(s) = e^(a_t(s) + b_t(s) + l) = softmax over s of a_t + b_t
    dz_t   = g (softmax(z_t) - sum_s r_t(s) onehot(c_s))

Residuals: z [B, T, V], its maximum and log(sum(e^(z - max))) [B, T, 1], a [T, B, 2N + 1], l [B] and the target.  Why
these: `bwd` computes the backward variables b in one more scan over time, in which it reads a; no residual but z has
its size.
Numerics: in float32 for half precision, all in logarithms; states that cannot be reached have -inf. log p is
(z - max) - log(sum(e^(z - max))), so that an offset common to all logits of a step adds no rounding error. Every
log-sum is log1p(others), with the largest term, 1, kept apart from the others, so that a probability near 1 keeps its
digits. r is normalised at each step: with l, which may be in the thousands, it would take over the rounding error of l.
A value of weight g = 0 has a gradient of 0 even where it is infinite or NaN.
Source: Graves et al. 2006, "Connectionist temporal classification", section 4.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from funcnet._internal import expect
from funcnet._internal.errors import InputError, describe
from funcnet._internal.numerics import sum_dtype, whole
from funcnet._internal.sharding import scan, sharded_as
from funcnet.losses.loss import Loss, silenced, stateless_loss
from funcnet.structure import constructor

TARGET = ("labels", "label_lengths", "logit_lengths")


class CtcResiduals(NamedTuple):
    """Residuals of `ctc`: logits [B, T, V]; top and log_total [B, T, 1], a [T, B, 2N + 1], l [B], the target."""

    logits: Array
    top: Array
    log_total: Array
    log_a: Array
    loss: Array
    target: dict[str, Array]


class States(NamedTuple):
    """The states of each example's labels.

    Attributes:
        classes: [B, S], blank at even s.
        skip: [B, S], whether s can be reached from s - 2.
        last: [B, S], whether a walk may end at s.
        fits: [B], whether lengths and labels are in range.
    """

    classes: Array
    skip: Array
    last: Array
    fits: Array


@constructor
def ctc(*, blank: int = 0, zero_infinity: bool = False) -> Loss:
    """-log P(labels | logits) over all alignments: logits [B, T, V] to [B].

    Target, a dict of integers:

        labels          [B, N]   classes other than blank; entries after an example's own labels are ignored
        label_lengths   [B]      how many labels an example has, from 0 to N
        logit_lengths   [B]      how many steps count, from 0 to T; dz is 0 after them

    n labels of which r equal the one before them need n + r steps. Too few steps, and labels or lengths out of range,
    are refused where the target can be read. Under `jit`, too few steps give a loss of inf and a gradient of 0, since
    no alignment can be made likelier (PyTorch's gradient there is NaN); labels or lengths out of range give NaN. No
    metrics.

    Args:
        blank: the class that stands for no label.
        zero_infinity: whether a loss of inf becomes 0, as in PyTorch. Targets with too few steps are then not refused;
            their examples count in a mean, as they do in PyTorch.

    Raises:
        InputError: for logits and targets that do not fit, as above.
    """
    expect.flags(zero_infinity=zero_infinity)
    if not expect.is_whole(blank) or blank < 0:
        raise InputError("blank as a class number", f"{blank!r}", "use the default, 0")
    blank = int(blank)

    def check(logits, target):
        expect.float_array(logits, rank=3)
        if logits.ndim != 3 or blank >= logits.shape[-1]:
            remedy = "give logits [B, T, V]; V counts the blank"
            raise InputError(f"logits of three axes and a class {blank}", describe(logits), remedy)
        _structure(logits, target)
        if all(expect.is_concrete(target[name]) for name in TARGET):
            _values(logits.shape, {name: np.asarray(target[name]) for name in TARGET}, blank, zero_infinity)

    def states(shape, target):
        labels, n, t = (whole(target[name]).astype(jnp.int32) for name in TARGET)
        most = labels.shape[1]
        own = jnp.arange(most, dtype=jnp.int32)[None] < n[:, None]
        wrong = own & ((labels < 0) | (labels >= shape[2]) | (labels == blank))
        fits = (n >= 0) & (n <= most) & (t >= 0) & (t <= shape[1]) & ~jnp.any(wrong, axis=1)
        labels = jnp.where(own & ~wrong, labels, blank)
        # A blank before, between and after the labels; a row without labels has a single blank.
        classes = lax.pad(labels, np.int32(blank), [(0, 0, 0), (1, min(most, 1), 1)])
        s = jnp.arange(2 * most + 1, dtype=jnp.int32)[None]
        skip = (s >= 2) & (classes != blank) & (classes != _shifted(classes, 2, blank))
        last = (s == 2 * n[:, None]) | ((s == 2 * n[:, None] - 1) & (n[:, None] > 0))
        return States(classes, skip, last, fits), t

    def emitted(logits, top, log_total, classes):
        """log p_t(c_s) as [T, B, S]."""
        z = jnp.take_along_axis(logits.astype(top.dtype), classes[:, None], axis=2)
        return jnp.swapaxes(z - top - log_total, 0, 1)

    def fwd(params, x):
        logits, target = x
        check(logits, target)
        z = logits.astype(sum_dtype(logits.dtype))
        top = _highest(z, 2)
        log_total = _log_total(z - top, 2)[..., None]
        of, lengths = states(logits.shape, target)

        def step(a, each):
            t, log_p = each
            ways = a, _shifted(a, 1, -jnp.inf), jnp.where(of.skip, _shifted(a, 2, -jnp.inf), -jnp.inf)
            a = jnp.where((t < lengths)[:, None], log_p + _log_add(*ways), a)
            return a, a

        # Before the first step all walks are at the first blank, from which s = 0 and s = 1 can be reached.
        first = jnp.where(jnp.arange(of.classes.shape[1]) == 0, 0.0, -jnp.inf).astype(z.dtype)
        start = jnp.broadcast_to(first[None], of.classes.shape, out_sharding=sharded_as(logits, 1))
        each = jnp.arange(logits.shape[1], dtype=jnp.int32), emitted(logits, top, log_total, of.classes)
        end, log_a = scan(step, start, each)
        loss = -_log_sum(jnp.where(of.last, end, -jnp.inf), 1)
        # Where several alignments together have likelihood 1, the rounding of log p may bring it above 1.
        loss = jnp.where(of.fits, jnp.where(loss < 0, 0.0, loss), jnp.nan)
        value = jnp.where(jnp.isposinf(loss), 0.0, loss) if zero_infinity else loss
        return value, CtcResiduals(logits, top, log_total, log_a, loss, target)

    def bwd(params, residuals, dy, contract):
        logits, top, log_total, log_a, loss, target = residuals
        g = expect.cotangent(dy, loss.shape, loss.dtype)
        of, lengths = states(logits.shape, target)
        end = jnp.where(of.last, 0.0, -jnp.inf).astype(top.dtype)

        def step(b, each):
            t, log_p, a = each
            share = jnp.exp(a + b - _highest(a + b, 1))
            total = jnp.sum(share, axis=1, keepdims=True)
            share = share / jnp.where(total == 0, 1.0, total)
            after = b + log_p
            ways = after, _shifted(after, -1, -jnp.inf), _shifted(jnp.where(of.skip, after, -jnp.inf), -2, -jnp.inf)
            return jnp.where((t < lengths)[:, None], _log_add(*ways), end), share

        steps = jnp.arange(logits.shape[1], dtype=jnp.int32)
        _, shares = scan(step, end, (steps, emitted(logits, top, log_total, of.classes), log_a), reverse=True)
        softmax = jnp.exp(logits.astype(top.dtype) - top - log_total)
        examples = jnp.arange(logits.shape[0], dtype=jnp.int32)
        place = examples[:, None, None], steps[None, :, None], of.classes[:, None]
        slope = softmax.at[place].add(-jnp.swapaxes(shares, 0, 1), out_sharding=sharded_as(logits, 1))
        counted = (steps[None] < lengths[:, None]) & ~jnp.isinf(loss)[:, None]
        slope = jnp.where(of.fits[:, None, None], jnp.where(counted[..., None], slope, 0.0), jnp.nan)
        g = g[:, None, None]
        return {}, ((g * silenced(g, slope)).astype(logits.dtype), dict.fromkeys(TARGET))

    return stateless_loss("ctc", fwd, bwd, lambda target: jnp.ones(jnp.shape(target["label_lengths"]), bool), {}, check)


def _shifted(a: Array, by: int, fill: float) -> Array:
    """`a` shifted along its last axis: entry s moves to s + by, and vacated entries are `fill`."""
    pads = [(0, 0)] * (a.ndim - 1) + [(max(by, 0), max(-by, 0))]
    padded = jnp.pad(a, pads, constant_values=fill)
    return padded[..., : a.shape[-1]] if by > 0 else padded[..., -a.shape[-1] :]


def _log_sum(a: Array, axis: int) -> Array:
    """log sum e^a along an axis; where all entries are -inf it is -inf, with derivatives 0, not NaN."""
    top = _highest(a, axis)
    return _log_total(a - top, axis) + jnp.squeeze(top, axis)


def _log_total(a: Array, axis: int) -> Array:
    """log sum e^a where the largest a is 0, or all are -inf: log1p of the sum of all terms but one of the largest."""
    terms, largest = jnp.exp(a), a == 0
    others = jnp.sum(jnp.where(largest, terms - 1, terms), axis=axis)
    return _log_of_one_and(others + (jnp.sum(largest, axis=axis, dtype=a.dtype) - 1))


def _log_add(a: Array, b: Array, c: Array) -> Array:
    """log(e^a + e^b + e^c), entry by entry, computed as in `_log_sum`."""
    top = lax.stop_gradient(jnp.maximum(jnp.maximum(a, b), c))
    top = jnp.where(jnp.isneginf(top), 0.0, top)
    x, y, z = jnp.exp(a - top), jnp.exp(b - top), jnp.exp(c - top)
    without = jnp.where(a == top, y + z + (x - 1), jnp.where(b == top, x + z + (y - 1), x + y + (z - 1)))
    return _log_of_one_and(without) + top


def _log_of_one_and(others: Array) -> Array:
    """log(1 + others); -inf, with derivative 0, where all terms are 0 and `others` is therefore -1."""
    none = others == -1
    return jnp.where(none, -jnp.inf, jnp.log1p(jnp.where(none, 0.0, others)))


def _highest(a: Array, axis: int) -> Array:
    """The maximum along an axis, kept with size 1; a constant for derivatives, and 0 in place of -inf."""
    top = lax.stop_gradient(jnp.max(a, axis=axis, keepdims=True))
    return jnp.where(jnp.isneginf(top), 0.0, top)


def _structure(logits: Any, target: Any) -> None:
    """Refuse a target that is not a dict of integer arrays of the right shapes."""
    batch = logits.shape[0]
    wanted = f"a target {{labels: int[{batch}, N], label_lengths: int[{batch}], logit_lengths: int[{batch}]}}"
    if not isinstance(target, Mapping) or target.keys() != set(TARGET):
        raise InputError(wanted, describe(target), "give all three")
    for name, rank in zip(TARGET, (2, 1, 1), strict=True):
        a: Any = target[name]
        integer = expect.is_array(a) and jnp.issubdtype(a.dtype, jnp.integer)
        if not integer or a.ndim != rank or a.shape[0] != batch:
            raise InputError(wanted, f"{name}: {describe(a)}", "give integers, one row for each example")


def _values(shape: tuple[int, ...], target: Mapping[str, np.ndarray], blank: int, zero_infinity: bool) -> None:
    """Refuse labels and lengths out of range and, without `zero_infinity`, labels that need too many steps."""
    labels, n, t = (target[name].astype(np.int64) for name in TARGET)
    _, steps, classes = shape
    for name, lengths, most in (("label_lengths", n, labels.shape[1]), ("logit_lengths", t, steps)):
        if bad := np.flatnonzero((lengths < 0) | (lengths > most)).tolist():
            raise InputError(f"{name} from 0 to {most}", f"{lengths[bad[0]]} at index {bad[0]}", "correct the lengths")
    own = np.arange(labels.shape[1]) < n[:, None]
    wrong = own & ((labels < 0) | (labels >= classes) | (labels == blank))
    if wrong.any():
        where = tuple(int(i) for i in np.argwhere(wrong)[0])
        wanted = f"labels from 0 to {classes - 1} other than the blank, {blank}"
        raise InputError(wanted, f"label {labels[where]} at index {where}", "correct the labels, or their lengths")
    if zero_infinity:
        return
    again = own[:, 1:] & (labels[:, 1:] == labels[:, :-1])
    need = n + again.sum(axis=1)
    if short := np.flatnonzero(need > t).tolist():
        i = short[0]
        received = f"{t[i]} steps for {n[i]} labels with {need[i] - n[i]} repeats, at index {i}"
        remedy = "leave such examples out, give more steps, or use zero_infinity=True"
        raise InputError(f"at least {need[i]} steps: one a label, and a blank between equal ones", received, remedy)
