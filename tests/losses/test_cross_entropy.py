"""Cross-entropy: extreme and masked logits; labels of any dtype, ignored, out of range."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special

import funcnet as fn
from tests.losses.pairs import CROSS_ENTROPY, LABELS, LOGITS, SMOOTHED, SOFT, Z, pull, refused, value

INTEGERS = [np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64]
WEIGHTS = np.array([0.5, 2.0, 0.0, 1.0, 3.0])


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


def test_cross_entropy_of_float16_logits_loses_nothing_in_softmax_minus_label():
    """A sure and right prediction: 1 - p is 2e-5, which float16 cannot tell from 0 when p is rounded first."""
    z = jnp.array([[11.0, 0.0]], jnp.float16)
    dz = pull(CROSS_ENTROPY, z, jnp.array([0]))[1]
    np.testing.assert_allclose(dz.astype(jnp.float32), [[-1 / (1 + np.exp(11)), 1 / (1 + np.exp(11))]], rtol=5e-3)


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
        *((edge, dtype) for dtype in INTEGERS for edge in (np.iinfo(dtype).min, np.iinfo(dtype).max)),
        *((np.iinfo(dtype).max + 1, dtype) for dtype in INTEGERS),
        *((np.iinfo(dtype).min - 1, dtype) for dtype in INTEGERS),
    ],
)
@pytest.mark.usefixtures("x64")
def test_ignored_labels_have_loss_and_gradient_0_and_do_not_count(ignore, dtype):
    loss, head = (
        fn.cross_entropy(label_smoothing=0.1, ignore_index=ignore),
        fn.linear_cross_entropy(5, label_smoothing=0.1, ignore_index=ignore, use_bias=False),
    )
    labels = LABELS.astype(dtype)
    if fits := np.iinfo(dtype).min <= ignore <= np.iinfo(dtype).max:
        labels[[1, 4]] = ignore
    ignored = np.array([int(label) == ignore for label in labels])
    assert ignored.any() == fits
    loss.check(np.float32(LOGITS), labels)
    values, dz, _ = pull(loss, np.float32(LOGITS), labels)
    plain = pull(SMOOTHED, np.float32(LOGITS), np.where(ignored, 0, LABELS))
    np.testing.assert_array_equal(values, np.where(ignored, 0, plain[0]))
    np.testing.assert_array_equal(dz, np.where(ignored[:, None], 0, plain[1]))
    np.testing.assert_array_equal(loss.counted(labels), ~ignored)
    np.testing.assert_array_equal(head.counted(labels), ~ignored)
    right = loss.metrics["accuracy"](LOGITS, labels)
    np.testing.assert_array_equal(right[~ignored], (LOGITS.argmax(1) == LABELS)[~ignored])
    kernel, ones = {"kernel": np.eye(5, dtype=np.float32)}, np.ones(6, np.float32)
    of_head, (_, (dx, _)) = jax.jit(lambda t: head.at_once(kernel, (np.float32(LOGITS), t), ones))(labels)
    np.testing.assert_allclose(of_head, values, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(dx, dz, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(head.apply(kernel, (), (np.float32(LOGITS), labels)), values, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [np.int64, np.uint64])
def test_an_ignored_label_that_64_bits_hold_alone_is_refused_where_jax_has_32(dtype):
    labels = LABELS.astype(dtype)
    labels[0] = ignore = np.iinfo(dtype).max
    with pytest.raises(fn.InputError, match="integers that fit"):
        fn.cross_entropy(ignore_index=ignore).apply({}, (), (np.float32(LOGITS), labels))


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
    refused(CROSS_ENTROPY, np.float32(LOGITS).reshape(2, 3, 5), labels, rf"label {label} at index \(1, 0\)\n")
    refused(fn.cross_entropy(ignore_index=7), np.float32(LOGITS).reshape(2, 3, 5), labels, "from 0 to 4")


@pytest.mark.parametrize("label", [-1, 5, 100, -(2**31)])
def test_labels_out_of_range_under_jit_give_nan_in_their_own_value_and_gradient(label):
    labels = jnp.int32(LABELS).at[3].set(label)
    values, dz = jax.jit(lambda z, t: pull(SMOOTHED, z, t)[:2])(jnp.float32(LOGITS), labels)
    np.testing.assert_array_equal(np.isnan(values), np.arange(6) == 3)
    np.testing.assert_array_equal(np.isnan(dz).all(1), np.arange(6) == 3)
    np.testing.assert_array_equal(np.isnan(dz).any(1), np.arange(6) == 3)


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


@pytest.mark.parametrize("ignore", [True, 1.5, "pad"])
@pytest.mark.parametrize("loss", [fn.cross_entropy, partial(fn.linear_cross_entropy, 5)])
def test_a_label_to_ignore_is_a_whole_number(loss, ignore):
    with pytest.raises(fn.InputError, match="ignore_index as a whole number"):
        loss(ignore_index=ignore)


@pytest.mark.parametrize("smoothing", [-0.1, 1, "a"])
@pytest.mark.parametrize("loss", [fn.cross_entropy, partial(fn.linear_cross_entropy, 5)])
def test_smoothing_is_a_share(loss, smoothing):
    with pytest.raises(fn.InputError, match="label_smoothing of at least 0"):
        loss(label_smoothing=smoothing)


@pytest.mark.parametrize("target", [None, 3, "label"])
def test_cross_entropy_says_so_of_what_is_no_array(target):
    with pytest.raises(fn.InputError, match="labels as an array"):
        CROSS_ENTROPY.check(Z, target)


def test_accuracy_of_soft_labels_and_positions():
    accuracy = CROSS_ENTROPY.metrics["accuracy"]
    np.testing.assert_array_equal(accuracy(LOGITS, SOFT), LOGITS.argmax(1) == SOFT.argmax(1))
    labels = np.int32(LOGITS.argmax(1)).reshape(2, 3)
    assert accuracy(LOGITS.reshape(2, 3, 5), labels).all()
    assert not accuracy(LOGITS.reshape(2, 3, 5), (labels + 1) % 5).any()


def test_an_ignored_label_is_no_label_of_an_unsigned_kind():
    loss = fn.cross_entropy(ignore_index=-1)
    np.testing.assert_array_equal(loss.counted(jnp.array([255, 3], jnp.uint8)), [True, True])


# name: (smoothing, ignore_index, labels); the logits are LOGITS, [6, 5] or [2, 3, 5]
WEIGHTED = {
    "integer labels": (0.0, None, LABELS),
    "smoothing": (0.3, None, LABELS),
    "ignored": (0.0, 4, LABELS),
    "smoothing, ignored": (0.3, -100, np.array([0, -100, 2, 2, 1, 3])),
    "positions": (0.1, 2, LABELS.reshape(2, 3)),
    "soft labels": (0.0, None, SOFT),
    "smoothed soft labels": (0.2, None, SOFT),
}


@pytest.mark.parametrize("name", WEIGHTED)
def test_weights_of_classes_are_those_of_pytorch(name, x64):
    """Values and gradients for a cotangent, and the mean, which is divided by the weights of the integer labels."""
    torch = pytest.importorskip("torch")
    smoothing, ignore, target = WEIGHTED[name]
    soft = target.dtype == np.float64
    loss = fn.cross_entropy(label_smoothing=smoothing, ignore_index=ignore, class_weights=list(WEIGHTS))
    shape = target.shape[:-1] if soft else target.shape
    z = torch.tensor(LOGITS.reshape(*shape, 5), requires_grad=True)
    t = torch.tensor(target, requires_grad=soft)
    options = {"weight": torch.tensor(WEIGHTS), "label_smoothing": smoothing}
    options |= {} if ignore is None else {"ignore_index": ignore}
    of = lambda reduction: torch.nn.functional.cross_entropy(z.movedim(-1, 1), t, reduction=reduction, **options)
    dy = np.linspace(-1, 2, 6).reshape(shape)
    wanted = of("none")
    wanted.backward(torch.tensor(dy))
    values, dz, dt = pull(loss, LOGITS.reshape(*shape, 5), target, dy)
    np.testing.assert_allclose(values, wanted.detach().numpy(), rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(dz, z.grad.numpy(), rtol=1e-11, atol=1e-14)
    if soft:
        np.testing.assert_allclose(dt, t.grad.numpy(), rtol=1e-11, atol=1e-14)
    z.grad = None
    of("mean").backward()
    objective = fn.objective(fn.dense(5, use_bias=False), loss)
    batch = LOGITS.reshape(*shape, 5), target
    params, state = {"model": {"kernel": np.eye(5)}, "loss": {}}, {"model": (), "loss": ()}
    (mean, _), grads = fn.value_and_grad(objective)(params, state, batch)
    np.testing.assert_allclose(mean, of("mean").item(), rtol=1e-12)
    np.testing.assert_allclose(
        grads["model"]["kernel"], LOGITS.T @ z.grad.numpy().reshape(6, 5), rtol=1e-10, atol=1e-14
    )
    metrics = fn.evaluate(objective, params, state, [batch])
    np.testing.assert_allclose(metrics["loss"], of("mean").item(), rtol=1e-12)
    label = (target.argmax(-1) if soft else target).reshape(-1)
    right = (LOGITS.argmax(1) == label)[label != ignore]
    np.testing.assert_allclose(metrics["accuracy"], right.mean(), rtol=1e-6)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_metrics_of_a_step_are_not_weighted_by_class(accumulate, standard_promotion):
    loss = fn.cross_entropy(class_weights=WEIGHTS)
    objective = fn.objective(fn.identity(), loss, {"class": lambda z, t: t.astype(jnp.float32)})
    batch, optimizer = (np.float32(LOGITS), LABELS.astype(np.int32)), optax.sgd(0.1)
    state = fn.init_train_state(objective, optimizer, jax.random.key(0), batch)
    _, metrics = fn.train_step(objective, optimizer, accumulate=accumulate)(state, batch)
    np.testing.assert_allclose(metrics["class"], LABELS.mean(), rtol=1e-6)


NOT_0 = [0.0, 1.0, 1.0]


@pytest.mark.parametrize(
    "loss", [fn.cross_entropy(class_weights=NOT_0), fn.linear_cross_entropy(3, z_loss=0.1, class_weights=NOT_0)]
)
def test_a_batch_of_classes_without_weight_has_loss_and_gradients_0(loss):
    objective = fn.objective(fn.dense(3), loss, {})
    batch = np.float32(LOGITS[:2]), np.zeros(2, np.int32)
    params, state = objective.init(jax.random.key(0), batch)
    (value, _), grads = fn.value_and_grad(objective)(params, state, batch)
    assert value == 0
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(grads))


def test_a_forbidden_class_without_weight_is_not_asked_for():
    z = np.float32([[1, -np.inf, 2]])
    loss = fn.cross_entropy(label_smoothing=0.1, class_weights=[1, 0, 1])
    values, dz, _ = pull(loss, z, np.array([0]))
    plain = pull(fn.cross_entropy(), z[:, [0, 2]], np.float32([[0.9 + 0.1 / 3, 0.1 / 3]]))
    np.testing.assert_allclose(values, plain[0], rtol=1e-6)
    np.testing.assert_allclose(dz, np.insert(plain[1], 1, 0, axis=1), rtol=1e-5)
    assert pull(loss, z, np.array([1]))[0] > 0  # the share of the others
    assert pull(fn.cross_entropy(class_weights=[1, 0, 1]), z, np.array([1]))[0] == 0


NONE = [1, -1, 1], [1, np.nan, 1], [1, np.inf, 1], [1, 1e39, 1], [], 1.0, np.ones((3, 1)), [True] * 3, "abc", [1, "a"]


@pytest.mark.parametrize("loss", [fn.cross_entropy, partial(fn.linear_cross_entropy, 3)])
@pytest.mark.parametrize("weights", [*NONE, [[1], 2]])
def test_weights_of_classes_that_are_none_are_refused(loss, weights):
    with pytest.raises(fn.InputError, match="class_weights"):
        loss(class_weights=weights)


def test_weights_of_too_few_classes_are_refused():
    refused(fn.cross_entropy(class_weights=[1, 2, 3]), Z, LABELS, "logits of 3 classes")
    with pytest.raises(fn.InputError, match=r"class_weights \[5\]"):
        fn.linear_cross_entropy(5, class_weights=[1, 2, 3])
    with pytest.raises(fn.InputError, match="class_weights"):
        jax.jit(lambda w: fn.cross_entropy(class_weights=w).apply({}, (), (Z, jnp.int32(LABELS))))(jnp.ones(5))


@pytest.mark.parametrize("number", [np.float64, np.float32, np.float16, jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("wide", [False, True])
def test_numbers_of_options_leave_dtypes_alone(number, wide):
    """Values are float32, or float64 of float64 logits, and gradients what the logits and parameters are."""

    def made(number):
        weights = [2.0] * 5 if number is float else np.full(5, 2, number(2).dtype)
        yield fn.cross_entropy(label_smoothing=number(0.125), class_weights=weights), {}
        head = fn.linear_cross_entropy(
            5,
            label_smoothing=number(0.125),
            ignore_index=None,
            z_loss=number(0.5),
            use_bias=False,
            class_weights=weights,
        )
        yield head, {"kernel": np.eye(5)}

    def run(loss, params, dtype):
        z, params = jnp.asarray(LOGITS, dtype), jax.tree.map(lambda a: jnp.asarray(a, dtype), params)
        values, _, residuals = loss.fwd(params, (), (z, jnp.int32(LABELS)), None)
        return values, loss.bwd(params, residuals, jnp.ones_like(values))

    with jax.enable_x64(wide):
        for (loss, params), (same, _) in zip(made(number), made(float), strict=True):
            for dtype in [jnp.bfloat16, jnp.float32] + [jnp.float64] * wide:
                got, wanted = (jax.jit(partial(run, each, params, dtype))() for each in (loss, same))
                assert got[0].dtype == (jnp.float64 if dtype == jnp.float64 else jnp.float32)
                assert {leaf.dtype for leaf in jax.tree.leaves(got[1])} == {jnp.dtype(dtype)}
                jax.tree.map(np.testing.assert_array_equal, got, wanted)


def test_an_infinite_logit_takes_all_of_softmax():
    logits = jnp.array([[jnp.inf, 1.0, -jnp.inf], [jnp.inf, 1.0, 2.0]])
    loss, target = fn.cross_entropy(), jnp.array([0, 1])
    with jax.debug_nans(True):
        values, _, residuals = loss.fwd({}, (), (logits, target), None)
        dlogits = loss.bwd({}, residuals, jnp.ones(2))[1][0]
    np.testing.assert_array_equal(values, [0, jnp.inf])
    np.testing.assert_array_equal(dlogits, [[0, 0, 0], [1, -1, 0]])
