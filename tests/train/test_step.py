"""The training step: against jax.grad and optax, in micro-batches, under scan, traced once."""

from dataclasses import replace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import funcnet as fn

pytestmark = pytest.mark.usefixtures("standard_promotion")

MODEL = fn.serial(fn.dense(16), fn.relu(), fn.layer_norm(), fn.dense(5))
OBJECTIVE = fn.objective(MODEL, fn.cross_entropy())
RNG = np.random.default_rng(0)
BATCH = (RNG.standard_normal((12, 7)).astype(np.float32), RNG.integers(0, 5, 12).astype(np.int32))


def fresh(optimizer, objective=OBJECTIVE, batch=BATCH):
    return fn.init_train_state(objective, optimizer, jax.random.key(0), batch)


def test_a_hundred_steps_end_where_jax_grad_and_optax_do():
    optimizer = optax.adam(1e-2)
    state = fresh(optimizer)
    params, opt_state = state.params, optimizer.init(state.params)
    params = jax.tree.map(jnp.copy, params)

    def loss(params):
        logits = MODEL.apply(params["model"], state.state["model"], BATCH[0])
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, BATCH[1]))

    @jax.jit
    def plain(params, opt_state):
        value, grads = jax.value_and_grad(loss)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    step = fn.train_step(OBJECTIVE, optimizer)
    mine = state
    for _ in range(100):
        params, opt_state, value = plain(params, opt_state)
        mine, metrics = step(mine, BATCH)
        np.testing.assert_allclose(metrics["loss"], value, rtol=1e-3)
    chex.assert_trees_all_close(mine.params, params, rtol=2e-3, atol=2e-4)
    assert int(mine.step) == 100


def test_micro_batches_give_the_whole_batch_s_step():
    whole, whole_metrics = fn.train_step(OBJECTIVE, optax.sgd(0.5))(fresh(optax.sgd(0.5)), BATCH)
    parts, parts_metrics = fn.train_step(OBJECTIVE, optax.sgd(0.5), accumulate=4)(fresh(optax.sgd(0.5)), BATCH)
    chex.assert_trees_all_close(parts.params, whole.params, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(parts_metrics, whole_metrics, rtol=1e-5)


def test_micro_batches_share_the_weights_of_the_whole_batch():
    objective = fn.objective(MODEL, fn.cross_entropy(ignore_index=-1))
    labels = BATCH[1].copy()
    labels[[0, 1, 2, 5]] = -1  # the first of four micro-batches has no label at all
    batch = (BATCH[0], labels)
    whole, one = fn.train_step(objective, optax.sgd(0.5))(fresh(optax.sgd(0.5), objective, batch), batch)
    parts, four = fn.train_step(objective, optax.sgd(0.5), accumulate=4)(fresh(optax.sgd(0.5), objective, batch), batch)
    chex.assert_trees_all_close(parts.params, whole.params, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(four, one, rtol=1e-5)


def test_many_steps_a_call_are_the_same_steps():
    batches = [(BATCH[0] + i, BATCH[1]) for i in range(3)]
    step, one = fn.train_step(OBJECTIVE, optax.adam(1e-2)), fresh(optax.adam(1e-2))
    losses = []
    for batch in batches:
        one, metrics = step(one, batch)
        losses.append(metrics["loss"])
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *batches)
    many, metrics = fn.train_step(OBJECTIVE, optax.adam(1e-2), steps=3)(fresh(optax.adam(1e-2)), stacked)
    chex.assert_trees_all_close(many.params, one.params, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(metrics["loss"], losses, rtol=1e-5)
    assert int(many.step) == 3


def test_a_step_traces_once():
    model = replace(MODEL, fwd=chex.assert_max_traces(MODEL.fwd, n=1))
    objective = fn.objective(model, fn.cross_entropy())
    step, state = fn.train_step(objective, optax.adam(1e-2)), fresh(optax.adam(1e-2), objective)
    chex.clear_trace_counter()
    for _ in range(3):
        state, _ = step(state, BATCH)


def test_micro_batches_are_traced_once():
    model = replace(MODEL, fwd=chex.assert_max_traces(MODEL.fwd, n=1))
    objective = fn.objective(model, fn.cross_entropy())
    chex.clear_trace_counter()
    fn.train_step(objective, optax.adam(1e-2), accumulate=3)(fresh(optax.adam(1e-2), objective), BATCH)


def test_all_of_the_state_but_its_key_is_donated():
    state = fresh(optax.adam(1e-2))
    after, _ = fn.train_step(OBJECTIVE, optax.adam(1e-2))(state, BATCH)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((state.params, state.opt_state, state.step)))
    assert after.key is state.key
    assert not state.key.is_deleted()


def test_the_program_can_be_looked_at():
    state = fresh(optax.adam(1e-2))
    program = fn.train_step(OBJECTIVE, optax.adam(1e-2)).lower(state, BATCH).compile()
    assert program.memory_analysis().alias_size_in_bytes > 0
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(state))


def _sees_the_same_value():
    def update(updates, state, params, *, value, value_fn, **_):
        again = value_fn(params)
        return jax.tree.map(lambda u: -0.1 * u, updates), {"difference": again - value, "value": again}

    zero = jnp.zeros((), jnp.float32)
    return optax.GradientTransformationExtraArgs(lambda params: {"difference": zero, "value": zero}, update)


@pytest.mark.parametrize("options", [{}, {"accumulate": 2}])
@pytest.mark.parametrize("weights", [None, np.full(12, 1 / 12, np.float64)])
def test_a_float32_model_trains_in_64_bit_mode(options, weights):
    with jax.enable_x64(True):
        state = fresh(_sees_the_same_value())
        state, metrics = fn.train_step(OBJECTIVE, _sees_the_same_value(), **options)(state, BATCH, weights)
        assert {leaf.dtype for leaf in jax.tree.leaves((state.params, state.opt_state, metrics))} == {
            np.dtype("float32")
        }
        assert abs(float(state.opt_state["difference"])) < 1e-6 < float(state.opt_state["value"])


OPTIMIZERS = {
    "sgd": optax.sgd(0.1, momentum=0.9, nesterov=True),
    "adamw": optax.adamw(optax.warmup_cosine_decay_schedule(0.0, 1e-2, 5, 50)),
    "clipped": optax.chain(optax.clip_by_global_norm(0.1), optax.adam(1e-2)),
    "lion": optax.lion(1e-3),
    "lbfgs": optax.lbfgs(),
    "injected": optax.inject_hyperparams(optax.adam)(learning_rate=1e-2),
    "muon": optax.contrib.muon(1e-2),
    "schedule_free": optax.contrib.schedule_free_adamw(1e-2),
    "plateau": optax.chain(optax.adam(1e-2), optax.contrib.reduce_on_plateau()),
    "multi_steps": optax.MultiSteps(optax.adam(1e-2), 2),
    "masked": optax.adamw(1e-2, mask=lambda params: jax.tree.map(lambda p: p.ndim > 1, params)),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optax_optimizer_lowers_the_loss_in_one_trace(name):
    losses, traced = [], []

    def ones(prediction, target):
        traced.append(len(losses))  # runs while JAX traces, and never after
        return jnp.ones(target.shape)

    objective = fn.objective(MODEL, fn.cross_entropy(), {"ones": ones})
    step, state = fn.train_step(objective, OPTIMIZERS[name]), fresh(OPTIMIZERS[name])
    for _ in range(12):
        state, metrics = step(state, BATCH)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0]
    assert set(traced) == {0}


def test_metrics_are_what_they_say():
    state = fresh(optax.sgd(0.25))
    (loss, _), grads = fn.value_and_grad(OBJECTIVE)(state.params, state.state, BATCH)
    right = np.mean(np.argmax(MODEL.apply(state.params["model"], state.state["model"], BATCH[0]), 1) == BATCH[1])
    _, metrics = fn.train_step(OBJECTIVE, optax.sgd(0.25))(state, BATCH)
    norm = np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(grads)))
    wanted = {"loss": loss, "accuracy": right, "grad_norm": norm, "update_norm": norm / 4}
    chex.assert_trees_all_close(metrics, jax.tree.map(np.float32, wanted), rtol=1e-5)
    state, metrics = fn.train_step(OBJECTIVE, optax.sgd(0.25), norms=False)(fresh(optax.sgd(0.25)), BATCH)
    assert set(metrics) == {"loss", "accuracy"}


def test_weights_of_a_step_are_those_of_value_and_grad():
    weights = np.linspace(0, 1, 12, dtype=np.float32)
    state = fresh(optax.sgd(1.0))
    before = jax.tree.map(np.asarray, state.params)
    _, grads = fn.value_and_grad(OBJECTIVE)(state.params, state.state, BATCH, weights=weights)
    after, _ = fn.train_step(OBJECTIVE, optax.sgd(1.0))(state, BATCH, weights)
    chex.assert_trees_all_close(after.params, jax.tree.map(lambda p, g: p - g, before, grads), rtol=1e-5, atol=1e-6)


def test_dropout_draws_anew_each_step_and_again_the_same_from_the_same_state():
    objective = fn.objective(fn.serial(fn.dense(16), fn.dropout(0.5), fn.dense(5)), fn.cross_entropy())
    step = fn.train_step(objective, optax.sgd(0.0))

    def losses():
        state, seen = fresh(optax.sgd(0.0), objective), []
        for _ in range(2):
            state, metrics = step(state, BATCH)
            seen.append(float(metrics["loss"]))
        return seen

    assert losses() == losses()
    assert len(set(losses())) == 2


def test_half_precision_gradients_are_accumulated_in_float32():
    model = fn.mixed(fn.serial(fn.dense(4)), "bfloat16", "bfloat16", "bfloat16")
    objective = fn.objective(model, fn.mse())
    batch = (np.ones((512, 3), jnp.bfloat16), np.full((512, 4), 8, jnp.bfloat16))
    whole, _ = fn.train_step(objective, optax.sgd(0.1))(fresh(optax.sgd(0.1), objective, batch), batch)
    parts, _ = fn.train_step(objective, optax.sgd(0.1), accumulate=512)(fresh(optax.sgd(0.1), objective, batch), batch)
    chex.assert_trees_all_close(parts.params, whole.params, rtol=2**-7)
    chex.assert_trees_all_equal_dtypes(parts.params, whole.params)


@pytest.mark.parametrize(
    ("options", "batch", "word"),
    [
        ({"accumulate": 5}, BATCH, "5 micro-batches divide"),
        ({"accumulate": 0}, BATCH, "accumulate as a positive whole number"),
        ({"steps": 3}, BATCH, "a first axis of 3 steps"),
        ({"steps": 0}, BATCH, "steps as a positive whole number"),
        ({}, (BATCH[0], BATCH[1][:4]), "as many inputs as targets"),
    ],
)
def test_options_and_batches_that_do_not_fit_are_refused(options, batch, word):
    with pytest.raises(fn.InputError, match=word):
        fn.train_step(OBJECTIVE, optax.sgd(0.1), **options)(fresh(optax.sgd(0.1)), batch)


@pytest.mark.parametrize("options", [{}, {"accumulate": 2}])
@pytest.mark.parametrize("weights", [np.ones(4, np.float32), np.float32(1), np.ones(12, np.int32)])
def test_weights_that_do_not_fit_are_refused(options, weights):
    with pytest.raises(fn.InputError, match=r"floating weights \[12\]"):
        fn.train_step(OBJECTIVE, optax.sgd(0.1), **options)(fresh(optax.sgd(0.1)), BATCH, weights)


def test_where_nothing_counts_loss_and_gradients_are_zero():
    objective = fn.objective(MODEL, fn.cross_entropy(ignore_index=-1))
    batch = (BATCH[0], np.full(12, -1, np.int32))
    state = fresh(optax.sgd(1.0), objective, batch)
    before = jax.tree.map(np.asarray, state.params)
    state, metrics = fn.train_step(objective, optax.sgd(1.0))(state, batch)
    assert {name: float(value) for name, value in metrics.items()} == dict.fromkeys(metrics, 0.0)
    chex.assert_trees_all_equal(state.params, before)


def test_arrays_of_the_user_are_not_donated():
    kernel, key = jnp.ones((7, 5)), jax.random.key(0)
    model = fn.serial(fn.dense(5, kernel_init=lambda *args: kernel))
    objective = fn.objective(model, fn.cross_entropy())
    state = fn.init_train_state(objective, optax.sgd(0.1), key, BATCH)
    fn.train_step(objective, optax.sgd(0.1))(state, BATCH)
    assert not kernel.is_deleted()
    assert not key.is_deleted()


def test_what_is_no_key_and_no_layer_is_refused():
    for key in (0, None, jax.random.PRNGKey(0)):
        with pytest.raises(fn.InputError, match="a random key"):
            fn.init_train_state(OBJECTIVE, optax.sgd(0.1), key, BATCH)
    with pytest.raises(fn.InputError, match="call its constructor"):
        fn.objective(MODEL, fn.cross_entropy)
    with pytest.raises(fn.InputError, match="call its constructor"):
        fn.serial(fn.dense(2), fn.relu)


def test_labels_out_of_range_are_refused_before_training_and_nan_within_it():
    bad = (BATCH[0], BATCH[1] + 3)
    with pytest.raises(fn.InputError, match="labels from 0 to 4"):
        fresh(optax.sgd(0.1), batch=bad)
    _, metrics = fn.train_step(OBJECTIVE, optax.sgd(0.1))(fresh(optax.sgd(0.1)), bad)
    assert np.isnan(metrics["loss"])


@pytest.mark.parametrize("make", [fn.train_step, fn.layerwise_step])
def test_what_is_no_objective_and_no_optimizer_is_refused(make):
    with pytest.raises(fn.InputError, match=r"fn.objective\(model, loss\)"):
        make(MODEL, optax.sgd(0.1))
    with pytest.raises(fn.InputError, match=r"optax.adam\(1e-3\)"):
        make(OBJECTIVE, optax.adam)
    with pytest.raises(fn.InputError, match="an objective"):
        fn.init_train_state(MODEL, optax.sgd(0.1), jax.random.key(0), BATCH)


def test_a_state_that_was_donated_is_refused():
    state, step = fresh(optax.sgd(0.1)), fn.train_step(OBJECTIVE, optax.sgd(0.1))
    step(state, BATCH)
    with pytest.raises(fn.InputError, match="the train state that the last step returned"):
        step(state, BATCH)


HEAD = fn.objective(fn.serial(fn.dense(16), fn.relu()), fn.linear_cross_entropy(5, chunk=20))


@pytest.mark.parametrize("accumulate", [1, 4])
def test_a_loss_with_parameters_trains_as_a_model_that_ends_with_its_head(accumulate):
    optimizer = optax.adam(1e-2)
    state = fresh(optimizer, HEAD)
    assert state.params.keys() == state.state.keys() == {"model", "loss"}
    whole = fn.objective(fn.serial(fn.dense(16), fn.relu(), head=fn.dense(5)), fn.cross_entropy(), metrics={})
    other = fresh(optimizer, whole)
    params = jax.tree.map(jnp.copy, state.params["model"] | {"head": state.params["loss"]})
    params = {"model": params, "loss": {}}
    other = replace(other, params=params, opt_state=optimizer.init(params))
    steps = fn.train_step(HEAD, optimizer, accumulate=accumulate), fn.train_step(whole, optimizer)
    for _ in range(5):
        state, metrics = steps[0](state, BATCH)
        other, wanted = steps[1](other, BATCH)
        chex.assert_trees_all_close(metrics, wanted, rtol=1e-4)
    params = state.params["model"] | {"head": state.params["loss"]}
    chex.assert_trees_all_close(params, other.params["model"], rtol=1e-3, atol=1e-5)


def test_a_fresh_state_refuses_labels_that_the_loss_with_parameters_has_no_class_for():
    with pytest.raises(fn.InputError, match="labels from 0 to 4") as caught:
        fresh(optax.sgd(0.1), HEAD, (BATCH[0], BATCH[1] + 1))
    assert caught.value.path == ("linear_cross_entropy",)


WEIGHTS = np.array([0, 1, 2, 0.5, 0, 3, 1, 1, 0, 4, 1, 2], np.float32)


@pytest.mark.parametrize("options", [{}, {"accumulate": 3}, {"steps": 2}], ids=["plain", "micro", "scan"])
def test_weights_in_the_batch_are_those_of_the_mean_over_all_of_it(options):
    optimizer = optax.sgd(0.5)
    steps = options.get("steps", 1)
    batch = (*BATCH, WEIGHTS)
    given = jax.tree.map(lambda leaf: np.stack([leaf] * steps), batch) if "steps" in options else batch
    after, metrics = fn.train_step(OBJECTIVE, optimizer, **options)(fresh(optimizer), given)
    wanted, coefficients = fresh(optimizer), WEIGHTS / WEIGHTS.sum()
    for _ in range(steps):
        wanted, numbers = fn.train_step(OBJECTIVE, optimizer)(wanted, BATCH, coefficients)
    chex.assert_trees_all_close(after.params, wanted.params, rtol=1e-4, atol=1e-6)
    chex.assert_trees_all_close(jax.tree.map(lambda m: m.reshape(-1)[-1], metrics), numbers, rtol=1e-4)


@pytest.mark.parametrize("make", [fn.train_step, fn.layerwise_step])
def test_a_step_refuses_weights_in_the_batch_and_as_an_argument(make):
    with pytest.raises(fn.InputError, match="received  both"):
        make(OBJECTIVE, optax.sgd(0.1))(fresh(optax.sgd(0.1)), (*BATCH, WEIGHTS), WEIGHTS)


def test_a_layerwise_step_takes_weights_in_the_batch():
    optimizer = optax.sgd(0.5)
    ends = [
        make(OBJECTIVE, optimizer)(fresh(optimizer), (*BATCH, WEIGHTS)) for make in (fn.train_step, fn.layerwise_step)
    ]
    chex.assert_trees_all_close(ends[1][0].params, ends[0][0].params, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(ends[1][1]["accuracy"], ends[0][1]["accuracy"], rtol=1e-6)


def test_another_order_of_bytes_is_refused_also_once_the_step_is_compiled():
    step = fn.train_step(OBJECTIVE, optax.sgd(0.1))
    inputs, labels = BATCH
    state, _ = step(fresh(optax.sgd(0.1)), BATCH)
    for swapped in ((inputs.astype(">f4"), labels), (inputs, labels.astype(">i4"))):
        with pytest.raises(fn.InputError, match="order of bytes"):
            step(state, swapped)
