"""`freeze` makes state of params, which nothing moves."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import funcnet as fn
from funcnet._internal.casting import cast
from tests.trees import assert_same, draw, dtypes, normal

S = jax.ShapeDtypeStruct
KEY = jax.random.key(0)


def test_frozen_params_are_state_and_the_rest_is_as_before(x64):
    layer = fn.serial(fn.dense(4), fn.tanh(), fn.dense(3))
    params, state, x = draw(layer, S((5, 2), jnp.float64))
    frozen = fn.freeze(layer)
    assert (frozen.name, frozen.parts) == (layer.name, layer.parts)
    assert_same(frozen.init(KEY, x), ({}, fn.Frozen(*layer.init(KEY, x))))
    y, _, residuals = layer.fwd(params, state, x, None)
    z, new, frozen_residuals = frozen.fwd({}, fn.Frozen(params, state), x, None)
    assert_same((z, frozen.apply({}, new, x)), (y, y))
    assert_same(new, fn.Frozen(params, state))
    for contract in (fn.total, fn.per_example, fn.squared_norm, fn.keep):
        assert_same(frozen.bwd({}, frozen_residuals, y, contract), ({}, layer.bwd(params, residuals, y)[1]))


def test_nothing_moves_frozen_params_not_even_weight_decay_and_the_others_move_as_they_would(standard_promotion):
    """Against the same model in which optax masks them, with a decay that would move them."""
    base, head = fn.serial(fn.dense(4), fn.tanh()), fn.dense(3)
    x = normal(3, S((6, 2), jnp.float32)), jnp.arange(6) % 3
    optimizer = optax.chain(optax.clip_by_global_norm(0.1), optax.adamw(1e-1, weight_decay=0.5))
    runs = []
    for first in (fn.freeze(base), base):
        objective = fn.objective(fn.serial(first, head), fn.cross_entropy())
        chosen = optimizer
        if first is base:
            kind = lambda path, _: "frozen" if "['serial']" in jax.tree_util.keystr(path) else "trained"
            labels = lambda params, kind=kind: jax.tree_util.tree_map_with_path(kind, params)
            chosen = optax.multi_transform({"trained": optimizer, "frozen": optax.set_to_zero()}, labels)
        state = fn.init_train_state(objective, chosen, KEY, x)
        before = jax.tree.map(np.array, state.state["model"])
        step = fn.train_step(objective, chosen, accumulate=2)
        for _ in range(3):
            state, _ = step(state, x)
        runs.append((before, state.params["model"], state.state["model"]))
    (before, params, state), (_, masked, _) = runs
    assert_same(state["serial"], before["serial"])
    assert_same(state["serial"].params, masked["serial"])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), params["dense"], masked["dense"])
    assert params["serial"] == {}


def test_a_frozen_layers_own_state_goes_on():
    counting = fn.Layer(
        "counting",
        lambda key, x: ({}, jnp.zeros(())),
        lambda params, n, x: x,
        lambda params, n, x, key: (x, n + 1, ()),
        lambda params, residuals, dy, contract=fn.total: ({}, dy),
    )
    layer = fn.freeze(fn.serial(fn.dense(2), counting))
    params, state = layer.init(KEY, S((3, 2), jnp.float32))
    new = layer.fwd(params, state, jnp.ones((3, 2)), None)[1]
    assert_same(new, fn.Frozen(state.params, {"dense": (), "counting": jnp.ones(())}))


def test_mixed_casts_frozen_params_for_the_computation_and_keeps_them_as_they_are():
    model = fn.mixed(fn.serial(fn.freeze(fn.serial(fn.dense(4), fn.freeze(fn.dense(3)))), fn.dense(2)))
    params, state, x = draw(model, S((5, 2), jnp.float32))
    assert dtypes(state) == {"float32"}
    y, new, residuals = model.fwd(params, state, x, None)
    assert_same(new, state)
    assert dtypes(residuals) == {"bfloat16"}
    assert_same(model.apply(params, state, x), y)
    wanted = fn.serial(fn.serial(fn.dense(4), fn.dense(3)), fn.dense(2))
    halved = cast(
        params | {"serial": state["serial"].params | {"dense_1": state["serial"].state["dense_1"].params}}, "bfloat16"
    )
    leafless = jax.eval_shape(wanted.init, KEY, x)[1]
    assert_same(y, wanted.apply(halved, leafless, x.astype("bfloat16")).astype("float32"))


def test_layerwise_and_explain_pass_a_frozen_layer_and_a_named_one():
    model = fn.serial(fn.dense(4), fn.freeze(fn.dense(4)), fn.named("middle", fn.serial(fn.tanh(), fn.dense(3))))
    objective = fn.objective(model, fn.cross_entropy())
    batch, optimizer = (normal(3, S((6, 2), jnp.float32)), jnp.arange(6) % 3), optax.sgd(0.1, momentum=0.9)
    fresh = lambda: fn.init_train_state(objective, optimizer, KEY, batch)
    wanted = fn.train_step(objective, optimizer)(fresh(), batch)[0]
    got = fn.layerwise_step(objective, optimizer)(fresh(), batch)[0]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), got.params, wanted.params)
    steps = fn.explain(objective, wanted.params, wanted.state, batch).steps
    gradients = {step.name: step.gradient for step in steps}
    assert list(gradients) == ["dense", "dense_1", "middle/tanh", "middle/dense"]
    assert gradients["dense_1"] is None
    assert gradients["dense"] > 0


@pytest.mark.parametrize(
    ("params", "state", "message"),
    [
        ({"kernel": 1.0}, None, "no params, {}"),
        ({}, (), "a state Frozen"),
        ({}, {"params": {}}, r"fn.Frozen\(params, state\)"),
    ],
)
def test_freeze_refuses_params_and_another_state(params, state, message):
    layer = fn.freeze(fn.dense(3))
    x = jnp.ones((2, 3))
    state = layer.init(KEY, x)[1] if state is None else state
    for call in (lambda: layer.apply(params, state, x), lambda: layer.fwd(params, state, x, None)):
        with pytest.raises(fn.InputError, match=message):
            call()


def test_a_frozen_head_and_loss_gives_the_gradient_of_what_is_below():
    objective = fn.objective(fn.dense(6), fn.freeze(fn.linear_cross_entropy(8)))
    batch = jnp.ones((3, 4)), jnp.array([0, 3, 7])
    params, state = objective.init(jax.random.key(0), batch)
    (loss, _), grads = fn.value_and_grad(objective)(params, state, batch)
    assert np.isfinite(loss)
    assert all(np.any(leaf != 0) for leaf in jax.tree.leaves(grads["model"]))
