"""Binary cross-entropy and focal loss: extreme logits, targets, accuracy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

import funcnet as fn
from tests.losses.pairs import BINARY, LOGITS, SOFT, Z, pull, refused


@pytest.mark.parametrize("z", [0.0, 1e4, -1e4, 1e38, -1e38])
@pytest.mark.parametrize("t", [0.0, 0.5, 1.0])
def test_binary_cross_entropy_of_huge_logits(z, t):
    values, dz, dt = pull(BINARY, np.array([z], np.float32), np.array([t], np.float32))
    z = np.float64(np.float32(z))
    np.testing.assert_allclose(values, np.logaddexp(0, -z) * t + np.logaddexp(0, z) * (1 - t), rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(dz, scipy.special.expit(z) - t, atol=1e-6)
    np.testing.assert_allclose(dt, -z, rtol=1e-6)


@pytest.mark.parametrize(
    "target",
    [jnp.full((6, 5), 1.5), jnp.full((6, 5), -0.1), jnp.full((6, 5), 2), jnp.full((6, 5), -1)],
    ids=["1.5", "-0.1", "2", "-1"],
)
def test_binary_cross_entropy_refuses_targets_that_are_no_probabilities(target):
    refused(BINARY, Z, target, "from 0 to 1")


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.int8, bool])
def test_binary_accuracy_is_the_share_of_entries_on_the_right_side(dtype):
    z = jnp.array([[1.0, -1.0], [2.0, 3.0], [0.0, -5.0]])
    t = jnp.array([[1, 1], [1, 1], [0, 0]]).astype(dtype)
    np.testing.assert_array_equal(BINARY.metrics["accuracy"](z, t), [0.5, 1, 1])


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
