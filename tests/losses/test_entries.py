"""Losses of entries under masks: against NumPy in float64, and what is held back has no influence, whatever it is."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.special import expit

import funcnet as fn
from tests.losses.pairs import RNG, pull, refused, value

softplus = lambda z: np.logaddexp(0, z)
WEIGHT = np.array([0.5, 1, 2, 7])


def focal_parts(z):
    """P and P' for gamma = 2."""
    s = expit(z)
    return (1 - s) ** 2 * softplus(-z), -((1 - s) ** 2) * (2 * s * softplus(-z) + 1 - s)


def focal_slopes(z, t):
    (right, slope), (left, back) = focal_parts(z), focal_parts(-z)
    return 0.25 * t * slope - 0.75 * (1 - t) * back, 0.25 * right - 0.75 * left


def of_difference(f, df):
    return lambda p, t: f(p - t), lambda p, t: (df(p - t), -df(p - t))


# name: (loss, f, (z, t) -> (df/dz, df/dt))
ENTRIES = {
    "mse": (fn.mse(), *of_difference(np.square, lambda r: 2 * r)),
    "mae": (fn.mae(), *of_difference(np.abs, np.sign)),
    "huber": (
        fn.huber(0.7),
        *of_difference(
            lambda r: np.where(np.abs(r) < 0.7, r * r / 2, 0.7 * (np.abs(r) - 0.35)), lambda r: np.clip(r, -0.7, 0.7)
        ),
    ),
    "binary_cross_entropy": (
        fn.binary_cross_entropy(),
        lambda z, t: softplus(z) - t * z,
        lambda z, t: (expit(z) - t, -z),
    ),
    "binary_cross_entropy, weighted": (
        fn.binary_cross_entropy(pos_weight=WEIGHT),
        lambda z, t: WEIGHT * t * softplus(-z) + (1 - t) * softplus(z),
        lambda z, t: ((1 - t) * expit(z) - WEIGHT * t * expit(-z), WEIGHT * softplus(-z) - softplus(z)),
    ),
    "focal": (
        fn.focal(alpha=0.25),
        lambda z, t: 0.25 * t * focal_parts(z)[0] + 0.75 * (1 - t) * focal_parts(-z)[0],
        focal_slopes,
    ),
    "hinge": (
        fn.hinge(),
        lambda z, t: np.maximum(0, 1 - t * z),
        lambda z, t: (-t * (t * z < 1), -z * (t * z < 1)),
    ),
}
SHAPE = (5, 3, 4)
Z, T = 2 * RNG.normal(size=SHAPE), RNG.uniform(size=SHAPE)
MASK = RNG.uniform(size=SHAPE) < 0.5
MASK[1], MASK[2] = False, True
DY = np.linspace(-1, 2, 5)
KEPT = np.maximum(MASK.sum((1, 2)), 1)


def masked(t, mask=MASK):
    return {"target": t, "mask": mask}


@pytest.mark.parametrize("name", ENTRIES)
def test_values_and_gradients_are_means_over_the_entries_let_through(name, x64):
    loss, f, df = ENTRIES[name]
    values, dz, dt = pull(loss, Z, masked(T), DY)
    assert dt.keys() == {"target", "mask"}
    assert dt["mask"] is None
    np.testing.assert_allclose(values, (f(Z, T) * MASK).sum((1, 2)) / KEPT, rtol=1e-12)
    g = (DY / KEPT)[:, None, None] * MASK
    for got, slope in zip((dz, dt["target"]), df(Z, T), strict=True):
        np.testing.assert_allclose(got, g * slope, rtol=1e-11, atol=1e-15)
        assert not np.any(got[~MASK])


@pytest.mark.parametrize("name", ["mse", "binary_cross_entropy"])
def test_they_are_those_of_the_loss_without_a_mask_on_the_entries_kept(name, x64):
    loss, mask = ENTRIES[name][0], RNG.permuted(np.tile(np.arange(12) < 7, (5, 1)), axis=1).reshape(SHAPE)
    values, dz, dt = pull(loss, Z, masked(T, mask), DY)
    wanted = pull(loss, Z[mask].reshape(5, 7), T[mask].reshape(5, 7), DY)
    for got, own in zip((values, dz[mask], dt["target"][mask]), wanted, strict=True):
        np.testing.assert_allclose(got, own.reshape(got.shape), rtol=1e-12)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", ENTRIES)
def test_what_is_held_back_has_no_influence_and_forms_no_nan(name, dtype):
    loss = ENTRIES[name][0]
    z, t, mask = jnp.asarray(Z, dtype), jnp.asarray(T, dtype), jnp.asarray(MASK)
    bad = jnp.asarray(RNG.choice([np.nan, np.inf, -np.inf, 1e4], SHAPE), dtype)
    bad_z, bad_t = (jnp.where(mask, a, bad) for a in (z, t))
    wanted = pull(loss, z, masked(t, mask))
    with jax.debug_nans(True):
        got = pull.__wrapped__(loss, bad_z, masked(bad_t, mask))
        if loss.metrics:
            accuracy = loss.metrics["accuracy"]
            right = accuracy(bad_z, masked(bad_t, mask))
            np.testing.assert_array_equal(right, accuracy(z, masked(t, mask)))
    jax.tree.map(np.testing.assert_array_equal, got, pull.__wrapped__(loss, z, masked(t, mask)))
    assert [a.dtype for a in jax.tree.leaves(got)] == [jnp.float32, dtype, dtype]
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(np.float64(a), np.float64(b), rtol=float(jnp.finfo(dtype).eps), atol=1e-7)


@pytest.mark.parametrize("name", ENTRIES)
def test_an_example_without_entries_is_0_and_does_not_count(name):
    loss = ENTRIES[name][0]
    z, t = np.full(SHAPE, np.nan, np.float32), masked(np.full(SHAPE, np.nan, np.float32), np.zeros(SHAPE, bool))
    dy = jnp.full(5, jnp.inf)
    for a in jax.tree.leaves(pull(loss, z, t, dy)):
        np.testing.assert_array_equal(a, np.zeros_like(a))
    np.testing.assert_array_equal(loss.counted(masked(T)), [True, False, True, True, True])
    np.testing.assert_array_equal(loss.counted(masked(T[:, 0, 0], MASK[:, 0, 0])), MASK[:, 0, 0])
    np.testing.assert_array_equal(loss.counted(T), np.ones(5, bool))


@pytest.mark.parametrize("name", ["binary_cross_entropy", "binary_cross_entropy, weighted", "focal", "hinge"])
def test_integers_and_booleans_are_targets_under_a_mask_too(name):
    loss = ENTRIES[name][0]
    labels = np.where(T > 0.5, 1, -1 if name == "hinge" else 0)
    z = jnp.float32(Z)
    wanted = pull(loss, z, masked(np.float32(labels)))
    for dtype in (np.int8, np.int32, *([bool, np.uint8] if name != "hinge" else [])):
        values, dz, dt = pull(loss, z, masked(labels.astype(dtype)))
        assert dt == {"target": None, "mask": None}
        np.testing.assert_array_equal(values, wanted[0])
        np.testing.assert_array_equal(dz, wanted[1])


@pytest.mark.parametrize("name", ["binary_cross_entropy", "focal", "hinge"])
def test_accuracy_is_the_share_of_the_entries_let_through(name):
    z, t = np.float32([[1, -1, 1], [1, 1, 1]]), np.float32([[1, 1, 1], [1, -1, -1] if name == "hinge" else [1, 0, 0]])
    mask = np.array([[True, True, False], [False, True, True]])
    np.testing.assert_array_equal(ENTRIES[name][0].metrics["accuracy"](z, masked(t, mask)), [0.5, 0.0])


@pytest.mark.parametrize("name", ENTRIES)
@pytest.mark.parametrize(
    ("target", "message"),
    [
        (masked(np.float32(T), np.float32(MASK)), "a mask like the target"),
        (masked(np.float32(T), np.int8(MASK)), "a mask like the target"),
        (masked(np.float32(T), MASK[:, :, :1]), "a mask like the target"),
        (masked(np.float32(T), MASK[:, 0]), "a mask like the target"),
        (masked(np.float32(T), None), "target: .., mask"),
        (masked(np.float32(T[:, :2]), MASK), "the prediction's shape"),
        (masked(jnp.asarray(T, jnp.bfloat16), MASK), "dtype"),
        ({"target": np.float32(T)}, "target: .., mask"),
        ({"target": np.float32(T), "mask": MASK, "weights": MASK}, "target: .., mask"),
        ({"labels": np.float32(T), "mask": MASK}, "target: .., mask"),
    ],
)
def test_targets_and_masks_that_do_not_fit_are_refused(name, target, message):
    refused(ENTRIES[name][0], jnp.float32(Z), target, message)


@pytest.mark.parametrize("name", ["binary_cross_entropy", "focal", "hinge"])
def test_values_are_checked_where_the_mask_lets_them_through(name):
    loss, z, bad = ENTRIES[name][0], jnp.float32(Z), np.full(SHAPE, 7)
    ok = np.where(MASK, 1, bad)
    for dtype in (np.float32, np.int32):
        loss.check(z, masked(ok.astype(dtype)))
        loss.check(z, masked(bad.astype(dtype), np.zeros(SHAPE, bool)))
        refused(loss, z, masked(bad.astype(dtype)), "values from 7")


BAD = np.where(MASK, T, np.nan).astype(np.float32)
X = np.float32(RNG.normal(size=(5, 3, 2)))


@pytest.mark.parametrize("name", ENTRIES)
def test_an_objective_takes_the_mean_over_the_examples_that_have_entries(name):
    loss, f, _ = ENTRIES[name]
    objective = fn.objective(fn.dense(4), loss)
    batch = X, masked(BAD)
    params, state = objective.init(jax.random.key(0), batch)
    (got, _), grads = jax.jit(fn.value_and_grad(objective))(params, state, batch)
    kernel, bias = (np.float64(params["model"][name]) for name in ("kernel", "bias"))
    z = np.float64(X) @ kernel + bias
    each = (f(z, T) * MASK).sum((1, 2)) / KEPT
    np.testing.assert_allclose(got, each.sum() / 4, rtol=1e-5)
    if name == "mse":
        _, grads = jax.jit(fn.value_and_grad(objective))(params, state, batch, weights=jnp.ones(5))
        each_grad = 2 * ((z - T) * MASK / KEPT[:, None, None]).sum(1)
        np.testing.assert_allclose(grads["model"]["bias"], each_grad.sum(0), rtol=1e-5)
        for contract, wanted in ((fn.per_example, each_grad), (fn.squared_norm, (each_grad**2).sum(1))):
            own = fn.value_and_grad(objective)(params, state, batch, weights=jnp.ones(5), contract=contract)[1]
            np.testing.assert_allclose(own["model"]["bias"], wanted, rtol=1e-5, atol=1e-7)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


def test_a_training_step_and_evaluate_walk_masked_targets():
    objective = fn.objective(fn.dense(4), fn.binary_cross_entropy(pos_weight=WEIGHT))
    batch = X, masked(np.float32(T))
    train_state = fn.init_train_state(objective, optax.sgd(0.1), jax.random.key(0), batch)
    params, state = train_state.params, train_state.state
    (wanted, _), _ = fn.value_and_grad(objective)(params, state, batch)
    halves = [(X[a], masked(np.float32(T[a]), MASK[a])) for a in (slice(0, 2), slice(2, 5))]
    record = fn.evaluate(objective, params, state, halves)
    right = ((np.asarray(fn.dense(4).apply(params["model"], (), X)) > 0) == (T > 0.5)) * MASK
    np.testing.assert_allclose(record["loss"], wanted, rtol=1e-5)
    np.testing.assert_allclose(record["accuracy"], (right.sum((1, 2)) / KEPT).sum() / 4, rtol=1e-5)
    for accumulate in (1, 5):
        step = fn.train_step(objective, optax.sgd(0.1), accumulate=accumulate)
        _, metrics = step(jax.tree.map(jnp.copy, train_state), batch)
        np.testing.assert_allclose(
            [metrics["loss"], metrics["accuracy"]], [record["loss"], record["accuracy"]], rtol=1e-5
        )


@pytest.mark.parametrize("name", ["huber", "binary_cross_entropy, weighted"])
def test_under_vmap_they_are_the_same(name):
    loss = ENTRIES[name][0]
    z, t = (np.stack([a, a[::-1]]).astype(np.float32) for a in (Z, T))
    mask = np.stack([MASK, MASK[::-1]])
    got = jax.vmap(lambda z, t: pull.__wrapped__(loss, z, t))(z, masked(t, mask))
    for i in range(2):
        one = pull(loss, z[i], masked(t[i], mask[i]))
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(one), strict=True):
            np.testing.assert_allclose(a[i], b, rtol=1e-5, atol=1e-7)


def test_a_cotangent_of_0_has_its_derivative_where_the_slope_is_finite():
    """Weights of examples are learned from 0 on: Ren et al. 2018, arXiv:1803.09050."""
    z, t = np.float32([[1.0], [np.inf]]), np.zeros((2, 1), np.float32)
    slope = lambda dy: pull.__wrapped__(fn.mse(), z, t, dy)[1]
    np.testing.assert_array_equal(slope(jnp.zeros(2)), np.zeros((2, 1)))
    _, tangent = jax.jvp(slope, (jnp.zeros(2),), (jnp.float32([1, 0]),))
    np.testing.assert_array_equal(tangent, [[2], [0]])


def test_a_mask_may_be_traced_where_the_target_is_not():
    z, t = jnp.float32(Z), np.float32(T)
    made = jax.jit(lambda mask: fn.hinge().apply({}, (), (z, masked(np.where(MASK, t, 9), mask))))(MASK)
    np.testing.assert_allclose(made, value(fn.hinge(), z, masked(t)), rtol=1e-6)
