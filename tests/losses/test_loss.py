"""What all losses have in common: values, gradients, refusals; against optax, PyTorch, SciPy and NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special

import funcnet as fn
from funcnet._internal.numerics import sum_dtype
from funcnet.losses.loss import as_loss
from tests.losses.pairs import (
    BINARY,
    CROSS_ENTROPY,
    LABELS,
    LOG_P,
    LOGITS,
    OTHERS,
    REGRESSIONS,
    RNG,
    SIGNS,
    SMOOTHED,
    SOFT,
    Z,
    pull,
    refused,
    value,
)

S = jax.ShapeDtypeStruct

THEIRS = {
    "integer labels": (CROSS_ENTROPY, LABELS, optax.softmax_cross_entropy_with_integer_labels),
    "soft labels": (CROSS_ENTROPY, SOFT, optax.softmax_cross_entropy),
    "smoothing": (
        SMOOTHED,
        LABELS,
        lambda z, t: optax.softmax_cross_entropy(z, optax.smooth_labels(jax.nn.one_hot(t, 5, dtype=z.dtype), 0.1)),
    ),
    "smoothed soft labels": (
        fn.cross_entropy(label_smoothing=0.3),
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


@pytest.mark.parametrize("loss", [*REGRESSIONS, BINARY], ids=lambda loss: loss.name)
def test_one_value_an_example_the_mean_over_its_entries(loss):
    x = RNG.normal(size=(4, 2, 3)).astype(np.float32)
    values = value(loss, x, np.zeros_like(x))
    by_entry = value(loss, x.reshape(24), np.zeros(24, np.float32))
    np.testing.assert_allclose(values, by_entry.reshape(4, 6).mean(1), rtol=1e-6)


@pytest.mark.parametrize("loss", [*REGRESSIONS, CROSS_ENTROPY], ids=lambda loss: loss.name)
def test_nan_stays_nan_in_its_own_example(loss):
    x = np.array([[1.0, np.nan], [1.0, 2.0]], np.float32)
    values, dx, _ = pull(loss, x, np.array([0, 1]) if loss.name == "cross_entropy" else np.zeros_like(x))
    np.testing.assert_array_equal(np.isnan(values), [True, False])
    assert np.isnan(dx[0]).any()
    assert np.isfinite(dx[1]).all()


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
    np.testing.assert_allclose(got[0], wanted[0], rtol=1e-6)
    np.testing.assert_allclose(got[1].astype(jnp.float32), wanted[1], rtol=float(jnp.finfo(dtype).eps) * 2, atol=1e-6)


FAR = 6e4 * RNG.uniform(-1, 1, size=(6, 5))
ALL = {
    **{loss.name: (loss, FAR, -FAR[::-1]) for loss in (*REGRESSIONS, fn.cosine(), fn.contrastive(0.5))},
    "triplet": (fn.triplet(), FAR, (-FAR, FAR[::-1])),
    "binary_cross_entropy": (fn.binary_cross_entropy(pos_weight=3.0), FAR, SOFT),
    "focal": (fn.focal(), FAR, SOFT),
    "hinge": (fn.hinge(), FAR, np.sign(-FAR)),
    "kl_divergence": (fn.kl_divergence(), -np.abs(FAR), SOFT),
    "cross_entropy": (CROSS_ENTROPY, FAR, SOFT),
}


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("name", ALL)
def test_nothing_is_computed_in_half_precision_on_the_way_to_a_value(name, dtype):
    loss, *x = ALL[name]
    x = jax.tree.map(lambda a: np.asarray(a, dtype), x)
    values = value(loss, *x)
    with jax.enable_x64(True):
        wanted = value(loss, *jax.tree.map(np.float64, x))
    assert values.dtype == jnp.float32
    np.testing.assert_allclose(values, wanted, rtol=3e-6, atol=1e-6)


# name: (what makes the loss of a number, of which a float32 and an integer are equal, its target)
OF_A_NUMBER = {
    "huber": (fn.huber, SOFT),
    "focal, gamma": (fn.focal, SOFT),
    "focal, alpha": (lambda alpha: fn.focal(1.0, alpha=alpha), SOFT),
    "binary_cross_entropy, pos_weight": (lambda w: fn.binary_cross_entropy(pos_weight=w), SOFT),
    "binary_cross_entropy, pos_weights": (lambda w: fn.binary_cross_entropy(pos_weight=np.full(5, w)), SOFT),
    "contrastive": (fn.contrastive, SOFT),
    "triplet": (fn.triplet, (SOFT, -SOFT)),
}


@pytest.mark.parametrize("x64", [False, True])
@pytest.mark.parametrize("name", OF_A_NUMBER)
def test_numbers_of_numpy_and_jax_are_options_like_pythons(name, x64, standard_promotion):
    make, target = OF_A_NUMBER[name]
    with jax.enable_x64(x64):
        for dtype in (jnp.bfloat16, jnp.float32, *([jnp.float64] if x64 else [])):
            shapes = jax.tree.map(lambda a, dtype=dtype: S(a.shape, dtype), (LOGITS, target))
            types = [sum_dtype(dtype), *[dtype for _ in jax.tree.leaves(shapes)]]
            for kind in (np.float32, np.float64, np.int64, jnp.float32, jnp.asarray):
                got = jax.eval_shape(lambda p, t, loss=make(kind(1)): pull.__wrapped__(loss, p, t), *shapes)
                assert [a.dtype for a in jax.tree.leaves(got)] == types
        x = jax.tree.map(np.float32, (LOGITS, target))
        values = [value(make(number), *x) for number in (0.5, np.float16(0.5), np.float64(0.5), jnp.float32(0.5))]
        assert all(np.array_equal(values[0], other) for other in values[1:])


@pytest.mark.parametrize("name", OF_A_NUMBER)
@pytest.mark.parametrize("bad", [True, "1", 1j])
def test_what_is_no_real_number_is_no_option(name, bad):
    with pytest.raises(fn.InputError, match="number"):
        OF_A_NUMBER[name][0](bad)


def test_float64_predictions_give_float64_values(x64):
    assert value(CROSS_ENTROPY, LOGITS, LABELS).dtype == value(fn.mse(), LOGITS, SOFT).dtype == jnp.float64


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
        lambda: fn.cross_entropy(label_smoothing=-0.1),
        lambda: fn.cross_entropy(label_smoothing=1.0),
        lambda: fn.huber(0),
        lambda: fn.huber(-1.0),
        lambda: fn.huber(float("nan")),
        lambda: fn.huber(float("inf")),
        lambda: fn.focal(float("inf")),
        lambda: fn.focal(-0.1),
        lambda: fn.focal(alpha=1.1),
    ],
)
def test_options_out_of_range_are_refused(make):
    with pytest.raises(fn.InputError):
        make()


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


def test_values_are_those_of_numpy_and_scipy(x64):
    s = scipy.special.expit(LOGITS)
    wanted = -SOFT * (1 - s) ** 2 * np.log(s) - (1 - SOFT) * s**2 * np.log1p(-s)
    np.testing.assert_allclose(value(fn.focal(), LOGITS, SOFT), wanted.mean(1), rtol=1e-12)
    np.testing.assert_allclose(value(fn.hinge(), LOGITS, SIGNS), np.maximum(0, 1 - SIGNS * LOGITS).mean(1), rtol=1e-12)
    wanted = scipy.special.rel_entr(SOFT, np.exp(LOG_P)).sum(1)
    np.testing.assert_allclose(value(fn.kl_divergence(), LOG_P, SOFT), wanted, rtol=1e-11)
    product = (LOGITS * SOFT).sum(1) / np.linalg.norm(LOGITS, axis=1) / np.linalg.norm(SOFT, axis=1)
    np.testing.assert_allclose(value(fn.cosine(), LOGITS, SOFT), 1 - product, rtol=1e-12)


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


def focal_of_pytorch(torch, z, t, gamma, alpha):
    s = torch.sigmoid(z)
    right = s * t + (1 - s) * (1 - t)
    weight = 1 if alpha is None else alpha * t + (1 - alpha) * (1 - t)
    return (weight * (1 - right) ** gamma * -torch.log(right)).mean(-1)


ZEROS_AND_ONES = (SIGNS + 1) / 2


def torch_cross_entropy(torch, z, t, **options):
    return torch.nn.functional.cross_entropy(z, t, reduction="none", **options)


# name: (loss, prediction, target, the same in PyTorch, whether its gradient in the target is compared as well)
TORCHS = {
    "cross_entropy": (fn.cross_entropy(), LOGITS, LABELS, torch_cross_entropy, False),
    "cross_entropy, smoothed, ignored": (
        fn.cross_entropy(label_smoothing=0.1, ignore_index=2),
        LOGITS,
        LABELS,
        lambda torch, z, t: torch_cross_entropy(torch, z, t, label_smoothing=0.1, ignore_index=2),
        False,
    ),
    "cross_entropy, soft labels": (fn.cross_entropy(), LOGITS, SOFT, torch_cross_entropy, True),
    "cross_entropy, smoothed soft labels": (
        fn.cross_entropy(label_smoothing=0.2),
        LOGITS,
        SOFT,
        lambda torch, z, t: torch_cross_entropy(torch, z, t, label_smoothing=0.2),
        True,
    ),
    "binary_cross_entropy": (
        fn.binary_cross_entropy(),
        LOGITS,
        SOFT,
        lambda torch, z, t: torch.nn.functional.binary_cross_entropy_with_logits(z, t, reduction="none").mean(-1),
        True,
    ),
    "mse": (
        fn.mse(),
        LOGITS,
        SOFT,
        lambda torch, p, t: torch.nn.functional.mse_loss(p, t, reduction="none").mean(-1),
        True,
    ),
    "mae": (
        fn.mae(),
        LOGITS,
        SOFT,
        lambda torch, p, t: torch.nn.functional.l1_loss(p, t, reduction="none").mean(-1),
        True,
    ),
    "huber": (
        fn.huber(0.7),
        LOGITS,
        SOFT,
        lambda torch, p, t: torch.nn.functional.huber_loss(p, t, reduction="none", delta=0.7).mean(-1),
        True,
    ),
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


@pytest.mark.parametrize(
    ("name", "dtype", "tolerance"),
    [*((name, "float64", 1e-10) for name in TORCHS), ("cross_entropy", "float32", 1e-5), ("cosine", "float32", 1e-5)],
)
def test_values_and_gradients_are_those_of_pytorch(name, dtype, tolerance, x64):
    torch = pytest.importorskip("torch")
    loss, prediction, target, theirs, in_the_target = TORCHS[name]
    target = target.astype(dtype if np.issubdtype(target.dtype, np.floating) else np.int64)
    p = torch.tensor(prediction.astype(dtype), requires_grad=True)
    t = torch.tensor(target, requires_grad=in_the_target)
    dy = np.linspace(-1, 2, 6).astype(dtype)
    wanted = theirs(torch, p, t)
    wanted.backward(torch.tensor(dy))
    values, dp, dt = pull(loss, prediction.astype(dtype), target, dy)
    assert values.dtype == dp.dtype == dtype
    np.testing.assert_allclose(values, wanted.detach().numpy(), rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(dp, p.grad.numpy(), rtol=tolerance, atol=tolerance)
    if in_the_target:
        np.testing.assert_allclose(dt, t.grad.numpy(), rtol=tolerance, atol=tolerance)
