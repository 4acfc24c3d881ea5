"""Losses: layers over (prediction, target) that return one value an example, or one a position.

The training step owns the reduction: the weights of a mean, a mask or a loss scale are the cotangent that it feeds into
`bwd`. Values are float32, or float64 for a float64 prediction. A floating target gets a cotangent like any other
input; an integer target gets None. With p = prediction, t = target, n = entries of an example, g = dy of that example:

    cross_entropy          l = -sum_v q_v log softmax(p)_v       dp = g (softmax(p) sum_v q_v - q)
    binary_cross_entropy   l = mean(softplus(p) - p t)           dp = g (sigmoid(p) - t) / n        dt = -g p / n
    mse                    l = mean(r^2),  r = p - t             dp = g 2 r / n                     dt = -dp
    mae                    l = mean(|r|)                         dp = g sign(r) / n, 0 at r = 0     dt = -dp
    huber                  l = mean(h(r))                        dp = g clip(r, -delta, delta) / n  dt = -dp
    hinge                  l = mean(max(0, 1 - t p))             dp = -g t [t p < 1] / n  dt = -g p [t p < 1] / n
    focal                  l = mean(t P(p) + (1 - t) P(-p))      dp = g (t P'(p) - (1 - t) P'(-p)) / n
    kl_divergence          l = sum_v t_v (log t_v - p_v)         dp = -g t                dt = g (log t + 1 - p)
    cosine                 l = 1 - c,  c = <p / |p|, t / |t|>    dp = -g (t / |t| - c p / |p|) / |p|, dt likewise
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, nn

from funcnet import expect
from funcnet.expect import InputError, describe
from funcnet.factors import wide
from funcnet.layer import Layer, no_params, stateless
from funcnet.layers.normalize import unit, unit_pullback


def _per_example(target: Any) -> Array:
    return jnp.ones(jnp.shape(target)[:1], bool)


@dataclass(frozen=True, eq=False)
class Loss(Layer):
    """A layer over (prediction, target), and what a training step wants to know about its values.

    Attributes:
        counted: target -> a boolean for each value: whether it counts in a mean.
        metrics: name -> (prediction, target) -> one number for each value, to be averaged as the loss is.
        check: (prediction, target) raises `InputError` for shapes, dtypes and, where the target is not traced, values
            that do not fit. Only shape and dtype of the prediction are read.
    """

    counted: Callable[[Any], Array] = _per_example
    metrics: Mapping[str, Callable[[Any, Any], Array]] = field(default_factory=dict)
    check: Callable[[Any, Any], None] = lambda prediction, target: None


def as_loss(layer: Layer) -> Loss:
    """A layer over (prediction, target) with one value an example, as a `Loss` without metrics."""
    return layer if isinstance(layer, Loss) else Loss(**_fields(layer))


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
    if not 0 <= label_smoothing < 1:
        raise InputError("0 <= label_smoothing < 1", f"{label_smoothing}", "use 0 for plain labels")

    def check(logits, target):
        expect.float_array(logits)
        _labels(logits, target, ignore_index)

    def distribution(logits, target):
        """q [.., V], and for each value a factor: 1, 0 where ignored, NaN for a label out of range."""
        classes, dtype = logits.shape[-1], wide(logits.dtype)
        if expect.is_floating(target):
            q, factor = target.astype(dtype), jnp.ones((*target.shape[:-1], 1), dtype)
        else:
            label = (target if jnp.iinfo(target.dtype).bits >= 32 else target.astype(jnp.int32))[..., None]
            factor = jnp.where((label >= 0) & (label < classes), 1.0, jnp.nan).astype(dtype)
            if ignore_index is not None:
                factor = jnp.where(label == ignore_index, 0.0, factor)
            q = (label == jnp.arange(classes, dtype=label.dtype).reshape((1,) * (logits.ndim - 1) + (-1,))).astype(
                dtype
            )
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
        if expect.is_floating(target):
            return jnp.ones(target.shape[:-1], bool)
        return jnp.ones(target.shape, bool) if ignore_index is None else target != ignore_index

    def accuracy(logits, target):
        label = jnp.argmax(target, axis=-1) if expect.is_floating(target) else jnp.asarray(target)
        return jnp.argmax(logits, axis=-1).astype(jnp.int32) == label.astype(jnp.int32)

    return _loss("cross_entropy", fwd, bwd, counted, {"accuracy": accuracy}, check)


def _finite_where_zero(minus_log_p: Array, q: Array) -> Array:
    """-log p, but 0 for a masked class (-inf logits) that q does not ask for: 0 * inf would be NaN."""
    return jnp.where(jnp.isinf(minus_log_p) & (q == 0), 0.0, minus_log_p)


def _labels(logits: Any, target: Any, ignore_index: int | None) -> None:
    """Refuse labels of the wrong shape or dtype and, where they can be read, of a value out of range."""
    classes = logits.shape[-1]
    if not expect.is_array(target):
        raise InputError("labels as an array", describe(target), "convert them with jnp.asarray")
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
    if target.shape != logits.shape[:-1] or not jnp.issubdtype(target.dtype, jnp.integer):
        remedy = "give one integer for each row of logits"
        raise InputError(
            f"integer labels {list(logits.shape[:-1])} for logits {describe(logits)}", describe(target), remedy
        )
    if expect.is_concrete(target):
        labels = np.asarray(target)
        bad = (labels < 0) | (labels >= classes)
        if ignore_index is not None:
            bad &= labels != ignore_index
        if bad.any():
            where = tuple(int(i) for i in np.argwhere(bad)[0])
            received = f"label {labels[where]} at index {where}, and {int(bad.sum()) - 1} more"
            remedy = "correct the labels, widen the last layer, or name the value as ignore_index"
            raise InputError(
                f"labels from 0 to {classes - 1}, since the logits are {describe(logits)}", received, remedy
            )


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
        return _mean(t * nn.softplus(-z) + (1 - t) * nn.softplus(z)), x

    def bwd(params, x, dy, contract):
        z, t = (a.astype(wide(x[0].dtype)) for a in x)
        g = _spread(dy, z)
        dz = (g * (nn.sigmoid(z) - t)).astype(x[0].dtype)
        return {}, (dz, (-g * z).astype(x[1].dtype) if expect.is_floating(x[1]) else None)

    return _loss("binary_cross_entropy", fwd, bwd, _per_example, {"accuracy": _share_right(0.5)}, _binary)


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
        return _mean(ones * t * of_right(z) + zeros * (1 - t) * of_right(-z)), x

    def bwd(params, x, dy, contract):
        z, t = (a.astype(wide(x[0].dtype)) for a in x)
        g = _spread(dy, z)
        dz = (g * (ones * t * slope(z) - zeros * (1 - t) * slope(-z))).astype(x[0].dtype)
        dt = g * (ones * of_right(z) - zeros * of_right(-z))
        return {}, (dz, dt.astype(x[1].dtype) if expect.is_floating(x[1]) else None)

    return _loss("focal", fwd, bwd, _per_example, {"accuracy": _share_right(0.5)}, _binary)


def hinge() -> Loss:
    """max(0, 1 - t z), the mean over the entries of an example: scores z [B, ..] to [B]; slope 0 at the kink t z = 1.

    Target: like the scores in shape, -1 or 1 as integers, or floats in [-1, 1] of their dtype. Others are refused where
    they can be read: labels 0 and 1 become these by 2 * t - 1. Metric: accuracy, the share of entries with
    [z > 0] = [t > 0]. Residuals: z and t.
    Source: Cortes and Vapnik 1995, "Support-vector networks".
    """

    def check(z, t):
        _same_shape(z, t)
        if expect.is_floating(t):
            _same_dtype(z, t)
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
        return _mean(jnp.where(margin <= 0, 0.0, margin)), x

    def bwd(params, x, dy, contract):
        z, t = (a.astype(wide(x[0].dtype)) for a in x)
        g = jnp.where(1 - t * z <= 0, 0.0, -_spread(dy, z))
        return {}, ((g * t).astype(x[0].dtype), (g * z).astype(x[1].dtype) if expect.is_floating(x[1]) else None)

    return _loss("hinge", fwd, bwd, _per_example, {"accuracy": _share_right(0.0)}, check)


def kl_divergence() -> Loss:
    """sum_v t_v (log t_v - p_v) over the last axis: log-probabilities p and probabilities t, both [.., V], to [..].

    The divergence of the prediction from the target, KL(t | e^p); p comes from `log_softmax`. A t_v of 0 contributes
    nothing, whatever p_v, and the slope of t log t, infinite there, counts as 0: dt = -g p_v, or 0 for p_v = -inf.

    Target: like p in shape and dtype. Negative values are refused where they can be read. Residuals: p and t.
    Source: Kullback and Leibler 1951, "On information and sufficiency".
    """

    def check(p, t):
        _same_shape(p, t)
        _same_dtype(p, t)
        if expect.is_concrete(t) and np.any(np.asarray(t, np.float64) < 0):
            raise InputError("targets that are not negative", f"a least value of {np.min(t)}", "give probabilities")

    def widely(x):
        p, t = (a.astype(wide(a.dtype)) for a in x)
        return jnp.where(jnp.isneginf(p) & (t == 0), 0.0, p), t, jnp.log(jnp.where(t == 0, 1.0, t))

    def fwd(params, x):
        check(*x)
        p, t, log_t = widely(x)
        return jnp.sum(t * (log_t - p), axis=-1), x

    def bwd(params, x, dy, contract):
        p, t, log_t = widely(x)
        g = expect.cotangent(dy, p.shape[:-1], p.dtype)[..., None]
        dt = g * (log_t - p + jnp.where(t == 0, 0.0, 1.0))
        return {}, ((-g * t).astype(x[0].dtype), dt.astype(x[1].dtype))

    return _loss("kl_divergence", fwd, bwd, _per_row, {}, check)


def cosine() -> Loss:
    """1 - <p, t> / (|p| |t|) over the last axis: prediction p and target t, both [.., D], to [..].

    Where one of them is 0 and has no direction the loss is 1 and both gradients are 0. No square overflows or vanishes.
    Target: like p in shape and dtype. Residuals: p and t.
    """

    def check(p, t):
        _same_shape(p, t)
        _same_dtype(p, t)

    def fwd(params, x):
        check(*x)
        p, t = (unit(a)[0] for a in x)
        return 1 - jnp.sum(p * t, axis=-1), x

    def bwd(params, x, dy, contract):
        p, t = (unit(a) for a in x)
        g = expect.cotangent(dy, x[0].shape[:-1], p[0].dtype)[..., None]
        dp, dt = unit_pullback(*p, -g * t[0]), unit_pullback(*t, -g * p[0])
        return {}, (dp.astype(x[0].dtype), dt.astype(x[1].dtype))

    return _loss("cosine", fwd, bwd, _per_row, {}, check)


def mse() -> Loss:
    """Mean of (prediction - target)^2 over the entries of an example: [B, ..] to [B]. Residual: the difference."""
    return _regression("mse", jnp.square, lambda r: 2 * r)


def mae() -> Loss:
    """Mean of |prediction - target| over the entries of an example: [B, ..] to [B]; 0 at the kink. Residual: r."""
    return _regression("mae", lambda r: r * jnp.sign(r), jnp.sign)


def huber(delta: float = 1.0) -> Loss:
    """Mean over the entries of an example of r^2 / 2 for |r| <= delta, else delta (|r| - delta / 2): [B, ..] to [B].

    Args:
        delta: where the parabola turns into a line, positive; its unit is the target's.

    Residual: r = prediction - target. Source: Huber 1964, "Robust estimation of a location parameter".
    """
    if not delta > 0:
        raise InputError("a positive delta", f"delta={delta}", "use the default, 1.0")

    def f(r):
        inside = jnp.abs(r) <= delta
        return jnp.where(inside, 0.5 * jnp.square(jnp.where(inside, r, 0.0)), delta * (jnp.abs(r) - 0.5 * delta))

    return _regression("huber", f, lambda r: jnp.clip(r, -delta, delta))


def _regression(name: str, f: Callable[[Array], Array], df: Callable[[Array], Array]) -> Loss:
    """The mean of f(prediction - target) over each example, df its derivative."""

    def check(prediction, target):
        _same_shape(prediction, target)
        _same_dtype(prediction, target)

    def fwd(params, x):
        check(*x)
        r = x[0] - x[1]
        return _mean(f(r.astype(wide(r.dtype)))), r

    def bwd(params, r, dy, contract):
        d = (_spread(dy, r) * df(r.astype(wide(r.dtype)))).astype(r.dtype)
        return {}, (d, -d)

    return _loss(name, fwd, bwd, _per_example, {}, check)


def _loss(name, fwd, bwd, counted, metrics, check) -> Loss:
    def paired(params, x):
        if not isinstance(x, tuple) or len(x) != 2:
            raise InputError("a pair (prediction, target)", describe(x), "give the loss both")
        return fwd(params, x)

    return Loss(**_fields(stateless(name, no_params, paired, bwd)), counted=counted, metrics=metrics, check=check)


def _fields(layer: Layer) -> dict[str, Any]:
    return {f.name: getattr(layer, f.name) for f in fields(Layer)}


def _mean(values: Array) -> Array:
    """[B, ..] to [B]."""
    return jnp.mean(values.reshape(values.shape[0], -1), axis=1)


def _spread(dy: Any, like: Array) -> Array:
    """The cotangent of `_mean`: dy [B] divided by an example's entries, with axes to multiply [B, ..] by."""
    dy = expect.cotangent(dy, like.shape[:1], wide(like.dtype))
    return (dy / prod(like.shape[1:])).reshape((-1,) + (1,) * (like.ndim - 1))


def _per_row(target: Any) -> Array:
    return jnp.ones(jnp.shape(target)[:-1], bool)


def _share_right(boundary: float) -> Callable[[Any, Any], Array]:
    """For each example the share of its entries that are on the right side: [z > 0] = [t > boundary]."""

    def accuracy(z, t):
        return _mean(((z > 0) == (jnp.asarray(t).astype(jnp.float32) > boundary)).astype(jnp.float32))

    return accuracy


def _binary(z: Any, t: Any) -> None:
    """Refuse targets that are not probabilities of the logits' shape, or numbers 0 and 1."""
    _same_shape(z, t)
    if expect.is_floating(t):
        _same_dtype(z, t)
    if expect.is_concrete(t):
        values = np.asarray(t, np.float64)
        if np.any((values < 0) | (values > 1)):
            raise InputError(
                "targets from 0 to 1", f"values from {values.min()} to {values.max()}", "give probabilities"
            )


def _same_shape(prediction: Any, target: Any) -> None:
    expect.float_array(prediction)
    if not expect.is_array(target) or target.shape != prediction.shape:
        remedy = "reshape one of them; shapes are never broadcast"
        raise InputError(f"a target of the prediction's shape, {list(prediction.shape)}", describe(target), remedy)


def _same_dtype(prediction: Any, target: Any) -> None:
    if expect.dtype(target) != expect.dtype(prediction):
        remedy = f"convert it with target.astype(jnp.{prediction.dtype})"
        raise InputError(f"a target of the prediction's dtype, {prediction.dtype}", describe(target), remedy)
