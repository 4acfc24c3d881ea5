"""What the functions of training refuse: batches, train states, optimizers, objectives that are none."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import funcnet as fn
from tests.train.small import MODEL, OBJECTIVE, OPTIMIZER, batches, fresh

pytestmark = pytest.mark.usefixtures("standard_promotion")


def test_a_state_that_was_donated_is_refused_with_the_reason():
    state = fresh()
    fn.fit(OBJECTIVE, OPTIMIZER, state, batches(), 1)
    for use in (
        lambda: fn.fit(OBJECTIVE, OPTIMIZER, state, batches(), 1),
        lambda: fn.evaluate(OBJECTIVE, state.params, state.state, [next(batches())]),
        lambda: fn.value_and_grad(OBJECTIVE)(state.params, state.state, next(batches()), state.key),
        lambda: fn.train_step(OBJECTIVE, OPTIMIZER)(state, next(batches())),
        lambda: fn.layerwise_step(OBJECTIVE, OPTIMIZER)(state, next(batches())),
    ):
        with pytest.raises(fn.InputError, match="the train state that the last step returned"):
            use()


def test_what_is_no_objective_and_no_optimizer_is_refused():
    with pytest.raises(fn.InputError, match="an objective"):
        fn.fit(MODEL, OPTIMIZER, fresh(), batches(), 1)
    with pytest.raises(fn.InputError, match="an optax optimizer"):
        fn.fit(OBJECTIVE, optax.adam, fresh(), batches(), 1)
    with pytest.raises(fn.InputError, match="an objective"):
        fn.evaluate(MODEL, {}, (), [next(batches())])


class Tensor:
    """An array of another library: its dtype is its own."""

    def __init__(self, array):
        self.shape, self.ndim, self.dtype = (
            array.shape,
            array.ndim,
            type("dtype", (), {"__str__": lambda d: "torch.float32"})(),
        )


@pytest.mark.parametrize("place", [0, 1, 2], ids=["inputs", "targets", "weights"])
def test_tensors_of_another_library_are_refused_with_the_remedy(place):
    state, batch = fresh(), [*next(batches()), np.ones(8, np.float32)]
    batch[place] = Tensor(batch[place])
    for use in (
        lambda: fn.init_train_state(OBJECTIVE, OPTIMIZER, jax.random.key(0), batch),
        lambda: fn.evaluate(OBJECTIVE, state.params, state.state, [batch]),
        lambda: fn.value_and_grad(OBJECTIVE)(state.params, state.state, batch),
        lambda: fn.train_step(OBJECTIVE, OPTIMIZER)(state, batch),
        lambda: fn.layerwise_step(OBJECTIVE, OPTIMIZER)(state, batch),
        lambda: fn.fit(OBJECTIVE, OPTIMIZER, state, [batch], 1),
    ):
        with pytest.raises(
            fn.InputError, match=r"received  torch.float32\[8(, 6)?\]\n  remedy    convert it with x.numpy"
        ) as caught:
            use()
        assert caught.value.path == (("inputs", "targets", "weights")[place],)


@pytest.mark.parametrize("place", [0, 1, 2], ids=["inputs", "targets", "weights"])
def test_shapes_in_place_of_arrays_are_refused_where_values_are_needed(place):
    state, batch = fresh(), [*next(batches()), np.ones(8, np.float32)]
    batch[place] = jax.ShapeDtypeStruct(batch[place].shape, batch[place].dtype)
    for use in (
        lambda: fn.evaluate(OBJECTIVE, state.params, state.state, [batch]),
        lambda: fn.value_and_grad(OBJECTIVE)(state.params, state.state, batch),
        lambda: fn.train_step(OBJECTIVE, OPTIMIZER)(state, batch),
        lambda: fn.layerwise_step(OBJECTIVE, OPTIMIZER)(state, batch),
        lambda: fn.fit(OBJECTIVE, OPTIMIZER, state, [batch], 1),
        lambda: fn.fit(OBJECTIVE, OPTIMIZER, state, batches(), 1, validation=[batch]),
    ):
        with pytest.raises(fn.InputError, match="only the shape of one"):
            use()
    shape, batch = jax.ShapeDtypeStruct((8,), jnp.float32), next(batches())
    for use in (
        lambda: fn.value_and_grad(OBJECTIVE)(state.params, state.state, batch, weights=shape),
        lambda: fn.train_step(OBJECTIVE, OPTIMIZER)(state, batch, shape),
    ):
        with pytest.raises(fn.InputError, match="only the shape of one"):
            use()


STEPS = {
    "fit": lambda optimizer, state: fn.fit(OBJECTIVE, optimizer, state, batches(), 1),
    "train_step": lambda optimizer, state: fn.train_step(OBJECTIVE, optimizer)(state, next(batches())),
    "lower": lambda optimizer, state: fn.train_step(OBJECTIVE, optimizer).lower(state, next(batches())),
    "layerwise_step": lambda optimizer, state: fn.layerwise_step(OBJECTIVE, optimizer)(state, next(batches())),
}


@pytest.mark.parametrize("name", STEPS)
def test_what_is_no_train_state_of_the_optimizer_is_refused(name):
    state = fresh()
    for given in (None, 3, state.params, (state.params, state.state)):
        with pytest.raises(fn.InputError, match="expected  a train state"):
            STEPS[name](OPTIMIZER, given)
    with pytest.raises(
        fn.InputError, match=r"\(TraceState, EmptyState\)\n  received  \(ScaleByAdamState, EmptyState\)"
    ):
        STEPS[name](optax.sgd(0.1, momentum=0.9), state)
    with pytest.raises(fn.InputError, match="received  NoneType"):
        STEPS[name](OPTIMIZER, replace(state, opt_state=None))
    other = fn.init_train_state(
        fn.objective(fn.dense(3), fn.cross_entropy()), OPTIMIZER, jax.random.key(0), next(batches())
    )
    with pytest.raises(fn.InputError, match="for other params"):
        STEPS[name](OPTIMIZER, replace(state, opt_state=other.opt_state))


@pytest.mark.parametrize("given", [None, 3, 1.5, next])
def test_what_are_no_batches_is_refused(given):
    state = fresh()
    with pytest.raises(fn.InputError, match="batches to walk through"):
        fn.fit(OBJECTIVE, OPTIMIZER, state, given, 1)
    with pytest.raises(fn.InputError, match="batches to walk through"):
        fn.evaluate(OBJECTIVE, state.params, state.state, given)
    if given is not None:
        with pytest.raises(fn.InputError, match="validation to walk through"):
            fn.fit(OBJECTIVE, OPTIMIZER, state, batches(), 1, validation=given)
