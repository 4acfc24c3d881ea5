"""The one pass through model and loss: against jax.grad, with weights, and for every contraction."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import funcnet as fn

MODEL = fn.serial(fn.layer_norm(), fn.dense(8), fn.gelu(), fn.dense(5))
OBJECTIVE = fn.objective(MODEL, fn.cross_entropy(ignore_index=-1))


def setup(seed=0, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    inputs = rng.standard_normal((6, 4)).astype(dtype)
    params, state = MODEL.init(jax.random.key(seed), inputs)
    return params, state, (inputs, rng.integers(0, 5, 6).astype(np.int32))


def plain_values(params, state, batch):
    """The loss of each example, by optax and the model's forward pass."""
    return optax.softmax_cross_entropy_with_integer_labels(MODEL.apply(params, state, batch[0]), batch[1])


def test_loss_and_gradients_are_those_of_jax_grad(standard_promotion):
    params, state, batch = setup()
    (loss, new_state), grads = fn.value_and_grad(OBJECTIVE)(params, state, batch, jax.random.key(0))
    wanted, wanted_grads = jax.value_and_grad(lambda p: plain_values(p, state, batch).mean())(params)
    np.testing.assert_allclose(loss, wanted, rtol=1e-6)
    chex.assert_trees_all_close(grads, wanted_grads, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_equal_structs(grads, params)
    chex.assert_trees_all_equal_structs(new_state, state)


def test_weights_are_the_cotangent_of_the_losses(standard_promotion):
    params, state, batch = setup()
    weights = jnp.array([0.0, 2.0, -1.0, 0.5, 0.0, 3.0])
    (loss, _), grads = fn.value_and_grad(OBJECTIVE)(params, state, batch, weights=weights)
    wanted = jax.value_and_grad(lambda p: jnp.sum(weights * plain_values(p, state, batch)))(params)
    np.testing.assert_allclose(loss, wanted[0], rtol=1e-6)
    chex.assert_trees_all_close(grads, wanted[1], rtol=1e-5, atol=1e-6)


def test_per_example_gradients_with_unit_weights_are_those_of_each_loss(standard_promotion):
    params, state, batch = setup()
    ones = jnp.ones(6)
    _, grads = fn.value_and_grad(OBJECTIVE)(params, state, batch, weights=ones, contract=fn.per_example)

    def one(x, t):
        return jax.grad(lambda p: plain_values(p, state, (x[None], t[None]))[0])(params)

    chex.assert_trees_all_close(grads, jax.vmap(one)(*map(jnp.asarray, batch)), rtol=1e-4, atol=1e-6)
    _, norms = fn.value_and_grad(OBJECTIVE)(params, state, batch, weights=ones, contract=fn.squared_norm)
    wanted = jax.tree.map(lambda g: jnp.square(g).reshape(6, -1).sum(1), grads)
    chex.assert_trees_all_close(norms, wanted, rtol=1e-4, atol=1e-6)


def test_the_mean_leaves_ignored_labels_out(standard_promotion):
    params, state, (inputs, labels) = setup()
    ignored = labels.copy()
    ignored[2:4] = -1
    keep = labels != ignored
    (loss, _), _ = fn.value_and_grad(OBJECTIVE)(params, state, (inputs, ignored))
    np.testing.assert_allclose(loss, plain_values(params, state, (inputs[~keep], labels[~keep])).mean(), rtol=1e-6)


def test_hessian_vector_product_by_forward_mode_through_the_backward_pass(standard_promotion):
    params, state, batch = setup()
    tangent = jax.tree.map(lambda p: jnp.asarray(np.random.default_rng(1).standard_normal(p.shape), p.dtype), params)
    hand = jax.jvp(lambda p: fn.value_and_grad(OBJECTIVE)(p, state, batch)[1], (params,), (tangent,))[1]
    grad = jax.grad(lambda p: plain_values(p, state, batch).mean())
    chex.assert_trees_all_close(hand, jax.jvp(grad, (params,), (tangent,))[1], rtol=1e-4, atol=1e-5)


def test_metrics_come_from_the_loss_unless_given():
    assert set(OBJECTIVE.metrics) == {"accuracy"}
    assert fn.objective(MODEL, fn.cross_entropy(), metrics={}).metrics == {}
    assert fn.objective(MODEL, fn.mse()).metrics == {}


def test_any_layer_over_prediction_and_target_is_a_loss():
    squared = fn.stateless(
        "squared",
        lambda key, x: {},
        lambda params, x: (jnp.sum(jnp.square(x[0] - x[1]), axis=1), x[0] - x[1]),
        lambda params, r, dy, contract: ({}, (2 * r * dy[:, None], -2 * r * dy[:, None])),
    )
    fn.check_layer(squared, (np.ones((3, 2)), np.zeros((3, 2)))).raise_for_failure()
    params, state, (inputs, _) = setup()
    targets = np.zeros((6, 5), np.float32)
    objective = fn.objective(MODEL, squared)
    (loss, _), _ = fn.value_and_grad(objective)(params, state, (inputs, targets))
    np.testing.assert_allclose(loss, np.mean(np.sum(np.square(MODEL.apply(params, state, inputs)), 1)), rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "path", "word"),
    [
        (lambda x, t: x, (), "a batch"),
        (lambda x, t: (x, t[:-1]), (), "as many inputs as targets"),
        (lambda x, t: (x[:0], t[:0]), (), "at least one"),
        (lambda x, t: (x.tolist(), t), (), "arrays"),
        (lambda x, t: (x[:, :3], t), ("layer_norm",), "4 features"),
        (lambda x, t: (x.astype(np.int32), t), ("layer_norm",), "floating"),
        (lambda x, t: (x, t.astype(np.float32)), ("cross_entropy",), "integer labels"),
        (lambda x, t: (x, t + 5), ("cross_entropy",), "labels from 0 to 4"),
        (lambda x, t: (x, np.stack([t, t], 1)), ("cross_entropy",), "integer labels"),
    ],
)
def test_bad_batches_are_refused_by_the_layer_they_do_not_fit(change, path, word):
    params, state, batch = setup()
    with pytest.raises(fn.InputError, match=word) as caught:
        fn.value_and_grad(OBJECTIVE)(params, state, change(*batch))
    assert caught.value.path == path


def test_weights_of_another_shape_are_refused():
    params, state, batch = setup()
    with pytest.raises(fn.InputError, match=r"weights \[6\]"):
        fn.value_and_grad(OBJECTIVE)(params, state, batch, weights=jnp.ones(()))


def test_state_of_another_model_is_refused():
    params, _, batch = setup()
    with pytest.raises(fn.InputError, match="state for the layers"):
        fn.value_and_grad(OBJECTIVE)(params, (), batch)


def test_params_of_another_model_are_refused():
    params, state, batch = setup()
    other = {name: value for name, value in params.items() if name != "gelu"}
    with pytest.raises(fn.InputError, match="params for the layers"):
        fn.value_and_grad(OBJECTIVE)(other, state, batch)
    wrong = params | {"dense": {"kernel": params["dense"]["kernel"]}}
    with pytest.raises(fn.InputError, match="bias") as caught:
        fn.value_and_grad(OBJECTIVE)(wrong, state, batch)
    assert caught.value.path == ("dense",)


@pytest.mark.parametrize("name", ["loss", "weight", "step", "grad_norm", "update_norm"])
def test_a_metric_may_not_take_the_name_of_a_steps_own_number(name):
    with pytest.raises(fn.InputError, match=f"received  \\['{name}'\\]"):
        fn.objective(MODEL, fn.cross_entropy(), {name: lambda prediction, target: target})


@pytest.mark.parametrize("weights", [None, np.ones(6, np.float32), np.full(6, 0.25, np.float32)])
def test_what_does_not_count_has_no_weight_in_a_metric(weights, standard_promotion):
    params, state, (inputs, labels) = setup()
    labels = np.where(np.arange(6) < 4, labels, -1).astype(np.int32)
    right = np.mean(np.asarray(MODEL.apply(params, state, inputs)).argmax(1)[:4] == labels[:4])
    optimizer = optax.sgd(0.1)
    train_state = fn.TrainState(params, state, optimizer.init(params), jax.random.key(0), jnp.zeros((), jnp.int32))
    _, metrics = fn.train_step(OBJECTIVE, optimizer)(train_state, (inputs, labels), weights)
    np.testing.assert_allclose(metrics["accuracy"], right, rtol=1e-6)
