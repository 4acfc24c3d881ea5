"""Losses against optax, SciPy and NumPy in float64: values, gradients, extreme inputs, labels that do not fit."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special

import funcnet as fn
from funcnet.losses.loss import as_loss

S = jax.ShapeDtypeStruct
RNG = np.random.default_rng(0)
LOGITS = 3 * RNG.normal(size=(6, 5))
SOFT = scipy.special.softmax(RNG.normal(size=(6, 5)), axis=-1)
LABELS = np.array([0, 4, 2, 2, 1, 3])
CROSS_ENTROPY, SMOOTHED, BINARY = fn.cross_entropy(), fn.cross_entropy(0.1), fn.binary_cross_entropy()
REGRESSIONS = [fn.mse(), fn.mae(), fn.huber()]
SIGNS = np.sign(LOGITS + RNG.normal(size=(6, 5)))
LOG_P = scipy.special.log_softmax(LOGITS, axis=-1)
OTHERS = [fn.focal(), fn.hinge(), fn.kl_divergence(), fn.cosine()]


@partial(jax.jit, static_argnums=0)
def pull(loss, prediction, target, dy=None):
    """(values, the prediction's gradient, the target's gradient) for the cotangent dy, by default ones."""
    values, _, residuals = loss.fwd({}, (), (prediction, target), None)
    dparams, (dprediction, dtarget) = loss.bwd({}, residuals, jnp.ones_like(values) if dy is None else dy)
    assert dparams == {}
    return values, dprediction, dtarget


def value(loss, prediction, target):
    return pull(loss, prediction, target)[0]


def refused(loss, prediction, target, message):
    for call in (
        loss.fwd,
        lambda params, state, x, key: loss.apply(params, state, x),
        lambda p, s, x, k: loss.check(*x),
    ):
        with pytest.raises(fn.InputError, match=message):
            call({}, (), (prediction, target), None)


# Values and gradients against others

THEIRS = {
    "integer labels": (CROSS_ENTROPY, LABELS, optax.softmax_cross_entropy_with_integer_labels),
    "soft labels": (CROSS_ENTROPY, SOFT, optax.softmax_cross_entropy),
    "smoothing": (
        SMOOTHED,
        LABELS,
        lambda z, t: optax.softmax_cross_entropy(z, optax.smooth_labels(jax.nn.one_hot(t, 5, dtype=z.dtype), 0.1)),
    ),
    "smoothed soft labels": (
        fn.cross_entropy(0.3),
        SOFT,
        lambda z, t: optax.softmax_cross_entropy(z, optax.smooth_labels(t, 0.3)),
    ),
    "binary": (BINARY, SOFT, lambda z, t: optax.sigmoid_binary_cross_entropy(z, t).mean(-1)),
    "mse": (fn.mse(), SOFT, lambda p, t: optax.squared_error(p, t).mean(-1)),
    "mae": (fn.mae(), SOFT, lambda p, t: jnp.abs(p - t).mean(-1)),
    "huber": (fn.huber(), SOFT, lambda p, t: optax.huber_loss(p, t).mean(-1)),
    "huber, delta": (fn.huber(2.5), SOFT, lambda p, t: optax.huber_loss(p, t, delta=2.5).mean(-1)),
}


@pytest.mark.parametrize("name", THEIRS)
def test_values_and_gradients_are_those_of_optax(name, x64, standard_promotion):
    loss, target, theirs = THEIRS[name]
    z, dy = jnp.asarray(LOGITS), jnp.linspace(-1.0, 2.0, 6)
    floating = target is SOFT
    values, dz, dtarget = pull(loss, z, jnp.asarray(target), dy)
    wanted, pullback = jax.vjp(theirs, z, target) if floating else jax.vjp(lambda z: theirs(z, target), z)
    np.testing.assert_allclose(values, wanted, rtol=1e-12)
    np.testing.assert_allclose(dz, pullback(dy)[0], rtol=1e-11, atol=1e-14)
    if floating:
        np.testing.assert_allclose(dtarget, pullback(dy)[1], rtol=1e-11, atol=1e-14)
    else:
        assert dtarget is None


def test_regressions_against_their_formulas_in_numpy(x64):
    p, t = jnp.asarray(LOGITS), jnp.asarray(SOFT)
    r = LOGITS - SOFT
    np.testing.assert_allclose(value(fn.mse(), p, t), np.mean(r**2, 1), rtol=1e-13)
    np.testing.assert_allclose(value(fn.mae(), p, t), np.mean(np.abs(r), 1), rtol=1e-13)
    for delta in (0.5, 1.0, 3.0):
        wanted = np.mean(np.where(np.abs(r) <= delta, r**2 / 2, delta * (np.abs(r) - delta / 2)), 1)
        np.testing.assert_allclose(value(fn.huber(delta), p, t), wanted, rtol=1e-13)


@pytest.mark.parametrize("loss", [*REGRESSIONS, BINARY], ids=lambda loss: loss.name)
def test_one_value_an_example_the_mean_over_its_entries(loss):
    x = RNG.normal(size=(4, 2, 3)).astype(np.float32)
    values = value(loss, x, np.zeros_like(x))
    by_entry = value(loss, x.reshape(24), np.zeros(24, np.float32))
    np.testing.assert_allclose(values, by_entry.reshape(4, 6).mean(1), rtol=1e-6)


@pytest.mark.parametrize(
    ("loss", "r", "slope"),
    [
        (fn.mae(), [0.0, -0.0, 1e-30, -1e-30], [0, 0, 1, -1]),
        (fn.mae(), [3.0, -3.0, np.inf, -np.inf], [1, -1, 1, -1]),
        (fn.huber(2.0), [2.0, -2.0, 0.0, 1.5], [2, -2, 0, 1.5]),
        (fn.huber(2.0), [1e38, -1e38, np.inf, -np.inf], [2, -2, 2, -2]),
        (fn.mse(), [0.0, -1.0, 1e18, np.inf], [0, -2, 2e18, np.inf]),
    ],
)
def test_slopes_at_kinks_and_far_away(loss, r, slope):
    r = np.float32(r)
    values, dprediction, dtarget = pull(loss, r, np.zeros_like(r))
    np.testing.assert_array_equal(dprediction, np.float32(slope))
    np.testing.assert_array_equal(dtarget, -np.float32(slope))
    np.testing.assert_array_equal(np.isfinite(values), np.isfinite(r))


# Extreme logits


@pytest.mark.parametrize("scale", [1.0, 1e4, 1e38])
def test_cross_entropy_of_huge_logits_is_exact(scale):
    z = np.float32(scale) * np.array([[1, -1, 0.5], [-1, -1, 1], [0, 0, 0]], np.float32)
    labels = np.array([0, 1, 2])
    values, dz, _ = pull(CROSS_ENTROPY, z, labels)
    wide = z.astype(np.float64)
    np.testing.assert_allclose(values, scipy.special.logsumexp(wide, 1) - wide[range(3), labels], rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(dz, scipy.special.softmax(wide, 1) - np.eye(3)[labels], atol=1e-6)


def test_cross_entropy_of_masked_classes():
    """-inf logits are classes that cannot be: no loss, no gradient, and no NaN in the classes beside them."""
    z = np.array([[1.0, -np.inf, 2.0], [-np.inf, 3.0, -np.inf]], np.float32)
    values, dz, _ = pull(CROSS_ENTROPY, z, np.array([0, 1]))
    np.testing.assert_allclose(values, [np.log1p(np.e), 0], rtol=1e-6)
    p = 1 / (1 + np.e)
    np.testing.assert_allclose(dz, [[p - 1, 0, 1 - p], [0, 0, 0]], atol=1e-6)
    soft = np.array([[0.25, 0, 0.75], [0, 1, 0]], np.float32)
    assert all(np.isfinite(a).all() for a in pull(CROSS_ENTROPY, z, soft))


def test_cross_entropy_of_the_wrong_masked_class_is_infinite():
    assert value(CROSS_ENTROPY, np.array([[-np.inf, 0.0]], np.float32), np.array([0])) == np.inf


@pytest.mark.parametrize("loss", [*REGRESSIONS, CROSS_ENTROPY], ids=lambda loss: loss.name)
def test_nan_stays_nan_in_its_own_example(loss):
    x = np.array([[1.0, np.nan], [1.0, 2.0]], np.float32)
    values, dx, _ = pull(loss, x, np.array([0, 1]) if loss.name == "cross_entropy" else np.zeros_like(x))
    np.testing.assert_array_equal(np.isnan(values), [True, False])
    assert np.isnan(dx[0]).any()
    assert np.isfinite(dx[1]).all()


@pytest.mark.parametrize("z", [0.0, 1e4, -1e4, 1e38, -1e38])
@pytest.mark.parametrize("t", [0.0, 0.5, 1.0])
def test_binary_cross_entropy_of_huge_logits(z, t):
    values, dz, dt = pull(BINARY, np.array([z], np.float32), np.array([t], np.float32))
    z = np.float64(np.float32(z))
    np.testing.assert_allclose(values, np.logaddexp(0, -z) * t + np.logaddexp(0, z) * (1 - t), rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(dz, scipy.special.expit(z) - t, atol=1e-6)
    np.testing.assert_allclose(dt, -z, rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize(
    ("loss", "target"),
    [
        (CROSS_ENTROPY, LABELS),
        (CROSS_ENTROPY, SOFT),
        (BINARY, SOFT),
        (fn.mse(), SOFT),
        (fn.mae(), SOFT),
        (fn.huber(), SOFT),
    ],
    ids=["integer labels", "soft labels", "binary", "mse", "mae", "huber"],
)
def test_half_precision_predictions_give_float32_values_and_half_precision_gradients(loss, target, dtype):
    z = jnp.asarray(LOGITS, dtype)
    t = jnp.asarray(target, dtype) if target is SOFT else target
    got = pull(loss, z, t)
    wanted = pull(loss, z.astype(jnp.float32), t.astype(jnp.float32) if target is SOFT else t)
    half = jnp.dtype(dtype)
    assert [None if a is None else a.dtype for a in got] == [jnp.float32, half, half if target is SOFT else None]
    difference_is_rounded = loss.name in ("mse", "mae", "huber")
    np.testing.assert_allclose(
        got[0], wanted[0], rtol=float(jnp.finfo(dtype).eps) * 4 if difference_is_rounded else 1e-6
    )
    np.testing.assert_allclose(got[1].astype(jnp.float32), wanted[1], rtol=float(jnp.finfo(dtype).eps) * 2, atol=1e-6)


def test_cross_entropy_of_float16_logits_loses_nothing_in_softmax_minus_label():
    """A sure and right prediction: 1 - p is 2e-5, which float16 cannot tell from 0 when p is rounded first."""
    z = jnp.array([[11.0, 0.0]], jnp.float16)
    dz = pull(CROSS_ENTROPY, z, jnp.array([0]))[1]
    np.testing.assert_allclose(dz.astype(jnp.float32), [[-1 / (1 + np.exp(11)), 1 / (1 + np.exp(11))]], rtol=5e-3)


def test_float64_predictions_give_float64_values(x64):
    assert value(CROSS_ENTROPY, LOGITS, LABELS).dtype == value(fn.mse(), LOGITS, SOFT).dtype == jnp.float64


# Labels


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.int32, np.uint32, np.int64])
def test_labels_of_any_integer_dtype(dtype):
    loss, z, labels = SMOOTHED, np.float32(LOGITS), LABELS.astype(dtype)
    jax.tree.map(np.testing.assert_array_equal, pull(loss, z, labels), pull(loss, z, LABELS))
    np.testing.assert_array_equal(loss.apply({}, (), (z, labels)), loss.apply({}, (), (z, LABELS)))
    np.testing.assert_array_equal(loss.metrics["accuracy"](z, labels), LOGITS.argmax(1) == LABELS)


@pytest.mark.parametrize(("dtype", "label"), [(np.uint8, 255), (np.int8, 127), (np.int16, 299)])
def test_labels_in_a_narrow_dtype_reach_classes_beyond_it(dtype, label):
    z = np.zeros((1, 300), np.float32)
    _, dz, _ = pull(CROSS_ENTROPY, z, np.array([label], dtype))
    assert np.argmin(dz[0]) == label
    np.testing.assert_allclose(dz.sum(), 0, atol=1e-6)


@pytest.mark.parametrize(
    ("ignore", "dtype"),
    [
        (-100, np.int8),
        (-100, np.int32),
        (-100, np.uint8),
        (-1, np.uint32),
        (2, np.uint8),
        (2, np.int32),
        (300, np.int8),
    ],
)
def test_ignored_labels_have_loss_and_gradient_0_and_do_not_count(ignore, dtype):
    loss = fn.cross_entropy(label_smoothing=0.1, ignore_index=ignore)
    fits = np.iinfo(dtype).min <= ignore <= np.iinfo(dtype).max
    labels = LABELS.astype(dtype)
    if fits:
        labels[[1, 4]] = ignore
    ignored = labels.astype(int) == ignore
    assert ignored.any() == fits
    values, dz, _ = pull(loss, np.float32(LOGITS), labels)
    plain = pull(SMOOTHED, np.float32(LOGITS), np.where(ignored, 0, labels))
    np.testing.assert_array_equal(values, np.where(ignored, 0, plain[0]))
    np.testing.assert_array_equal(dz, np.where(ignored[:, None], 0, plain[1]))
    np.testing.assert_array_equal(loss.counted(labels), ~ignored)


@pytest.mark.parametrize("row", [[-np.inf, -np.inf, -np.inf], [np.nan, 0, 0], [np.inf, np.inf, 0]])
def test_an_ignored_label_keeps_bad_logits_out_of_the_loss_and_the_gradient(row):
    z = np.array([row, [1, 2, 3]], np.float32)
    values, dz, _ = pull(fn.cross_entropy(ignore_index=-1), z, np.array([-1, 0]))
    assert values[0] == 0
    np.testing.assert_array_equal(dz[0], np.zeros(3))


@pytest.mark.parametrize("label", [-1, 5, 100, -(2**31)])
def test_labels_out_of_range_are_refused_with_their_place_where_they_can_be_read(label):
    labels = LABELS.astype(np.int32).reshape(2, 3)
    labels[1, 0] = label
    refused(CROSS_ENTROPY, np.float32(LOGITS).reshape(2, 3, 5), labels, rf"label {label} at index \(1, 0\), and 0 more")
    refused(fn.cross_entropy(ignore_index=7), np.float32(LOGITS).reshape(2, 3, 5), labels, "from 0 to 4")


@pytest.mark.parametrize("label", [-1, 5, 100, -(2**31)])
def test_labels_out_of_range_under_jit_give_nan_in_their_own_value_and_gradient(label):
    labels = jnp.int32(LABELS).at[3].set(label)
    values, dz = jax.jit(lambda z, t: pull(SMOOTHED, z, t)[:2])(jnp.float32(LOGITS), labels)
    np.testing.assert_array_equal(np.isnan(values), np.arange(6) == 3)
    np.testing.assert_array_equal(np.isnan(dz).all(1), np.arange(6) == 3)
    np.testing.assert_array_equal(np.isnan(dz).any(1), np.arange(6) == 3)


Z = jnp.float32(LOGITS)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (jnp.int32(LABELS)[:5], r"integer labels \[6\]"),
        (jnp.int32(LABELS)[:, None], r"integer labels \[6\]"),
        (jnp.zeros((6, 5), jnp.int32), r"integer labels \[6\]"),
        (jnp.ones(6, bool), r"integer labels \[6\]"),
        (jnp.float32(LABELS), r"soft labels like the logits, float32\[6, 5\]"),
        (jnp.float32(SOFT)[:, :4], r"soft labels like the logits, float32\[6, 5\]"),
        (jnp.asarray(SOFT, jnp.bfloat16), r"soft labels like the logits, float32\[6, 5\]"),
        (jnp.float32(SOFT) - 0.5, "not negative"),
    ],
)
def test_cross_entropy_refuses_targets_that_do_not_fit(target, message):
    refused(CROSS_ENTROPY, Z, target, message)


@pytest.mark.parametrize("target", [None, 3, "label"])
def test_cross_entropy_says_so_of_what_is_no_array(target):
    with pytest.raises(fn.InputError, match="labels as an array"):
        CROSS_ENTROPY.check(Z, target)


@pytest.mark.parametrize("loss", [*REGRESSIONS, BINARY, *OTHERS], ids=lambda loss: loss.name)
@pytest.mark.parametrize(
    ("prediction", "target", "message"),
    [
        (Z, jnp.ones((6,)), r"the prediction's shape, \[6, 5\]"),
        (Z[:, 0], jnp.ones((6, 1)), r"the prediction's shape, \[6\]"),
        (Z, jnp.ones((6, 1)), r"the prediction's shape, \[6, 5\]"),
        (Z, jnp.ones((6, 5), jnp.bfloat16), "dtype"),
        (jnp.ones((6, 5), jnp.int32), jnp.ones((6, 5), jnp.int32), "floating"),
        (Z[:0], Z[:0], "not empty"),
    ],
)
def test_predictions_and_targets_that_do_not_fit_are_refused(loss, prediction, target, message):
    refused(loss, prediction, target, message)


@pytest.mark.parametrize("loss", REGRESSIONS, ids=lambda loss: loss.name)
def test_regressions_refuse_integer_targets(loss):
    refused(loss, Z, jnp.ones((6, 5), jnp.int32), "dtype, float32")


@pytest.mark.parametrize(
    "target",
    [jnp.full((6, 5), 1.5), jnp.full((6, 5), -0.1), jnp.full((6, 5), 2), jnp.full((6, 5), -1)],
    ids=["1.5", "-0.1", "2", "-1"],
)
def test_binary_cross_entropy_refuses_targets_that_are_no_probabilities(target):
    refused(BINARY, Z, target, "from 0 to 1")


@pytest.mark.parametrize(
    ("loss", "shape", "target"),
    [
        (CROSS_ENTROPY, (6, 5), LABELS),
        (SMOOTHED, (6, 5), SOFT),
        (BINARY, (6, 5), SOFT),
        *((loss, (6, 5), S((6, 5), jnp.float32)) for loss in [*REGRESSIONS, *OTHERS]),
    ],
    ids=["cross_entropy", "soft labels", "binary", *(loss.name for loss in [*REGRESSIONS, *OTHERS])],
)
def test_bwd_refuses_a_cotangent_of_another_shape_or_dtype(loss, shape, target):
    target = np.float32(SOFT) if target is SOFT else target
    x = S(shape, jnp.float32), jax.ShapeDtypeStruct(target.shape, jax.dtypes.canonicalize_dtype(target.dtype))
    values, _, residuals = jax.eval_shape(lambda x: loss.fwd({}, (), x, None), x)
    for dy in (S((*values.shape, 2), values.dtype), S(values.shape, jnp.bfloat16)):
        with pytest.raises(fn.InputError, match="cotangent"):
            jax.eval_shape(lambda residuals, dy: loss.bwd({}, residuals, dy), residuals, dy)


@pytest.mark.parametrize(
    "make",
    [
        lambda: fn.cross_entropy(-0.1),
        lambda: fn.cross_entropy(1.0),
        lambda: fn.huber(0),
        lambda: fn.huber(-1.0),
        lambda: fn.huber(float("nan")),
        lambda: fn.focal(-0.1),
        lambda: fn.focal(alpha=1.1),
    ],
)
def test_options_out_of_range_are_refused(make):
    with pytest.raises(fn.InputError):
        make()


# What a training step asks


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.int8, bool])
def test_binary_accuracy_is_the_share_of_entries_on_the_right_side(dtype):
    z = jnp.array([[1.0, -1.0], [2.0, 3.0], [0.0, -5.0]])
    t = jnp.array([[1, 1], [1, 1], [0, 0]]).astype(dtype)
    np.testing.assert_array_equal(BINARY.metrics["accuracy"](z, t), [0.5, 1, 1])


def test_accuracy_of_soft_labels_and_positions():
    accuracy = CROSS_ENTROPY.metrics["accuracy"]
    np.testing.assert_array_equal(accuracy(LOGITS, SOFT), LOGITS.argmax(1) == SOFT.argmax(1))
    labels = np.int32(LOGITS.argmax(1)).reshape(2, 3)
    assert accuracy(LOGITS.reshape(2, 3, 5), labels).all()
    assert not accuracy(LOGITS.reshape(2, 3, 5), (labels + 1) % 5).any()


@pytest.mark.parametrize(
    ("loss", "target", "shape"),
    [
        (fn.mse(), jnp.ones((6, 5)), (6,)),
        (BINARY, jnp.ones((6, 5)), (6,)),
        (CROSS_ENTROPY, jnp.int32(LABELS).reshape(2, 3), (2, 3)),
        (CROSS_ENTROPY, jnp.ones((2, 3, 5)), (2, 3)),
    ],
)
def test_every_value_counts_unless_it_is_ignored(loss, target, shape):
    counted = loss.counted(target)
    assert (counted.shape, counted.dtype) == (shape, bool)
    assert counted.all()


def test_a_layer_over_prediction_and_target_serves_as_a_loss():
    layer = fn.stateless(
        "cubic",
        lambda key, x: {},
        lambda p, x: (jnp.sum((x[0] - x[1]) ** 3, 1), x),
        lambda p, x, dy, contract: ({}, None),
    )
    loss = as_loss(layer)
    assert (loss.name, loss.metrics, loss.fwd) == ("cubic", {}, layer.fwd)
    assert loss.counted(jnp.ones((4, 2))).tolist() == [True] * 4
    assert loss.check(None, None) is None
    assert as_loss(loss) is loss


# focal, hinge, kl_divergence, cosine


def focal_of_pytorch(torch, z, t, gamma, alpha):
    s = torch.sigmoid(z)
    right = s * t + (1 - s) * (1 - t)
    weight = 1 if alpha is None else alpha * t + (1 - alpha) * (1 - t)
    return (weight * (1 - right) ** gamma * -torch.log(right)).mean(-1)


ZEROS_AND_ONES = (SIGNS + 1) / 2
# name: (loss, prediction, target, the same in PyTorch, whether its gradient in the target is compared as well)
TORCHS = {
    "focal": (
        fn.focal(),
        LOGITS,
        ZEROS_AND_ONES,
        lambda torch, z, t: focal_of_pytorch(torch, z, t, 2.0, None),
        False,
    ),
    "focal, weighted": (
        fn.focal(0.5, alpha=0.25),
        LOGITS,
        ZEROS_AND_ONES,
        lambda torch, z, t: focal_of_pytorch(torch, z, t, 0.5, 0.25),
        False,
    ),
    "hinge": (fn.hinge(), LOGITS, SIGNS, lambda torch, z, t: torch.clamp(1 - t * z, min=0).mean(-1), True),
    "kl_divergence": (
        fn.kl_divergence(),
        LOG_P,
        SOFT,
        lambda torch, p, t: torch.nn.functional.kl_div(p, t, reduction="none").sum(-1),
        True,
    ),
    "cosine": (
        fn.cosine(),
        LOGITS,
        SOFT,
        lambda torch, p, t: 1 - torch.nn.functional.cosine_similarity(p, t, dim=-1),
        True,
    ),
}


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float64", 1e-10)])
@pytest.mark.parametrize("name", TORCHS)
def test_values_and_gradients_are_those_of_pytorch(name, dtype, tolerance, x64):
    torch = pytest.importorskip("torch")
    loss, prediction, target, theirs, in_the_target = TORCHS[name]
    p, t = (torch.tensor(a.astype(dtype), requires_grad=True) for a in (prediction, target))
    dy = np.linspace(-1, 2, 6).astype(dtype)
    wanted = theirs(torch, p, t)
    wanted.backward(torch.tensor(dy))
    values, dp, dt = pull(loss, prediction.astype(dtype), target.astype(dtype), dy)
    assert values.dtype == dp.dtype == dt.dtype == dtype
    np.testing.assert_allclose(values, wanted.detach().numpy(), rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(dp, p.grad.numpy(), rtol=tolerance, atol=tolerance)
    if in_the_target:
        np.testing.assert_allclose(dt, t.grad.numpy(), rtol=tolerance, atol=tolerance)


def test_values_are_those_of_numpy_and_scipy(x64):
    s = scipy.special.expit(LOGITS)
    wanted = -SOFT * (1 - s) ** 2 * np.log(s) - (1 - SOFT) * s**2 * np.log1p(-s)
    np.testing.assert_allclose(value(fn.focal(), LOGITS, SOFT), wanted.mean(1), rtol=1e-12)
    np.testing.assert_allclose(value(fn.hinge(), LOGITS, SIGNS), np.maximum(0, 1 - SIGNS * LOGITS).mean(1), rtol=1e-12)
    wanted = scipy.special.rel_entr(SOFT, np.exp(LOG_P)).sum(1)
    np.testing.assert_allclose(value(fn.kl_divergence(), LOG_P, SOFT), wanted, rtol=1e-11)
    product = (LOGITS * SOFT).sum(1) / np.linalg.norm(LOGITS, axis=1) / np.linalg.norm(SOFT, axis=1)
    np.testing.assert_allclose(value(fn.cosine(), LOGITS, SOFT), 1 - product, rtol=1e-12)


def test_focal_without_gamma_is_binary_cross_entropy(x64):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-14),
        pull(fn.focal(0.0), LOGITS, SOFT),
        pull(BINARY, LOGITS, SOFT),
    )


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("z", [0.0, 1e4, -1e4, 1e38, -1e38])
def test_focal_of_huge_logits(gamma, z):
    values, dz, _ = pull(fn.focal(gamma), np.float32([[z], [z]]), np.float32([[0], [1]]))
    if z:
        np.testing.assert_allclose(values, np.maximum(np.float32([z, -z]), 0), rtol=1e-6)
        np.testing.assert_allclose(dz[:, 0], [z > 0, -float(z < 0)], atol=1e-6)
    assert np.isfinite(dz).all()


def test_hinge_has_slope_0_at_its_kink_and_takes_integers():
    z = np.float32([[1.0], [-1.0], [0.5], [2.0], [-3.0]])
    values, dz, dt = pull(fn.hinge(), z, np.int8([[1], [-1], [1], [1], [1]]))
    np.testing.assert_array_equal(values, [0, 0, 0.5, 0, 4])
    np.testing.assert_array_equal(dz[:, 0], [0, 0, -1, 0, -1])
    assert dt is None
    np.testing.assert_array_equal(
        fn.hinge().metrics["accuracy"](z, np.int8([[1], [-1], [-1], [1], [1]])), [1, 1, 0, 1, 0]
    )


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (np.zeros((6, 5), np.int32), "-1 and 1"),
        (np.full((6, 5), 2, np.int32), "-1 and 1"),
        (np.full((6, 5), -1.5, np.float32), "-1 and 1"),
        (np.ones((6, 5), bool), "with a sign"),
        (np.ones((6, 5), np.uint8), "with a sign"),
    ],
)
def test_hinge_refuses_targets_that_are_no_signs(target, message):
    refused(fn.hinge(), Z, target, message)


def test_kl_divergence_of_equals_is_0_and_of_classes_that_cannot_be_finite():
    values, dp, dt = pull(fn.kl_divergence(), np.log(np.float32(SOFT)), np.float32(SOFT))
    np.testing.assert_allclose(values, 0, atol=1e-6)
    np.testing.assert_allclose(dp, -SOFT, rtol=1e-6)
    np.testing.assert_allclose(dt, 1, atol=1e-5)
    p, t = np.log(np.float32([[0.5, 0.5, 1e-30]])), np.float32([[0.0, 1.0, 0.0]])
    p[0, 2] = -np.inf
    values, dp, dt = pull(fn.kl_divergence(), p, t)
    np.testing.assert_allclose(values, np.log(2), rtol=1e-6)
    np.testing.assert_array_equal(dp, [[0, -1, 0]])
    np.testing.assert_allclose(dt, [[np.log(2), 1 + np.log(2), 0]], rtol=1e-6)
    assert value(fn.kl_divergence(), p, np.roll(t, 1, axis=1)) == np.inf
    refused(fn.kl_divergence(), Z, -jnp.float32(SOFT), "not negative")


def test_cosine_has_no_direction_at_0_and_no_overflow_far_away():
    p = np.float32([[0, 0], [3, 4], [3e30, 4e30], [3e-30, 4e-30]])
    t = np.float32([[1, 2], [0, 0], [4e30, 3e30], [-3, -4]])
    values, dp, dt = pull(fn.cosine(), p, t)
    np.testing.assert_allclose(values, [1, 1, 0.04, 2], rtol=1e-5)
    assert not dp[:2].any()
    assert not dt[:2].any()
    assert all(np.isfinite(a).all() for a in (dp, dt))


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("loss", OTHERS, ids=lambda loss: loss.name)
def test_the_others_in_half_precision_are_float32_rounded(loss, dtype):
    p, t = jnp.asarray(LOG_P if loss.name == "kl_divergence" else LOGITS, dtype), jnp.asarray(SOFT, dtype)
    got, wanted = pull(loss, p, t), pull(loss, p.astype(jnp.float32), t.astype(jnp.float32))
    assert [a.dtype for a in got] == [jnp.float32, dtype, dtype]
    for a, b in zip(got, wanted, strict=True):
        np.testing.assert_allclose(a.astype(jnp.float32), b, rtol=2 * float(jnp.finfo(dtype).eps), atol=1e-6)


def test_kl_divergence_and_cosine_have_a_value_for_each_row():
    for loss in (fn.kl_divergence(), fn.cosine()):
        counted = loss.counted(jnp.ones((2, 3, 5)))
        assert counted.shape == value(loss, jnp.ones((2, 3, 5)), jnp.ones((2, 3, 5))).shape == (2, 3)
        assert counted.all()
