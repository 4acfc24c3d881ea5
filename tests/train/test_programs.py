"""Compiled programs are kept for the next call, and freed with their objective."""

import gc
import weakref

import chex
import jax
import jax.numpy as jnp
import optax
import pytest

import funcnet as fn
from funcnet.train import programs
from tests.train.small import OBJECTIVE, OPTIMIZER, batches, fresh

pytestmark = pytest.mark.usefixtures("standard_promotion")


def kept():
    """An objective that closes over an array, both by weak references, and what it was trained on."""
    array = jnp.arange(1.0, 4.0)
    model = fn.serial(fn.dense(4), fn.batch_norm(), fn.relu(), fn.dropout(0.1), fn.repeat(fn.dense(4), 2), fn.dense(3))
    objective = fn.objective(model, fn.cross_entropy(), {"own": lambda y, t: jnp.sum(y * array[None], axis=1)})
    optimizer, data = optax.adam(1e-2), [next(batches())] * 2
    state = fn.init_train_state(objective, optimizer, jax.random.key(0), data[0])
    state, _ = fn.fit(objective, optimizer, state, data, 2, validation=data)
    fn.evaluate(objective, state.params, state.state, data)
    return [weakref.ref(thing) for thing in (objective, array, optimizer.update)]


def test_fit_and_evaluate_let_an_objective_go_with_all_that_it_holds():
    before, gone = len(programs._programs), kept()
    gc.collect()
    assert [reference() for reference in gone] == [None] * 3
    assert len(programs._programs) <= before


@pytest.fixture
def compiled():
    """The compilations so far, as a list that grows."""
    events = []
    listen = lambda name, *args, **kwargs: events.append(name) if "backend_compile" in name else None
    jax.monitoring.register_event_duration_secs_listener(listen)
    yield events
    jax.monitoring.unregister_event_duration_listener(listen)


def test_the_same_call_again_compiles_nothing_and_another_one_does(compiled):
    objective = fn.objective(fn.serial(fn.dense(3)), fn.cross_entropy())
    other = fn.objective(fn.serial(fn.dense(3)), fn.cross_entropy(label_smoothing=0.5))
    optimizer, data = optax.sgd(0.1), [next(batches())] * 4
    start = lambda: fn.init_train_state(objective, optimizer, jax.random.key(0), data[0])

    def fitted(objective=objective, optimizer=optimizer, **options):
        return fn.fit(objective, optimizer, start(), data, 4, log_every=4, validation=data, **options)

    def again(call):
        before = len(compiled)
        result = call()
        return len(compiled) - before, result

    first, (_, wanted) = again(fitted)
    assert first > 0
    for _ in range(2):
        count, (_, history) = again(fitted)
        assert (count, history) == (0, wanted)
    scored = lambda objective=objective: fn.evaluate(objective, start().params, start().state, data)
    again(scored)
    assert again(scored)[0] == 0
    for change in ({"steps_per_call": 2}, {"accumulate": 2}, {"optimizer": optax.sgd(0.2)}):
        assert again(lambda change=change: fitted(**change))[0] > 0
        assert again(lambda change=change: fitted(**change))[0] == 0
    assert fitted(other)[1] != wanted
    assert scored(other) != scored()
    assert again(fitted)[0] == 0


class Unhashable(list):
    """An optimizer that cannot be a key."""

    init, update = staticmethod(OPTIMIZER.init), staticmethod(OPTIMIZER.update)


def test_an_optimizer_that_cannot_be_hashed_trains_all_the_same():
    state, _ = fn.fit(OBJECTIVE, Unhashable(), fresh(), batches(), 2)
    wanted, _ = fn.fit(OBJECTIVE, OPTIMIZER, fresh(), batches(), 2)
    chex.assert_trees_all_equal(state.params, wanted.params)
