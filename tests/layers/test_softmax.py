"""softmax and log_softmax: SciPy, PyTorch, huge and masked entries, half precision."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

import funcnet as fn

RNG = np.random.default_rng(0)
X, DY = 3 * RNG.normal(size=(4, 2, 5)), RNG.normal(size=(4, 2, 5))
LAYERS = {"softmax": fn.softmax(), "log_softmax": fn.log_softmax()}
BOTH = pytest.mark.parametrize("name", LAYERS)


def pull(name, x, dy):
    """(y, dx)."""
    y, _, residuals = LAYERS[name].fwd({}, (), x, None)
    return y, LAYERS[name].bwd({}, residuals, dy)[1]


@BOTH
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float64", 1e-10)])
def test_output_and_gradient_are_those_of_scipy_and_pytorch(name, dtype, tolerance, x64):
    y, dx = pull(name, X.astype(dtype), DY.astype(dtype))
    np.testing.assert_allclose(y, getattr(scipy.special, name)(X, axis=-1), rtol=tolerance, atol=tolerance)
    torch = pytest.importorskip("torch")
    x = torch.tensor(X.astype(dtype), requires_grad=True)
    getattr(torch, name)(x, -1).backward(torch.tensor(DY.astype(dtype)))
    np.testing.assert_allclose(dx, x.grad.numpy(), rtol=tolerance, atol=tolerance)


@BOTH
@pytest.mark.parametrize("scale", [1e4, 1e38])
def test_huge_entries_are_exact(name, scale):
    x = np.float32(scale) * np.float32([[1, -1, 0.5], [1, 1, -1], [0, 0, 0]])
    y, dx = pull(name, x, np.float32([[1, 2, 3]] * 3))
    np.testing.assert_allclose(y, getattr(scipy.special, name)(x.astype(np.float64), axis=-1), rtol=1e-6)
    assert np.isfinite(dx).all()


def test_masked_entries_have_probability_zero():
    x = np.float32([[1, -np.inf, 2], [-np.inf, -np.inf, 3]])
    y, dx = pull("softmax", x, np.float32([[1, 2, 3]] * 2))
    np.testing.assert_allclose(y, scipy.special.softmax(x, axis=-1), rtol=1e-6)
    assert np.isfinite(dx).all()
    assert not dx[:, 1].any()
    y, dx = pull("log_softmax", x, np.float32([[1, 0, 1]] * 2))
    np.testing.assert_allclose(y, scipy.special.log_softmax(x, axis=-1), rtol=1e-5, atol=1e-6)
    assert np.isfinite(dx).all()


@BOTH
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_half_precision_is_float32_rounded(name, dtype):
    x, dy = jnp.asarray(X, dtype), jnp.asarray(DY, dtype)
    got, wanted = pull(name, x, dy), pull(name, x.astype(jnp.float32), dy.astype(jnp.float32))
    for a, b in zip(got, wanted, strict=True):
        assert a.dtype == dtype
        np.testing.assert_allclose(
            a.astype(jnp.float32), b, rtol=0, atol=4 * float(jnp.finfo(dtype).eps) * abs(b).max()
        )


@pytest.mark.parametrize(("dtype", "sure"), [(jnp.bfloat16, 8.0), (jnp.float16, 9.75), (jnp.float32, 20.0)])
def test_where_y_is_rounded_to_1_the_gradient_is_that_of_the_other_classes(dtype, sure):
    """Of a sure class dx is y (1 - y) by the others' mean of dy: y alone, rounded, has nothing left of it."""
    x, dy = np.asarray([[sure, 0, 1], [-1, sure, 0]]), np.asarray([[0.75, -1.5, 0.5], [1, -2, 3]])
    y, dx = pull("softmax", jnp.asarray(x, dtype), jnp.asarray(dy, dtype))
    assert y[0, 0] == y[1, 1] == 1
    p = scipy.special.softmax(x, axis=-1)
    wanted = p * np.einsum("bi,bij->bj", p, dy[:, None] - dy[:, :, None])
    np.testing.assert_allclose(dx.astype(jnp.float32), wanted, rtol=4 * float(jnp.finfo(dtype).eps))


def test_log_softmax_and_kl_divergence_are_cross_entropy_less_the_entropy():
    q = scipy.special.softmax(RNG.normal(size=(6, 5)), -1).astype(np.float32)
    z = jnp.asarray(RNG.normal(size=(6, 5)), jnp.float32)
    log_p = fn.log_softmax().apply({}, (), z)
    divergence = fn.kl_divergence().apply({}, (), (log_p, q))
    entropy = scipy.special.entr(q).sum(-1)
    np.testing.assert_allclose(divergence, fn.cross_entropy().apply({}, (), (z, q)) - entropy, rtol=1e-4, atol=1e-6)


@BOTH
def test_what_is_saved_and_what_is_refused(name):
    saved = LAYERS[name].fwd({}, (), jnp.ones((4, 7), jnp.bfloat16), None)[2]
    wanted = [(4, 7)] if name == "softmax" else [(4, 7), (4, 1), (4, 1)]
    assert [leaf.shape for leaf in jax.tree.leaves(saved)] == wanted
    with pytest.raises(fn.InputError, match="floating"):
        LAYERS[name].apply({}, (), jnp.ones((2, 3), jnp.int32))
    with pytest.raises(fn.InputError, match=r"bfloat16\[4, 7\]"):
        LAYERS[name].bwd({}, saved, jnp.ones((4, 7)))
