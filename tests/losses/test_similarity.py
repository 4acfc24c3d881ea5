"""Cosine at 0 and far away; contrastive against two cross-entropies."""

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

import funcnet as fn
from tests.losses.pairs import RNG, pull, refused, value


def test_cosine_has_no_direction_at_0_and_no_overflow_far_away():
    p = np.float32([[0, 0], [3, 4], [3e30, 4e30], [3e-30, 4e-30]])
    t = np.float32([[1, 2], [0, 0], [4e30, 3e30], [-3, -4]])
    values, dp, dt = pull(fn.cosine(), p, t)
    np.testing.assert_allclose(values, [1, 1, 0.04, 2], rtol=1e-5)
    assert not dp[:2].any()
    assert not dt[:2].any()
    assert all(np.isfinite(a).all() for a in (dp, dt))


def test_cosine_has_no_gradient_where_either_vector_is_0_and_all_of_it_where_single_entries_are():
    p, t = np.float32(RNG.normal(size=(2, 50, 7)))
    for pair in ((p, 0 * t), (0 * p, t)):
        values, dp, dt = pull(fn.cosine(), *pair)
        assert np.all(np.asarray(values) == 1)
        assert not np.any(dp)
        assert not np.any(dt)
    p, t = np.array([[1.0, 0, 2], [2, 3, 1]]), np.array([[0.0, 1, 0], [3, 0, 4]])  # the first t has the length 1
    dot, n, m = (p * t).sum(1, keepdims=True), *(np.sqrt((a * a).sum(1, keepdims=True)) for a in (p, t))
    _, dp, dt = pull(fn.cosine(), np.float32(p), np.float32(t))
    np.testing.assert_allclose(dp, dot * p / (n**3 * m) - t / (n * m), atol=1e-6)
    np.testing.assert_allclose(dt, dot * t / (n * m**3) - p / (n * m), atol=1e-6)


def test_cosine_of_almost_one_direction_has_its_digits():
    """Where 1 - <u, v> has none: against the definition, and its derivatives, in NumPy's widest numbers."""
    p = np.float32(RNG.normal(size=(200, 16)))
    t = p + np.float32(10 ** RNG.uniform(-4, -1, size=(200, 1)) * RNG.normal(size=(200, 16)))
    t[:10] = p[:10] * np.float32(2) ** np.arange(10, dtype=np.float32)[:, None]
    values, dp, dt = pull(fn.cosine(), p, t)
    a, b = p.astype(np.longdouble), t.astype(np.longdouble)
    (u, of_a), (v, of_b) = ((x / n, n) for x, n in ((x, np.sqrt((x * x).sum(-1, keepdims=True))) for x in (a, b)))
    c = (u * v).sum(-1, keepdims=True)
    wanted = (1 - c)[:, 0], -(v - c * u) / of_a, -(u - c * v) / of_b
    assert np.all(values >= 0)
    assert not any(np.any(a[:10]) for a in (values, dp, dt))
    for got, right in zip((values, dp, dt), wanted, strict=True):
        got, right = np.asarray(got)[10:], np.asarray(right)[10:]
        error = np.abs(got - right).reshape(190, -1).max(1) / np.abs(right).reshape(190, -1).max(1)
        assert np.all(error < 1e-2)


A, B = RNG.normal(size=(6, 4)), RNG.normal(size=(6, 4))
DY = np.linspace(-1.0, 2.0, 6)


def test_contrastive_is_the_mean_of_two_cross_entropies_of_pytorch(x64):
    torch = pytest.importorskip("torch")
    a, b = (torch.tensor(x, requires_grad=True) for x in (A, B))
    s = torch.nn.functional.normalize(a, dim=1) @ torch.nn.functional.normalize(b, dim=1).T / 0.3
    either = (torch.nn.functional.cross_entropy(z, torch.arange(6), reduction="none") for z in (s, s.T))
    wanted = sum(either) / 2
    wanted.backward(torch.tensor(DY))
    values, da, db = pull(fn.contrastive(0.3), A, B, DY)
    np.testing.assert_allclose(values, wanted.detach().numpy(), rtol=1e-10)
    np.testing.assert_allclose(da, a.grad.numpy(), rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(db, b.grad.numpy(), rtol=1e-10, atol=1e-12)


def test_contrastive_looks_at_directions_alone_and_is_0_for_one_pair():
    loss = fn.contrastive()
    far = np.float32([[3e30], [2e-30], [1], [1], [1], [1]]) * np.float32(A)
    np.testing.assert_allclose(value(loss, far, np.float32(B)), value(loss, np.float32(A), np.float32(B)), rtol=1e-4)
    for a in pull(loss, np.float32(A[:1]), np.float32(B[:1])):
        np.testing.assert_allclose(a, np.zeros_like(a), atol=1e-6)
    nowhere = np.float32(A) * (np.arange(6) != 2)[:, None]
    values, da, db = pull(loss, nowhere.astype(np.float32), np.float32(B))
    assert all(np.isfinite(v).all() for v in (values, da, db))
    assert not np.any(da[2])


def test_contrastive_of_right_pairs_is_not_negative_and_keeps_its_digits():
    """At a low temperature S is large beside its differences: against float64, but for the cosines' own rounding."""
    a = np.float32(np.eye(6) + 0.01 * RNG.normal(size=(6, 6)))
    assert np.all(value(fn.contrastive(1e-3), a, a) >= 0)
    near = np.float32(A) + np.float32(1e-3)
    values = value(fn.contrastive(1e-4), np.float32(A), near)
    u, v = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (np.float64(np.float32(A)), np.float64(near)))
    s = u @ v.T / 1e-4
    wanted = (scipy.special.logsumexp(s, 1) + scipy.special.logsumexp(s, 0)) / 2 - np.diagonal(s)
    assert np.all(values >= 0)
    np.testing.assert_allclose(values, wanted, atol=2e-3)


@pytest.mark.parametrize("temperature", [1e-3, 1e3])
def test_contrastive_at_any_temperature_is_finite(temperature):
    assert all(np.isfinite(a).all() for a in pull(fn.contrastive(temperature), np.float32(A), np.float32(B)))


def test_contrastive_refuses_what_does_not_fit():
    a = np.float32(A)
    refused(fn.contrastive(), a, a[:5], "the prediction's shape")
    refused(fn.contrastive(), a, a.astype(jnp.bfloat16), "dtype")
    refused(fn.contrastive(), a.reshape(6, 2, 2), a.reshape(6, 2, 2), "one vector an example")
    for temperature in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(fn.InputError, match="temperature"):
            fn.contrastive(temperature)


@pytest.mark.parametrize("contract", [fn.per_example, fn.squared_norm])
def test_contrastive_has_no_gradient_of_one_example(contract):
    residuals = fn.contrastive().fwd({}, (), (np.float32(A), np.float32(B)), None)[2]
    for loss in (fn.contrastive(), fn.remat(fn.contrastive())):
        residuals = loss.fwd({}, (), (np.float32(A), np.float32(B)), None)[2]
        with pytest.raises(fn.InputError, match="depends on all others"):
            loss.bwd({}, residuals, jnp.ones(6), contract)
        assert loss.bwd({}, residuals, jnp.ones(6), fn.keep)[0] == {}


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_contrastive_in_half_precision_is_float32_rounded(dtype):
    a, b = jnp.asarray(A, dtype), jnp.asarray(B, dtype)
    got, wanted = pull(fn.contrastive(0.5), a, b), pull(fn.contrastive(0.5), *(x.astype(jnp.float32) for x in (a, b)))
    assert [x.dtype for x in got] == [jnp.float32, dtype, dtype]
    for x, y in zip(got, wanted, strict=True):
        np.testing.assert_allclose(x.astype(jnp.float32), y, rtol=float(jnp.finfo(dtype).eps), atol=1e-6)


@pytest.mark.parametrize("loss", [fn.contrastive(), fn.triplet()], ids=lambda loss: loss.name)
def test_behind_models_that_make_both_sides_it_is_one_layer_with_them(loss):
    other = fn.dense(3) if loss.name == "contrastive" else fn.parallel(fn.dense(3), fn.dense(3))
    whole = fn.serial(fn.parallel(fn.dense(3), other), loss)
    x = "f32[4,5]", "f32[4,2]" if loss.name == "contrastive" else ("f32[4,2]", "f32[4,3]")
    fn.check_layer(whole, x, oracles=("autodiff",)).raise_for_failure()
