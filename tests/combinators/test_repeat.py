"""`repeat`: params, state and residuals are stacked, and one turn is compiled for all."""

import jax
import jax.numpy as jnp
import pytest

import funcnet as fn
from tests.trees import draw

S = jax.ShapeDtypeStruct
KEY = jax.random.key(0)
BLOCK = fn.serial(fn.dense(5), fn.tanh())


def test_repeat_keeps_an_array_once_that_two_layers_save():
    """tanh saves its output, which is the next layer's input."""
    model = fn.repeat(fn.serial(fn.tanh(), fn.dense(5)), 3)
    params, state, x = draw(model, S((2, 5), jnp.float32))
    residuals = model.fwd(params, state, x, None)[2]
    assert residuals["tanh"] is residuals["dense"]


def test_repeat_compiles_one_copy_of_its_layer():
    """A scan: the program is the same however often the layer is repeated."""

    def operations(times):
        model = fn.repeat(BLOCK, times)
        params, state, x = draw(model, S((2, 5), jnp.float32))

        def gradients(params, x):
            y, _, residuals = model.fwd(params, state, x, None)
            return model.bwd(params, residuals, y)

        return str(jax.make_jaxpr(gradients)(params, x)).count("dot_general")

    assert operations(7) == operations(2) == 3


@pytest.mark.parametrize("times", [0, -1, 2.0])
def test_repeat_refuses_no_times(times):
    with pytest.raises(fn.InputError, match="times as a positive whole number"):
        fn.repeat(fn.relu(), times)


def test_repeat_refuses_the_params_of_another_number_of_turns():
    x = jnp.ones((2, 3))
    params, state = fn.repeat(fn.dense(3), 2).init(KEY, x)
    for call in (
        lambda: fn.repeat(fn.dense(3), 3).apply(params, state, x),
        lambda: fn.repeat(fn.dense(3), 3).fwd(params, state, x, None),
    ):
        with pytest.raises(fn.InputError, match="a first axis of 3 layers"):
            call()


def test_a_state_of_another_depth_is_refused():
    x = jnp.ones((2, 6))
    _, of_two = fn.repeat(fn.freeze(fn.dense(6)), 2).init(KEY, x)
    with pytest.raises(fn.InputError, match="state stacked along a first axis of 3 layers"):
        fn.repeat(fn.freeze(fn.dense(6)), 3).apply({}, of_two, x)
