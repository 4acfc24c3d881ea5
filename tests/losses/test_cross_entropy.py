"""Cross-entropy: extreme and masked logits; labels of any dtype, ignored, out of range."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

import funcnet as fn
from tests.losses.pairs import CROSS_ENTROPY, LABELS, LOGITS, SMOOTHED, SOFT, Z, pull, refused, value


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
