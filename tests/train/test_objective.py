"""The one pass through model and loss: against jax.grad, with weights, and for every contraction."""

import dataclasses

import chex
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import funcnet as fn
from funcnet.train.objective import as_layer
from tests.train.labelled import MODEL, OBJECTIVE, plain_values, setup


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
    np.testing.assert_allclose(
        loss, np.mean(np.sum(np.square(MODEL.apply(params["model"], state["model"], inputs)), 1)), rtol=1e-5
    )


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
        fn.value_and_grad(OBJECTIVE)(params, {"model": (), "loss": ()}, batch)


def test_params_of_another_model_are_refused():
    params, state, batch = setup()
    run, own = fn.value_and_grad(OBJECTIVE), params["model"]
    other = {name: value for name, value in own.items() if name != "gelu"}
    with pytest.raises(fn.InputError, match="params for the layers"):
        run({"model": other, "loss": {}}, state, batch)
    wrong = own | {"dense": {"kernel": own["dense"]["kernel"]}}
    with pytest.raises(fn.InputError, match="bias") as caught:
        run({"model": wrong, "loss": {}}, state, batch)
    assert caught.value.path == ("dense",)


def test_params_of_the_model_alone_are_refused_with_a_remedy_and_the_other_way_round():
    params, state, batch = setup()
    optimizer = optax.sgd(0.1)
    train_state = fn.TrainState(
        params["model"], state["model"], optimizer.init({}), jax.random.key(0), jnp.zeros((), jnp.int32)
    )
    for run in (
        lambda: fn.value_and_grad(OBJECTIVE)(params["model"], state, batch),
        lambda: fn.evaluate(OBJECTIVE, params["model"], state, [batch]),
        lambda: fn.explain(OBJECTIVE, params["model"], state, batch),
        lambda: fn.train_step(OBJECTIVE, optimizer)(train_state, batch),
        lambda: fn.layerwise_step(OBJECTIVE, optimizer)(train_state, batch),
    ):
        with pytest.raises(fn.InputError, match=r'(?s)params \{model, loss\}.*{"model": params, "loss": {}}'):
            run()
    with pytest.raises(fn.InputError, match=r'(?s)state \{model, loss\}.*{"model": state, "loss": \(\)}'):
        fn.value_and_grad(OBJECTIVE)(params, state["model"], batch)
    for layer in (MODEL, fn.dense(5)):
        with pytest.raises(fn.InputError, match=r'pass params\["model"\]'):
            layer.apply(params, state, batch[0])


@pytest.mark.parametrize("name", ["loss", "weight", "step", "grad_norm", "update_norm", "skipped"])
def test_a_metric_may_not_take_the_name_of_a_steps_own_number(name):
    with pytest.raises(fn.InputError, match=f"received  \\['{name}'\\]"):
        fn.objective(MODEL, fn.cross_entropy(), {name: lambda prediction, target: target})


@pytest.mark.parametrize("weights", [None, np.ones(6, np.float32), np.full(6, 0.25, np.float32)])
def test_what_does_not_count_has_no_weight_in_a_metric(weights, standard_promotion):
    params, state, (inputs, labels) = setup()
    labels = np.where(np.arange(6) < 4, labels, -1).astype(np.int32)
    right = np.mean(np.asarray(MODEL.apply(params["model"], state["model"], inputs)).argmax(1)[:4] == labels[:4])
    optimizer = optax.sgd(0.1)
    train_state = fn.TrainState(params, state, optimizer.init(params), jax.random.key(0), jnp.zeros((), jnp.int32))
    _, metrics = fn.train_step(OBJECTIVE, optimizer)(train_state, (inputs, labels), weights)
    np.testing.assert_allclose(metrics["accuracy"], right, rtol=1e-6)


# A loss with parameters of its own

BODY = fn.serial(fn.dense(6), fn.tanh())
HEAD = fn.objective(BODY, fn.linear_cross_entropy(5, chunk=12))
WHOLE = fn.objective(fn.serial(*BODY.parts.values(), head=fn.dense(5)), fn.cross_entropy())


def with_head(seed=0):
    """Params and batch of HEAD, and the same params of WHOLE."""
    _, _, batch = setup(seed)
    params, state = HEAD.init(jax.random.key(seed), batch)
    assert state == {"model": {"dense": (), "tanh": ()}, "loss": ()}
    return params, state, batch, {"model": params["model"] | {"head": params["loss"]}, "loss": {}}


def test_params_and_state_are_the_models_and_the_losss():
    params, _, batch, _ = with_head()
    assert params.keys() == {"model", "loss"}
    assert params["loss"]["kernel"].shape == (6, 5)
    chex.assert_trees_all_equal(params["model"], BODY.init(jax.random.key(0), batch[0])[0])
    plain, _ = OBJECTIVE.init(jax.random.key(0), batch)
    chex.assert_trees_all_equal(plain, {"model": MODEL.init(jax.random.key(0), batch[0])[0], "loss": {}})


@pytest.mark.parametrize("contract", [fn.total, fn.per_example, fn.squared_norm, fn.rows])
def test_loss_and_gradients_are_those_of_a_model_that_ends_with_the_head(contract):
    params, state, batch, whole = with_head()
    weights = jnp.linspace(-1.0, 2.0, 6)
    found = jax.jit(lambda p: fn.value_and_grad(HEAD)(p, state, batch, weights=weights, contract=contract))
    (loss, new_state), grads = found(params)
    states = WHOLE.init(jax.random.key(0), batch)[1]
    (wanted, _), wanted_grads = fn.value_and_grad(WHOLE)(whole, states, batch, weights=weights, contract=contract)
    np.testing.assert_allclose(loss, wanted, rtol=1e-5)
    assert new_state == state
    head = wanted_grads["model"].pop("head")
    chex.assert_trees_all_close(grads, wanted_grads | {"loss": head}, rtol=1e-4, atol=1e-6)


def test_with_total_the_passes_of_the_loss_are_made_at_once_and_else_one_by_one():
    params, state, batch, _ = with_head()
    calls = []

    def noted(name, f):
        return lambda *args: calls.append(name) or f(*args)

    loss = HEAD.loss
    fwd, bwd = noted("fwd", loss.fwd), noted("bwd", loss.bwd)
    ahead = loss.ahead._replace(run=noted("at once", loss.ahead.run), fwd=fwd, bwd=bwd)
    objective = dataclasses.replace(HEAD, loss=dataclasses.replace(loss, fwd=fwd, bwd=bwd, ahead=ahead))
    at_once = fn.value_and_grad(objective)(params, state, batch)
    assert calls == ["at once"]
    calls.clear()
    one_by_one = fn.value_and_grad(objective)(params, state, batch, contract=dataclasses.replace(fn.total))
    assert calls == ["fwd", "bwd"]
    chex.assert_trees_all_close(at_once, one_by_one, rtol=1e-5, atol=1e-6)


def test_factors_of_the_head_are_kept_like_the_models():
    params, state, batch, _ = with_head()
    _, kept = fn.value_and_grad(HEAD)(params, state, batch, contract=fn.keep)
    _, grads = fn.value_and_grad(HEAD)(params, state, batch)
    later = jax.tree.map(fn.total, kept, params, is_leaf=fn.is_factor)
    chex.assert_trees_all_close(later, grads, rtol=1e-5, atol=1e-6)


def centre():
    """A loss with parameters, state and randomness: |y - c + noise|^2, c learnt; its state counts the calls."""
    base = fn.stateless(
        "centre",
        lambda key, x: {"centre": jnp.ones(x[0].shape[1], x[0].dtype)},
        lambda params, x: (jnp.sum(jnp.square(x[0] - params["centre"][None]), axis=1), x[0]),
        lambda params, y, dy, contract: (
            {"centre": contract(fn.Shift(-2 * dy[:, None] * (y - params["centre"][None])), params["centre"])},
            (2 * dy[:, None] * (y - params["centre"][None]), None),
        ),
    )

    def fwd(params, count, x, key):
        values, _, residuals = base.fwd(params, (), x, None)
        return values, count + 1, (residuals, jax.random.key_data(key))

    def bwd(params, residuals, dy, contract=fn.total):
        return base.bwd(params, residuals[0], dy, contract)

    def init(key, x):
        return base.init(key, x)[0], jnp.zeros((), jnp.int32)

    return dataclasses.replace(base, init=init, fwd=fwd, bwd=bwd)


def test_a_losss_state_is_threaded_and_it_has_a_key_of_its_own():
    _, _, batch = setup()
    objective = fn.objective(BODY, centre())
    params, state = objective.init(jax.random.key(0), batch)
    assert state["loss"] == 0
    (_, state), grads = fn.value_and_grad(objective)(params, state, batch, jax.random.key(1))
    assert state["loss"] == 1
    y = BODY.apply(params["model"], state["model"], batch[0])
    np.testing.assert_allclose(grads["loss"]["centre"], -2 * np.mean(y - 1, axis=0), rtol=1e-5)


def test_params_without_the_losss_are_refused_by_the_loss():
    params, state, batch, _ = with_head()
    with pytest.raises(fn.InputError, match="kernel") as caught:
        fn.value_and_grad(HEAD)({"model": params["model"], "loss": {}}, state, batch)
    assert caught.value.path == ("linear_cross_entropy",)


def test_a_model_may_have_layers_called_model_and_loss():
    objective = fn.objective(fn.serial(model=fn.dense(2), loss=fn.relu()), fn.mse())
    batch = np.ones((3, 4), np.float32), np.ones((3, 2), np.float32)
    params, state = objective.init(jax.random.key(0), batch)
    assert params["model"].keys() == {"model", "loss"}
    _, grads = fn.value_and_grad(objective)(params, state, batch)
    chex.assert_trees_all_equal_structs(grads, params)


def test_mixed_around_a_head_and_its_loss(standard_promotion):
    _, _, batch = setup()
    objective = fn.objective(fn.mixed(BODY), fn.mixed(HEAD.loss))
    params, state = objective.init(jax.random.key(0), batch)
    (loss, _), grads = fn.value_and_grad(objective)(params, state, batch)
    (wanted, _), wanted_grads = fn.value_and_grad(HEAD)(params, state, batch)
    assert {leaf.dtype for leaf in jax.tree.leaves((loss, grads, params))} == {jnp.dtype(jnp.float32)}
    np.testing.assert_allclose(loss, wanted, rtol=1e-2)
    for g, w in zip(jax.tree.leaves(grads), jax.tree.leaves(wanted_grads), strict=True):
        np.testing.assert_allclose(g, w, atol=0.03 * np.abs(w).max())


def test_no_example_has_a_gradient_of_its_own_where_the_loss_mixes_them():
    params, state, (inputs, _) = setup()
    batch = inputs, np.ones((6, 5), np.float32)
    objective = fn.objective(MODEL, fn.contrastive())
    assert np.isfinite(fn.value_and_grad(objective)(params, state, batch)[0][0])
    for contract in (fn.per_example, fn.squared_norm):
        with pytest.raises(fn.InputError, match="depends on all others"):
            fn.value_and_grad(objective)(params, state, batch, contract=contract)


def test_an_objective_is_a_layer_over_batches():
    for objective in (HEAD, WHOLE):
        fn.check_layer(as_layer(objective), ("f32[4,3]", "i32[4]<5"), oracles=("autodiff",)).raise_for_failure()


@pytest.mark.parametrize("metrics", [{"m": 3}, {"m": None}, [1], [("m", len)], 3, "m", len])
def test_metrics_that_are_no_functions_by_name_are_refused(metrics):
    with pytest.raises(fn.InputError, match="metrics as functions by their names"):
        fn.objective(MODEL, fn.cross_entropy(), metrics)
