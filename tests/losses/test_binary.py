"""Binary cross-entropy and focal loss: extreme logits against mpmath, weights against PyTorch, targets, accuracy."""

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
import scipy.special

import funcnet as fn
from tests.losses.pairs import BINARY, LOGITS, RNG, SOFT, Z, pull, refused, value

GAMMAS, ALPHAS = (0.0, 0.5, 1.0, 2.0, 5.0), (None, 0.0, 0.25, 1.0)
TARGETS = (0.0, 0.5, 1.0)


def minus_log_sigmoid(z):
    return mpmath.log1p(mpmath.exp(-z))


def binary_by_mpmath(weight):
    return lambda z, t: weight * t * minus_log_sigmoid(z) + (1 - t) * minus_log_sigmoid(-z)


def focal_by_mpmath(gamma, alpha):
    ones, zeros = (1, 1) if alpha is None else (alpha, 1 - alpha)
    right = lambda z: mpmath.exp(-gamma * minus_log_sigmoid(-z)) * minus_log_sigmoid(z)
    return lambda z, t: ones * t * right(z) + zeros * (1 - t) * right(-z)


FORMULAS = {
    **{
        f"weight {w}": (fn.binary_cross_entropy(pos_weight=w), binary_by_mpmath(1 if w is None else w))
        for w in (None, 0, 0.3, 5)
    },
    **{f"gamma {g}, alpha {a}": (fn.focal(g, alpha=a), focal_by_mpmath(g, a)) for g in GAMMAS for a in ALPHAS},
}


def with_slopes(f, z, t):
    """(l, dl/dz, dl/dt) by mpmath; l is linear in t."""
    with mpmath.workdps(30):
        return f(z, t), mpmath.diff(lambda z: f(z, t), z), f(z, 1) - f(z, 0)


def limits(f, side, t):
    """What value and slopes tend to for z to infinity, or -infinity: what is large at 1e6 there grows with it."""
    return [
        float(b) if abs(b) < 10 else float(mpmath.sign(b)) * np.inf for b in with_slopes(f, side * mpmath.mpf(1e6), t)
    ]


@pytest.mark.parametrize("name", FORMULAS)
def test_infinite_logits_have_the_limits_of_the_formula_and_no_nan_on_the_way(name):
    loss, f = FORMULAS[name]
    z, t = (a.ravel() for a in np.meshgrid([np.inf, -np.inf], TARGETS))
    wanted = np.float32([limits(f, np.sign(side), share) for side, share in zip(z, t, strict=True)])
    with jax.debug_nans(True):
        values, dz, dt = pull.__wrapped__(loss, jnp.float32(z), jnp.float32(t))
    np.testing.assert_allclose(np.stack([values, dz, dt], axis=1), wanted, rtol=1e-6)
    values, dz, dt = pull.__wrapped__(loss, jnp.float32(z), jnp.float32(t), jnp.zeros(6))
    assert not np.any(dz)
    assert not np.any(dt)


@pytest.mark.parametrize("name", FORMULAS)
def test_far_away_and_near_0_no_digits_are_lost(name):
    loss, f = FORMULAS[name]
    far = [150.0, 60.0, 20.0, 3.0, 1e-6]
    z, t = (a.ravel() for a in np.meshgrid(np.float32([*far, 0.0, *np.negative(far)]), TARGETS))
    wanted = np.float64([with_slopes(f, mpmath.mpf(float(a)), float(b)) for a, b in zip(z, t, strict=True)])
    values, dz, dt = pull(loss, z, np.float32(t))
    np.testing.assert_allclose(values, wanted[:, 0], rtol=3e-5, atol=1e-37)
    one_sided = (t != 0.5) | (np.abs(z) > 1)  # else the two slopes cancel
    np.testing.assert_allclose(dz[one_sided], wanted[one_sided, 1], rtol=3e-5, atol=1e-37)
    np.testing.assert_allclose(dz, wanted[:, 1], atol=1e-6)
    np.testing.assert_allclose(dt, wanted[:, 2], rtol=3e-5, atol=1e-37 if loss.name != "focal" else 1e-6)


@pytest.mark.parametrize("name", FORMULAS)
def test_the_largest_finite_logits_are_finite_or_overflow_as_the_formula_does(name):
    loss, f = FORMULAS[name]
    z, t = (a.ravel() for a in np.meshgrid(np.float32([1e30, -1e30, 3e38, -3e38]), TARGETS))
    wanted = np.float32([limits(f, np.sign(a), b)[1] for a, b in zip(z, t, strict=True)])
    values, dz, dt = pull(loss, z, np.float32(t))
    np.testing.assert_allclose(dz, wanted, rtol=1e-6)
    assert not np.isnan(values).any()
    assert not np.isnan(dt).any()


@pytest.mark.parametrize("weight", [1.0, 3.0])
@pytest.mark.parametrize("z", [0.0, -0.0, 1.5, -1.5])
def test_second_derivatives_are_right_at_0_too(z, weight):
    slopes = lambda z: pull.__wrapped__(fn.binary_cross_entropy(pos_weight=weight), z, jnp.array([0.25]))[1:]
    _, (ddz, ddt) = jax.jvp(slopes, (jnp.array([z]),), (jnp.array([1.0]),))
    s = scipy.special.expit(z)
    np.testing.assert_allclose(ddz, [(0.75 + weight * 0.25) * s * (1 - s)], rtol=1e-6)
    np.testing.assert_allclose(ddt, [-weight * (1 - s) - s], rtol=1e-6)


SHAPE = (4, 3, 5)
MANY = 3 * RNG.normal(size=SHAPE)
SHARES = {"soft": RNG.uniform(size=SHAPE), "hard": np.float64(RNG.uniform(size=SHAPE) < 0.4)}
WEIGHTS = {"one number": 3.0, "less than 1": 0.2, "0": 0.0, "one an entry": np.array([0.5, 1, 2, 7, 0])}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", SHARES)
@pytest.mark.parametrize("weight", WEIGHTS)
def test_pos_weight_is_that_of_pytorch(weight, kind, masked, x64):
    torch = pytest.importorskip("torch")
    weight, dy, mask = WEIGHTS[weight], np.linspace(-1, 2, 4), RNG.uniform(size=SHAPE) < 0.6
    z, t = (torch.tensor(a, requires_grad=True) for a in (MANY, SHARES[kind]))
    theirs = torch.nn.BCEWithLogitsLoss(pos_weight=torch.tensor(weight, dtype=torch.float64), reduction="none")(z, t)
    kept = torch.tensor(mask) if masked else torch.ones(SHAPE)
    wanted = (theirs * kept).sum((1, 2)) / kept.sum((1, 2))
    wanted.backward(torch.tensor(dy))
    target = SHARES[kind]
    values, dz, dt = pull(
        fn.binary_cross_entropy(pos_weight=weight), MANY, {"target": target, "mask": mask} if masked else target, dy
    )
    for got, theirs in ((values, wanted.detach()), (dz, z.grad), (dt["target"] if masked else dt, t.grad)):
        np.testing.assert_allclose(got, theirs.numpy(), rtol=1e-11, atol=1e-14)


def test_pos_weight_of_one_is_no_weight_and_integers_are_targets_too():
    t = np.int8(SHARES["hard"])
    for weight in (1, [1] * 5, (1.0,) * 5, np.ones(5), np.ones(5, np.int32), jnp.ones(5, jnp.bfloat16)):
        jax.tree.map(
            np.testing.assert_array_equal,
            pull(fn.binary_cross_entropy(pos_weight=weight), jnp.float32(MANY), t),
            pull(BINARY, jnp.float32(MANY), t),
        )


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (-1.0, "not negative"),
        (float("nan"), "finite"),
        (np.array([1.0, -1.0]), "none negative"),
        (np.array([1.0, np.inf]), "range of float32"),
        (np.ones((1, 5)), r"numbers \[C\]"),
        (np.ones(5, bool), r"numbers \[C\]"),
        (True, "real number"),
        ([1.0, -2.0], "none negative"),
        ([], r"numbers \[C\]"),
        ("2", r"numbers \[C\]"),
    ],
)
def test_a_pos_weight_that_is_none_is_refused(weight, message):
    with pytest.raises(fn.InputError, match=message):
        fn.binary_cross_entropy(pos_weight=weight)


def test_a_traced_pos_weight_is_refused():
    with pytest.raises(fn.InputError, match="not traced"):
        jax.eval_shape(lambda w: value(fn.binary_cross_entropy(pos_weight=w), Z, jnp.float32(SOFT)), jnp.ones(5))


@pytest.mark.parametrize("shape", [(6, 4), (6, 1), (5,), (6, 5, 1)])
def test_logits_that_do_not_fit_the_pos_weight_are_refused(shape):
    refused(fn.binary_cross_entropy(pos_weight=np.ones(5)), jnp.ones(shape), jnp.ones(shape), "for a pos_weight")


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
