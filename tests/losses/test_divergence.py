"""KL divergence: equals, and classes that cannot be."""

import jax.numpy as jnp
import numpy as np

import funcnet as fn
from tests.losses.pairs import SOFT, Z, pull, refused, value


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
