"""mse, mae and huber against their formulas; kinks and extremes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import funcnet as fn
from tests.losses.pairs import LOGITS, REGRESSIONS, SOFT, Z, pull, refused, value


def test_regressions_against_their_formulas_in_numpy(x64):
    p, t = jnp.asarray(LOGITS), jnp.asarray(SOFT)
    r = LOGITS - SOFT
    np.testing.assert_allclose(value(fn.mse(), p, t), np.mean(r**2, 1), rtol=1e-13)
    np.testing.assert_allclose(value(fn.mae(), p, t), np.mean(np.abs(r), 1), rtol=1e-13)
    for delta in (0.5, 1.0, 3.0):
        wanted = np.mean(np.where(np.abs(r) <= delta, r**2 / 2, delta * (np.abs(r) - delta / 2)), 1)
        np.testing.assert_allclose(value(fn.huber(delta), p, t), wanted, rtol=1e-13)


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


@pytest.mark.parametrize("loss", REGRESSIONS, ids=lambda loss: loss.name)
def test_infinity_in_either_is_infinite_and_less_itself_has_no_limit(loss):
    p, t = np.float32([[np.inf, 0, -np.inf], [np.inf, np.inf, -np.inf]])
    with jax.debug_nans(True):
        values, dp, dt = pull.__wrapped__(loss, jnp.float32(p[1:2]), jnp.float32(t[1:2]))
        np.testing.assert_array_equal([values, dp, dt], [[np.inf], -dt, [np.inf if loss.name == "mse" else 1]])
    values, dp, dt = pull(loss, p, t)
    np.testing.assert_array_equal(np.isnan(values), [True, False, True])
    np.testing.assert_array_equal(np.isnan(dp), [True, False, True])
    for d in pull(loss, p, t, np.zeros(3, np.float32))[1:]:
        assert not np.any(d)


@pytest.mark.parametrize(("dtype", "far"), [(jnp.float16, 40000.0), (jnp.bfloat16, 3e38), (jnp.float32, 3e38)])
def test_a_difference_beyond_the_dtype_is_no_infinity(dtype, far):
    """In half precision; in float32 it is one, and the slopes are right all the same."""
    p, t = jnp.array([far, 1.0], dtype), jnp.array([-far, 1.0], dtype)
    r = np.float64(p) - np.float64(t)
    for loss, wanted, slope in (
        (fn.mae(), np.abs(r), np.sign(r)),
        (fn.huber(2.0), 2 * np.abs(r) - 2 * (r > 2), 2 * np.sign(r)),
        (fn.mse(), r**2, 2 * r),
    ):
        values, dp, dt = pull(loss, p, t)
        in_range = np.where(wanted > np.finfo(np.float32).max, np.inf, wanted)
        np.testing.assert_allclose(values, in_range, rtol=1e-6)
        limit = float(jnp.finfo(dtype).max)
        np.testing.assert_array_equal(np.float64(dp), np.where(np.abs(slope) > limit, np.inf, slope))
        np.testing.assert_array_equal(dt, -dp)


@pytest.mark.parametrize("loss", REGRESSIONS, ids=lambda loss: loss.name)
def test_regressions_refuse_integer_targets(loss):
    refused(loss, Z, jnp.ones((6, 5), jnp.int32), "dtype, float32")
