"""Updating layer by layer gives what updating all at once gives, in less memory, and refuses where it would not."""

from dataclasses import replace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import funcnet as fn

pytestmark = pytest.mark.usefixtures("standard_promotion")

RNG = np.random.default_rng(0)
BATCH = (RNG.standard_normal((6, 7)).astype(np.float32), RNG.integers(0, 5, 6).astype(np.int32))


def block():
    return fn.skip(fn.serial(fn.layer_norm(), fn.dense(8), fn.relu(), fn.dropout(0.2)))


MODEL = fn.serial(
    fn.dense(8),
    deep=fn.repeat(block(), 3),
    one=block(),
    saving=fn.remat(fn.serial(fn.dense(8), fn.gelu())),
    deep_and_saving=fn.repeat(fn.remat(block()), 2),
    nested=fn.repeat(fn.serial(fn.repeat(fn.dense(8), 2), fn.tanh()), 2),
    half=fn.mixed(fn.dense(8)),
    head=fn.dense(5),
)

SMALL = fn.serial(fn.dense(8), fn.repeat(fn.skip(fn.serial(fn.dense(8), fn.tanh())), 2), fn.dense(5))


def both(model, optimizer, loss=None, batch=BATCH, steps=2, weights=None):
    objective = fn.objective(model, loss or fn.cross_entropy())
    ends = []
    for make in (fn.train_step, fn.layerwise_step):
        step, state = make(objective, optimizer), fn.init_train_state(objective, optimizer, jax.random.key(0), batch)
        for _ in range(steps):
            state, metrics = step(state, batch, weights)
        ends.append((state, metrics))
    return ends


OPTIMIZERS = {
    "sgd": optax.sgd(0.1, momentum=0.9, nesterov=True),
    "adam": optax.adam(1e-2),
    "adamw": optax.adamw(optax.warmup_cosine_decay_schedule(0.0, 1e-2, 2, 10), weight_decay=0.1),
    "clipped by value": optax.chain(optax.clip(0.01), optax.rmsprop(1e-3)),
    "lion": optax.lion(1e-3),
    "injected": optax.inject_hyperparams(optax.adam)(learning_rate=1e-2),
    "with params in its state": optax.contrib.schedule_free_adamw(1e-2),
    "masked": optax.masked(
        optax.adam(1e-2), lambda p: jax.tree_util.tree_map_with_path(lambda path, _: "bias" not in str(path[-1]), p)
    ),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_ends_where_the_ordinary_step_ends(name):
    model = MODEL if name == "adam" else SMALL
    (plain, metrics), (layerwise, own_metrics) = both(model, OPTIMIZERS[name])
    chex.assert_trees_all_equal_structs(plain, layerwise)
    chex.assert_trees_all_equal_shapes_and_dtypes(replace(plain, key=None), replace(layerwise, key=None))
    for hand, wanted in zip(jax.tree.leaves(layerwise), jax.tree.leaves(plain), strict=True):
        if jnp.issubdtype(wanted.dtype, jax.dtypes.prng_key):
            continue
        scale = np.max(np.abs(np.asarray(wanted, np.float64)), initial=0)
        np.testing.assert_allclose(np.asarray(hand, np.float64), np.asarray(wanted, np.float64), atol=2e-5 * scale)
    assert own_metrics.keys() == {"loss", "accuracy"}
    for name, value in own_metrics.items():
        np.testing.assert_allclose(value, metrics[name], rtol=1e-5)


@pytest.mark.parametrize(
    "model",
    [fn.dense(5), fn.repeat(fn.dense(7), 2), fn.serial(fn.repeat(fn.relu(), 2), fn.dense(5)), fn.skip(fn.dense(7))],
    ids=["dense", "repeat", "repeat without params", "skip"],
)
def test_models_that_are_one_layer(model):
    with jax.enable_x64(True):
        batch = (BATCH[0].astype(np.float64), BATCH[1])
        (plain, _), (layerwise, _) = both(model, optax.adam(1e-2), batch=batch)
        chex.assert_trees_all_close(layerwise.params, plain.params, rtol=1e-12)


def test_weights_state_and_losses_that_are_not_a_mean():
    weights = np.linspace(0, 1, 6).astype(np.float32)
    (plain, metrics), (layerwise, own) = both(SMALL, optax.sgd(0.1), weights=weights)
    chex.assert_trees_all_close(layerwise.params, plain.params, rtol=2e-5, atol=1e-7)
    np.testing.assert_allclose(own["loss"], metrics["loss"], rtol=1e-6)


def by_dimension(params):
    return jax.tree.map(lambda p: p.ndim > 1, params)


REFUSED = {
    "clipping by global norm": (optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2)), "reduce_sum"),
    "clipping by block": (optax.chain(optax.clip_by_block_rms(1.0), optax.sgd(0.1)), "reduce"),
    "lamb": (optax.lamb(1e-3), "reduce"),
    "adafactor": (optax.adafactor(1e-3), "reduce"),
    "apply_if_finite": (optax.apply_if_finite(optax.sgd(0.1), 2), "reduce_and"),
    "noise": (optax.chain(optax.add_noise(0.1, 0.5, key=0), optax.sgd(0.1)), "in another way"),
    "a mask that sees the axis of repeat": (optax.adamw(1e-2, mask=by_dimension), "in another way"),
    "one sorted": (optax.stateless(lambda g, p: jax.tree.map(lambda u: jnp.sort(u, axis=0), g)), "sort"),
    "one turned": (optax.stateless(lambda g, p: jax.tree.map(lambda u: u.T.reshape(u.shape), g)), "transpose"),
    "a leaf with another": (
        optax.stateless(lambda g, p: g | {"head": {"kernel": g["head"]["kernel"], "bias": g["head"]["kernel"][0]}}),
        "",
    ),
    "scaled by the number of leaves": (
        optax.stateless(lambda g, p: jax.tree.map(lambda u: u / len(jax.tree.leaves(g)), g)),
        "in another way",
    ),
    "l-bfgs": (optax.lbfgs(), ""),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_optimizer_that_needs_more_than_each_number_is_refused_before_anything_is_lost(name):
    optimizer, why = REFUSED[name]
    model = fn.serial(fn.dense(8), deep=fn.repeat(fn.dense(8), 3), head=fn.dense(5))
    objective = fn.objective(model, fn.cross_entropy())
    state = fn.init_train_state(objective, optimizer, jax.random.key(0), BATCH)
    with pytest.raises(fn.InputError, match="treats every number by itself") as error:
        fn.layerwise_step(objective, optimizer)(state, BATCH)
    assert why in error.value.received
    assert "train_step" in error.value.remedy
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(state))


def program(depth, width=64, examples=16, make=fn.layerwise_step):
    model = fn.serial(fn.repeat(fn.skip(fn.serial(fn.layer_norm(), fn.dense(width), fn.relu())), depth))
    objective, optimizer = fn.objective(model, fn.mse()), optax.adam(1e-3)
    x = jnp.zeros((examples, width))
    state = jax.eval_shape(lambda key: fn.init_train_state(objective, optimizer, key, (x, x)), jax.random.key(0))
    return make(objective, optimizer).lower(state, (x, x)), state


def test_temporary_memory_is_the_activations_and_two_layers():
    depth, width, examples = 32, 128, 16
    lowered, state = program(depth, width, examples)
    of_layers = sum(leaf.size * 4 for leaf in jax.tree.leaves((state.params, state.opt_state)))
    kept = fn.summary(fn.serial(fn.repeat(fn.skip(fn.serial(fn.layer_norm(), fn.dense(width), fn.relu())), depth)),
                      jax.ShapeDtypeStruct((examples, width), "float32")).residual_bytes  # fmt: skip
    temp = lowered.compile().memory_analysis().temp_size_in_bytes
    assert temp <= kept + 2 * of_layers / depth
    ordinary, _ = program(depth, width, examples, fn.train_step)
    assert ordinary.compile().memory_analysis().temp_size_in_bytes > kept + of_layers / 4


def test_the_program_does_not_grow_with_the_depth():
    short, long = (program(depth)[0].as_text().count("\n") for depth in (4, 40))
    assert short == long


def test_the_state_is_donated_and_the_step_traces_once():
    model = replace(SMALL, fwd=chex.assert_max_traces(SMALL.fwd, n=1))
    objective, optimizer = fn.objective(model, fn.cross_entropy()), optax.adam(1e-2)
    step, state = (
        fn.layerwise_step(objective, optimizer),
        fn.init_train_state(objective, optimizer, jax.random.key(0), BATCH),
    )
    chex.clear_trace_counter()
    after, _ = step(state, BATCH)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((state.params, state.opt_state)))
    step(after, BATCH)


def test_a_batch_and_params_that_do_not_fit_are_refused():
    objective, optimizer = fn.objective(SMALL, fn.cross_entropy()), optax.adam(1e-2)
    step, state = (
        fn.layerwise_step(objective, optimizer),
        fn.init_train_state(objective, optimizer, jax.random.key(0), BATCH),
    )
    with pytest.raises(fn.InputError, match="as many inputs as targets"):
        step(state, (BATCH[0][:3], BATCH[1]))
    with pytest.raises(fn.InputError, match="7 features"):
        step(state, (BATCH[0][:, :4], BATCH[1]))
    with pytest.raises(fn.InputError, match="floating weights"):
        step(state, BATCH, np.ones(6, np.int32))


def test_a_rule_that_was_replaced_is_not_bypassed():
    inner = fn.serial(fn.dense(4), fn.tanh())

    def halved(params, residuals, dy, contract=fn.total):
        dparams, dx = inner.bwd(params, residuals, dy, contract)
        return jax.tree.map(lambda g: g / 2, dparams), dx

    model = fn.serial(replace(inner, bwd=halved), fn.dense(5))
    (plain, _), (layerwise, _) = both(model, optax.sgd(0.1))
    chex.assert_trees_all_close(layerwise.params, plain.params, rtol=1e-6)


def test_the_gradient_is_handed_on_to_an_optimizer_that_asks_for_it():
    def update(updates, state, params=None, *, grad=None, **_):
        return jax.tree.map(lambda u, g: -0.1 * (u + g), updates, grad), state

    optimizer = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    (plain, _), (layerwise, _) = both(SMALL, optimizer)
    chex.assert_trees_all_close(layerwise.params, plain.params, rtol=1e-5)


@pytest.mark.parametrize("name", ["adam", "masked", "injected"])
def test_a_loss_with_parameters_is_updated_first(name):
    """Its parameters, the model's and the optimizer's state end where those of the ordinary step end."""
    model = fn.serial(fn.dense(8), fn.repeat(fn.skip(fn.dense(8)), 2))
    (plain, metrics), (layerwise, own) = both(model, OPTIMIZERS[name], fn.linear_cross_entropy(5))
    assert plain.params.keys() == {"model", "loss"}
    plain, layerwise = (replace(state, key=None) for state in (plain, layerwise))
    chex.assert_trees_all_equal_structs(plain, layerwise)
    chex.assert_trees_all_close(layerwise, plain, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(own["loss"], metrics["loss"], rtol=1e-5)
    assert np.abs(layerwise.params["loss"]["bias"]).max() > 1e-3  # it began at 0
