"""Each child of a combinator draws from its own fold of the key, and has its own state."""

import jax
import jax.numpy as jnp
import pytest

import funcnet as fn
from tests.trees import assert_close, assert_same, draw, turns

S = jax.ShapeDtypeStruct
KEY = jax.random.key(0)
TWO = (S((3, 5), jnp.float32),) * 2


def recording():
    """y = x, keeping the key that fwd was given."""
    return fn.Layer(
        "recording",
        lambda key, x: ({}, ()),
        lambda p, s, x: x,
        lambda p, s, x, key: (x, s, key),
        lambda p, r, dy, c=None: ({}, dy),
    )


def counting():
    """y = (1 + n) x, n the state, which grows by one with each call."""
    factor = lambda n, x: (1 + n).astype(x.dtype)
    return fn.Layer(
        "counting",
        lambda key, x: ({}, jnp.zeros((), jnp.int32)),
        lambda params, n, x: factor(n, x) * x,
        lambda params, n, x, key: (factor(n, x) * x, n + 1, factor(n, x)),
        lambda params, saved, dy, contract=fn.total: ({}, saved * dy),
    )


def folded(*path):
    key = KEY
    for i in path:
        key = jax.random.fold_in(key, i)
    return jax.random.key_data(key).tolist()


@pytest.mark.parametrize(
    ("model", "inputs", "expected"),
    [
        (fn.serial(a=recording(), b=recording()), 1, {"a": folded(0), "b": folded(1)}),
        (fn.serial(fn.dense(2), b=fn.serial(fn.relu(), c=recording())), 1, {"c": folded(1, 1)}),
        (fn.parallel(a=recording(), b=recording()), 2, {"a": folded(0), "b": folded(1)}),
        (fn.branch(a=recording(), b=recording()), 1, {"a": folded(0), "b": folded(1)}),
        (fn.skip(fn.serial(a=recording())), 1, {"a": folded(0)}),
        (fn.repeat(recording(), 2), 1, {"": [folded(0), folded(1)]}),
        (fn.serial(a=fn.repeat(fn.serial(b=recording()), 2)), 1, {"b": [folded(0, 0, 0), folded(0, 1, 0)]}),
        (fn.remat(recording()), 1, {".key": folded()}),
        (fn.mixed(fn.serial(a=recording())), 1, {"a": folded(0)}),
    ],
)
def test_child_i_draws_from_the_ith_fold_of_the_key(model, inputs, expected):
    x = jnp.ones((3, 2)) if inputs == 1 else (jnp.ones((3, 2)),) * inputs
    residuals = model.fwd(*model.init(KEY, x), x, KEY)[2]
    keys = {
        jax.tree_util.keystr(path).split("['")[-1].removesuffix("']"): jax.random.key_data(leaf).tolist()
        for path, leaf in jax.tree.leaves_with_path(residuals)
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    }
    assert keys == expected


def test_init_draws_each_child_from_its_own_fold_of_the_key():
    x = S((2, 3), jnp.float32)
    params = fn.serial(a=fn.dense(3), b=fn.dense(3), c=fn.repeat(fn.dense(3), 2)).init(KEY, x)[0]
    alone = lambda *path: fn.dense(3).init(jax.random.wrap_key_data(jnp.array(folded(*path), jnp.uint32)), x)[0]
    assert_same(params["a"], alone(0))
    assert_same(params["b"], alone(1))
    assert_same(turns(params["c"], 2), [alone(2, 0), alone(2, 1)])


def test_appending_a_layer_leaves_earlier_draws_alone():
    layers = fn.dense(4), fn.dropout(0.5)
    short, long = fn.serial(*layers), fn.serial(*layers, fn.identity(), fn.dropout(0.0))
    x = jnp.ones((8, 3))
    params, state = short.init(KEY, x)
    long_params, long_state = long.init(KEY, x)
    assert_same({name: long_params[name] for name in params}, params)
    assert_same(long.fwd(long_params, long_state, x, KEY)[0], short.fwd(params, state, x, KEY)[0])


def test_adding_a_turn_to_repeat_leaves_earlier_turns_alone():
    x = S((2, 3), jnp.float32)
    two, three = (fn.repeat(fn.dense(3), times).init(KEY, x)[0] for times in (2, 3))
    assert_same(turns(three, 2), turns(two, 2))


STATEFUL = {
    "serial": (fn.serial(counting(), fn.tanh(), counting()), TWO[0]),
    "skip": (fn.skip(fn.serial(fn.dense(5), counting())), TWO[0]),
    "repeat": (fn.repeat(fn.serial(counting(), fn.tanh()), 3), TWO[0]),
    "parallel": (fn.parallel(counting(), counting()), TWO),
    "remat": (fn.remat(fn.serial(counting(), fn.tanh(), counting())), TWO[0]),
    "branch": (fn.branch(counting(), fn.serial(fn.tanh(), counting())), TWO[0]),
}


@pytest.mark.parametrize("name", STATEFUL)
def test_state_is_threaded_and_bwd_differentiates_at_the_state_that_fwd_had(name):
    model, x = STATEFUL[name]
    params, state, x = draw(model, x)
    state = jax.tree.map(lambda n: n + 2, state)
    fn.check_layer(model, x, params=params, state=state).raise_for_failure()
    y, new_state, _ = model.fwd(params, state, x, None)
    assert_same(new_state, jax.tree.map(lambda n: n + 1, state))
    assert_close(model.apply(params, state, x), y, rtol=1e-6)


def test_repeat_stacks_params_state_and_residuals_along_a_first_axis():
    model = fn.repeat(fn.serial(fn.dense(5), counting(), fn.tanh()), 3)
    params, state, x = draw(model, S((2, 5), jnp.float32))
    residuals = model.fwd(params, state, x, None)[2]
    assert params["dense"]["kernel"].shape == (3, 5, 5)
    assert state["counting"].shape == (3,)
    assert residuals["tanh"].shape == (3, 2, 5)
