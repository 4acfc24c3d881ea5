"""Hinge and triplet: kinks, what they refuse, and PyTorch for the triplet."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import funcnet as fn
from tests.losses.pairs import RNG, Z, pull, refused


def test_hinge_has_slope_0_at_its_kink_and_takes_integers():
    z = np.float32([[1.0], [-1.0], [0.5], [2.0], [-3.0]])
    values, dz, dt = pull(fn.hinge(), z, np.int8([[1], [-1], [1], [1], [1]]))
    np.testing.assert_array_equal(values, [0, 0, 0.5, 0, 4])
    np.testing.assert_array_equal(dz[:, 0], [0, 0, -1, 0, -1])
    assert dt is None
    np.testing.assert_array_equal(
        fn.hinge().metrics["accuracy"](z, np.int8([[1], [-1], [-1], [1], [1]])), [1, 1, 0, 1, 0]
    )


def test_hinge_of_infinite_scores_has_its_limits_and_no_nan_on_the_way():
    z, t = (a.ravel() for a in np.meshgrid(np.float32([np.inf, -np.inf]), np.float32([1, 0.5, 0, -0.5, -1])))
    with jax.debug_nans(True):
        values, dz, dt = pull.__wrapped__(fn.hinge(), jnp.float32(z), jnp.float32(t))
        assert not any(
            np.any(d) for d in pull.__wrapped__(fn.hinge(), jnp.float32(z), jnp.float32(t), jnp.zeros(10))[1:]
        )
    kept = t * np.sign(z) > 0
    np.testing.assert_array_equal(values, np.where(kept, 0, np.where(t == 0, 1, np.inf)))
    np.testing.assert_array_equal(dz, np.where(kept, 0, -t))
    np.testing.assert_array_equal(dt, np.where(kept, 0, -z))


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


ANCHOR, NEAR, FAR = RNG.normal(size=(3, 6, 5))
DY = np.linspace(-1.0, 2.0, 6)


@pytest.mark.parametrize("margin", [0.2, 1.0])
def test_triplet_is_that_of_pytorch(margin, x64):
    torch = pytest.importorskip("torch")
    a, p, n = (torch.tensor(x, requires_grad=True) for x in (ANCHOR, NEAR, FAR))
    wanted = torch.nn.functional.triplet_margin_loss(a, p, n, margin=margin, eps=0.0, reduction="none")
    assert 0 < (wanted > 0).sum() < 6
    wanted.backward(torch.tensor(DY))
    values, da, (dp, dn) = pull(fn.triplet(margin), ANCHOR, (NEAR, FAR), DY)
    np.testing.assert_allclose(values, wanted.detach().numpy(), rtol=1e-10, atol=1e-12)
    for got, x in ((da, a), (dp, p), (dn, n)):
        np.testing.assert_allclose(got, x.grad.numpy(), rtol=1e-10, atol=1e-12)


def test_triplet_has_slope_0_at_its_kinks_and_no_overflow_far_away():
    anchor = np.float32([[0, 0], [0, 0], [0, 0], [1, 1], [3e30, 4e30]])
    near = np.float32([[3, 4], [3, 4], [3, 4], [1, 1], [0, 0]])
    far = np.float32([[0, 6], [6, 0], [8, 6], [1, 1], [3e30, 4e30]])
    values, da, (dp, dn) = pull(fn.triplet(1.0), anchor, (near, far))
    np.testing.assert_allclose(values, [0, 0, 0, 1, 5e30], rtol=1e-6)
    for d in (da, dp, dn):  # just kept, just kept, kept; no direction between equals
        assert not np.any(d[:4])
    np.testing.assert_allclose(da[4], [0.6, 0.8], rtol=1e-6)
    np.testing.assert_allclose(dp[4], [-0.6, -0.8], rtol=1e-6)
    assert not np.any(dn[4])


def test_triplet_has_a_value_for_each_row():
    others = np.zeros((2, 3, 4), np.float32), np.ones((2, 3, 4), np.float32)
    values, da, _ = pull(fn.triplet(), np.ones((2, 3, 4), np.float32), others)
    assert values.shape == fn.triplet().counted(others).shape == (2, 3)
    np.testing.assert_allclose(values, 3)
    assert da.shape == (2, 3, 4)


def test_triplet_refuses_what_does_not_fit():
    a = np.float32(ANCHOR)
    refused(fn.triplet(), a, a, "positive, negative")
    refused(fn.triplet(), a, (a, a, a), "positive, negative")
    refused(fn.triplet(), a, (a[:5], a), "the prediction's shape")
    refused(fn.triplet(), a, (a, a.astype(jnp.bfloat16)), "dtype")
    refused(fn.triplet(), a.astype(int), (a, a), "floating")
    for margin in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(fn.InputError, match="margin"):
            fn.triplet(margin)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_triplet_in_half_precision_is_float32_rounded(dtype):
    a, p, n = (jnp.asarray(x, dtype) for x in (ANCHOR, NEAR, FAR))
    got = jax.tree.leaves(pull(fn.triplet(), a, (p, n)))
    wanted = jax.tree.leaves(pull(fn.triplet(), *jax.tree.map(lambda x: x.astype(jnp.float32), (a, (p, n)))))
    assert [x.dtype for x in got] == [jnp.float32, dtype, dtype, dtype]
    for x, y in zip(got, wanted, strict=True):
        np.testing.assert_allclose(x.astype(jnp.float32), y, rtol=float(jnp.finfo(dtype).eps), atol=1e-6)
