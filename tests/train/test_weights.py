"""Weights: those in a batch are of a mean, those given as an argument of a sum."""

import dataclasses

import chex
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import funcnet as fn
from tests.train.labelled import MODEL, OBJECTIVE, plain_values, setup

MASSES = dataclasses.replace(fn.cross_entropy(ignore_index=-1), mass=lambda t: jnp.where(t < 0, 0.0, t + 1.0))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64", "bool"])
@pytest.mark.parametrize(
    "loss", [fn.cross_entropy(), fn.cross_entropy(ignore_index=-1), MASSES], ids=["", "ignore", "mass"]
)
def test_weights_in_the_batch_are_those_of_a_mean(loss, dtype, standard_promotion):
    """Against the same coefficients, made by NumPy in float64, as the argument."""
    params, state, (inputs, labels) = setup()
    if loss.counted(np.array([-1]))[0]:
        ignored = np.zeros(6, bool)
    else:
        ignored, labels = np.arange(6) == 1, np.where(np.arange(6) == 1, -1, labels).astype(np.int32)
    weights = np.array([0, 3, 1, 0.5, 2, 0]).astype(jnp.dtype(dtype))
    w = weights.astype(np.float64)
    mass = np.where(ignored, 0.0, labels + 1.0 if loss is MASSES else 1.0)
    coefficients = (np.where(ignored, 0.0, w) / np.sum(w * mass)).astype(np.float32)
    of = fn.value_and_grad(fn.objective(MODEL, loss))
    wanted = of(params, state, (inputs, labels), weights=coefficients)
    for scale in (1, 1e3, 1e38, 1e-30) if dtype == "float32" else (1,):
        chex.assert_trees_all_close(of(params, state, (inputs, labels, weights * weights.dtype.type(scale))), wanted,
                                    rtol=1e-5, atol=1e-6)  # fmt: skip


def test_weights_of_one_are_no_weights_and_of_zero_make_all_zero(standard_promotion):
    params, state, batch = setup()
    of = fn.value_and_grad(OBJECTIVE)
    plain = of(params, state, batch)
    for ones in (np.ones(6, np.float32), np.ones(6, bool), None):
        chex.assert_trees_all_close(of(params, state, (*batch, ones)), plain, rtol=1e-6)
    (loss, _), grads = of(params, state, (*batch, np.zeros(6, np.float32)))
    assert loss == 0
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(grads))


@pytest.mark.parametrize("bad", [-1.0, np.nan, np.inf, -np.inf])
def test_weights_that_cannot_be_those_of_a_mean_make_the_loss_nan(bad):
    params, state, batch = setup()
    weights = np.array([1, bad, 1, 1, 1, 1], np.float32)
    assert np.isnan(fn.value_and_grad(OBJECTIVE)(params, state, (*batch, weights))[0][0])


def test_weights_of_positions_have_the_shape_of_the_values():
    rng = np.random.default_rng(0)
    inputs, labels = rng.normal(size=(3, 4, 2)).astype(np.float32), rng.integers(0, 5, (3, 4)).astype(np.int32)
    objective = fn.objective(fn.dense(5), fn.cross_entropy())
    params, state = objective.init(jax.random.key(0), (inputs, labels, np.ones((3, 4))))
    weights = rng.uniform(0, 1, (3, 4)).astype(np.float32)
    values = optax.softmax_cross_entropy_with_integer_labels(fn.dense(5).apply(params["model"], (), inputs), labels)
    loss = fn.value_and_grad(objective)(params, state, (inputs, labels, weights))[0][0]
    np.testing.assert_allclose(loss, np.average(values, weights=weights), rtol=1e-5)
    with pytest.raises(fn.InputError, match=r"weights \[3, 4\] in the batch"):
        fn.value_and_grad(objective)(params, state, (inputs, labels, weights[:, 0]))


def test_weights_in_the_batch_and_as_an_argument_are_refused():
    params, state, batch = setup()
    ones = np.ones(6, np.float32)
    with pytest.raises(fn.InputError, match="received  both"):
        fn.value_and_grad(OBJECTIVE)(params, state, (*batch, ones), weights=ones)


@pytest.mark.parametrize("batch", [(), (1,), (1, 2, 3, 4), "xy", {"x": 1}])
def test_a_batch_is_a_pair_or_has_weights_too(batch):
    params, state, _ = setup()
    with pytest.raises(fn.InputError, match="a batch \\(inputs, targets\\) or \\(inputs, targets, weights\\)"):
        fn.value_and_grad(OBJECTIVE)(params, state, batch)


def test_weights_silence_an_infinite_loss(standard_promotion):
    logits = jnp.array([[1.0, 2.0], [0.0, -jnp.inf]])
    objective = fn.objective(fn.identity(), fn.cross_entropy())
    of = fn.value_and_grad(objective)
    batch = logits, np.array([0, 1], np.int32), np.array([2.0, 0.0], np.float32)
    np.testing.assert_allclose(
        of({"model": {}, "loss": {}}, {"model": (), "loss": ()}, batch)[0][0], np.log1p(np.e), rtol=1e-6
    )


def test_summaries_and_explanations_take_a_batch_with_weights():
    params, state, batch = setup()
    weights = np.array([1.0, 0, 0, 0, 0, 0], np.float32)
    assert (
        str(fn.summary(OBJECTIVE, (*batch, weights))).split("\n")[:-1]
        == str(fn.summary(OBJECTIVE, batch)).split("\n")[:-1]
    )
    explained = fn.explain(OBJECTIVE, params, state, (*batch, weights))
    np.testing.assert_allclose(explained.loss, plain_values(params, state, batch)[0], rtol=1e-5)


def test_weights_form_no_nan_that_is_then_overwritten():
    params, state, batch = setup()
    with jax.debug_nans(True):
        for weights in (np.arange(6.0), np.zeros(6), np.ones(6, bool)):
            assert np.isfinite(fn.value_and_grad(OBJECTIVE)(params, state, (*batch, weights))[0][0])


def test_the_derivative_by_a_weight_is_the_value_also_at_0(standard_promotion):
    params, state, batch = setup()
    loss = lambda weights: fn.value_and_grad(OBJECTIVE)(params, state, batch, weights=weights)[0][0]
    np.testing.assert_allclose(jax.grad(loss)(jnp.zeros(6)), plain_values(params, state, batch), rtol=1e-6)


WEIGHED = {
    "cross_entropy": (fn.cross_entropy(), np.arange(6, dtype=np.int32) % 3),
    "ignored": (fn.cross_entropy(ignore_index=-1), np.array([0, 1, -1, 2, 1, 0], np.int32)),
    "mse": (fn.mse(), np.random.default_rng(1).normal(size=(6, 3))),
    "head": (fn.linear_cross_entropy(5), np.arange(6, dtype=np.int32) % 5),
}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", WEIGHED)
def test_the_derivative_by_a_weight_of_the_batch_is_right_also_at_0(name, dtype, standard_promotion):
    """Of the mean, and of its gradients: against the same coefficients, given as the argument. At any scale of them."""
    loss, target = WEIGHED[name]
    with jax.enable_x64(dtype == "float64"):
        inputs = np.random.default_rng(0).normal(size=(6, 4)).astype(dtype)
        target = target.astype(dtype) if name == "mse" else target
        objective = fn.objective(fn.dense(3), loss)
        params, state = objective.init(jax.random.key(0), (inputs, target))
        of = lambda *args, **options: [
            jax.flatten_util.ravel_pytree(tree)[0]
            for tree in (lambda result: (result[0][0], result[1]))(fn.value_and_grad(objective)(*args, **options))
        ]
        counted = loss.counted(target).astype(dtype)
        given = lambda w, scale: of(params, state, (inputs, target, w * scale))
        wanted = lambda w: of(params, state, (inputs, target), weights=w * counted / jnp.sum(w * counted))
        w = jnp.array([2, 0, 3, 1, 0, 4], dtype)
        tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == "float32" else {"rtol": 1e-12, "atol": 1e-14}
        derivative, right = jax.jit(jax.jacobian(given)), jax.jit(jax.jacobian(wanted))(w)
        for scale in (1, 2.0**-120, 2.0**100):
            chex.assert_trees_all_close(derivative(w, jnp.asarray(scale, dtype)), right, **tolerance)


def test_weights_are_scaled_by_the_largest_of_what_counts():
    """A weight of an ignored label has no influence, however large."""
    params, state, (inputs, labels) = setup()
    labels = np.where(np.arange(6) == 2, -1, labels).astype(np.int32)
    weights = np.array([1, 2, 1, 3, 1, 0], np.float32) * np.float32(1e-37)
    of = lambda weights: fn.value_and_grad(OBJECTIVE)(params, state, (inputs, labels, weights))
    chex.assert_trees_all_equal(of(np.where(labels < 0, np.float32(3e38), weights)), of(weights))


def tensor(shape=(6,)):
    """An array of another library."""
    return type("Tensor", (), {"shape": shape, "ndim": len(shape), "dtype": "torch.float32"})()


@pytest.mark.parametrize(
    "weights", ["a", [1.0, [2.0]], [1.0] * 5, ["a"] * 6, [1] * 6, tensor(), [tensor()], object(), 1.0]
)
def test_coefficients_that_are_none_are_refused(weights):
    params, state, batch = setup()
    with pytest.raises(fn.InputError, match=r"floating weights|an array of NumPy or JAX"):
        fn.value_and_grad(OBJECTIVE)(params, state, batch, weights=weights)


def test_coefficients_may_be_a_list():
    params, state, batch = setup()
    of = fn.value_and_grad(OBJECTIVE)
    given = of(params, state, batch, weights=[0.5, 1.0, 0.0, 2.0, -1.0, 1.0])
    wanted = of(params, state, batch, weights=jnp.array([0.5, 1.0, 0.0, 2.0, -1.0, 1.0]))
    chex.assert_trees_all_equal(given, wanted)
