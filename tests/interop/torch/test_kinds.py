"""Which layers are modules of PyTorch's, and which are refused, though their params would fit."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

import funcnet as fn
from tests.trees import assert_same

KEY = jax.random.key(0)
S = jax.ShapeDtypeStruct
NORMED = fn.serial(fn.dense(2), fn.batch_norm())
FROZEN = fn.serial(fn.freeze(fn.dense(2)))
BACKWARD = fn.lstm(2, reverse=True)
BOTH = fn.bidirectional(fn.lstm(2), BACKWARD)
INCOMPLETE = {
    "no kernel": (fn.dense(3), {}, (), "params of dense: kernel, bias"),
    "no kernel in a repeat": (fn.repeat(fn.dense(3), 2), {}, (), "params of dense: kernel, bias"),
    "no params at all": (fn.dense(3), None, (), "params of dense: kernel, bias"),
    "no params of an activation": (fn.relu(), None, (), "params of relu: an empty dict"),
    "no scale": (fn.layer_norm(), {"bias": jnp.ones(3)}, (), "params of layer_norm: scale, bias"),
    "no gates": (fn.lstm(3), {}, (), "params of lstm: kernel, recurrent_kernel, bias"),
    "no recurrent bias": (fn.gru(1), fn.lstm(1).init(KEY, jnp.ones((1, 1, 1)))[0], (), "recurrent_bias"),
    "no heads": (fn.attention(1), {}, (), "params of attention: query, key, value, out"),
    "a head without kernel": (
        fn.attention(1),
        {name: {"kernel": jnp.ones((2, 2))} for name in ("query", "key", "value")} | {"out": {}},
        (),
        "a kernel in each of",
    ),
    "no statistics": (NORMED, NORMED.init(KEY, jnp.ones((1, 2)))[0], (), "state of batch_norm: mean, var"),
    "no state of a part": (NORMED, NORMED.init(KEY, jnp.ones((1, 2)))[0], {"batch_norm": ()}, "state for the layers"),
    "no frozen params": (FROZEN, {"dense": {}}, (), r"a state Frozen\(params, state\)"),
    "frozen params twice": (
        FROZEN,
        {"dense": {"kernel": jnp.ones((2, 2))}},
        FROZEN.init(KEY, jnp.ones((1, 2)))[1],
        r"params {} and a state Frozen",
    ),
    "numbers": (fn.dense(1), {"kernel": 1.0}, (), "float at kernel"),
    "other lengths": (
        fn.repeat(fn.dense(1), 2),
        {"kernel": jnp.ones((2, 1, 1)), "bias": jnp.ones((1, 1))},
        (),
        "stacked along a first axis of 2 layers",
    ),
}


@pytest.mark.parametrize("name", INCOMPLETE)
def test_params_and_states_that_are_not_the_layers_are_refused_both_ways(name):
    layer, params, state, message = INCOMPLETE[name]
    with pytest.raises(fn.InputError, match=message):
        fn.to_torch(layer, params, state)
    with pytest.raises(fn.InputError, match=message):
        fn.from_torch(layer, {}, params, state)


FOREIGN = {
    "reverse alone": BACKWARD,
    "reverse alone, renamed": fn.named("lstm", fn.remat(BACKWARD)),
    "reverse alone, its rule replaced": replace(BACKWARD, bwd=fn.lstm(2).bwd),
    "reverse alone, repeated": fn.repeat(BACKWARD, 2),
    "swapped": fn.bidirectional(BACKWARD, fn.lstm(2)),
    "forward twice": fn.bidirectional(fn.lstm(2), fn.lstm(2)),
    "forward and another kind": fn.bidirectional(fn.lstm(2), fn.gru(2, reverse=True)),
    "a direction inside another": fn.bidirectional(fn.lstm(2), fn.serial(BACKWARD)),
    "directions of stacks": fn.bidirectional(*[fn.stacked(fn.lstm(2), fn.lstm(2))] * 2),
    "a stack of two kinds": fn.stacked(fn.lstm(2), fn.gru(2)),
    "a stack of two directions": fn.stacked(fn.lstm(2), BACKWARD),
    "a stack in reverse": fn.stacked(BACKWARD, BACKWARD),
    "a stack of one direction and of both": fn.stacked(fn.lstm(2), BOTH),
    "a stack of two kinds, renamed": fn.stacked(fn.named("a", fn.lstm(2)), fn.named("b", fn.remat(fn.gru(2)))),
    "a stack of two sizes": fn.stacked(fn.lstm(2), fn.lstm(3)),
    "rotary positions": fn.attention(1, rotary=True),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_model_that_pytorch_has_not_is_refused_though_its_params_would_fit(name):
    layer = FOREIGN[name]
    params, state = layer.init(KEY, jnp.ones((1, 3, 2)))
    with pytest.raises(fn.InputError, match=r"recurrent layers|without rotary"):
        fn.to_torch(layer, params, state)
    with pytest.raises(fn.InputError, match=r"recurrent layers|without rotary"):
        fn.from_torch(layer, {}, params, state)


def test_a_layer_that_pytorch_has_not_is_refused():
    odd = fn.from_function(lambda p, x: x * p["w"], lambda key, x: {"w": x})
    for call in (
        lambda: fn.to_torch(fn.serial(odd=odd), {"odd": {"w": jnp.ones(2)}}),
        lambda: fn.from_torch(fn.serial(odd=odd), {}, {"odd": {"w": jnp.ones(2)}}),
    ):
        with pytest.raises(fn.InputError, match="convert this layer by hand"):
            call()


def test_transparent_combinators_around_parts_change_no_module():
    plain = fn.stacked(BOTH, BOTH)
    wrapped = fn.stacked(
        fn.named("low", BOTH), fn.named("high", fn.remat(fn.bidirectional(fn.remat(fn.lstm(2)), BACKWARD)))
    )
    params, state = plain.init(KEY, jnp.ones((1, 3, 2)))
    renamed = dict(zip(wrapped.parts, params.values(), strict=True))
    assert_same(fn.to_torch(wrapped, renamed), fn.to_torch(plain, params, state))
    frozen = fn.stacked(fn.freeze(fn.lstm(2)), fn.lstm(2))
    assert "weight_hh_l1" in fn.to_torch(frozen, *frozen.init(KEY, jnp.ones((1, 3, 2))))


def test_a_stack_with_other_layers_between_is_several_modules():
    layer = fn.stacked(fn.serial(fn.lstm(2), fn.tanh()), fn.lstm(2))
    params, state = layer.init(KEY, jnp.ones((1, 3, 2)))
    assert {"serial.lstm.weight_hh_l0", "lstm.weight_hh_l0"} < fn.to_torch(layer, params, state).keys()


@pytest.mark.parametrize("name", ["dense", "lstm", "bidirectional", "attention"])
def test_a_function_is_not_taken_for_the_layer_of_its_name(name):
    def f(params, x):
        return x * params["kernel"]

    f.__name__ = name
    layer = fn.from_function(f, lambda key, x: {"kernel": jnp.ones(3)})
    with pytest.raises(fn.InputError, match=f"{name} by from_function"):
        fn.to_torch(layer, {"kernel": jnp.ones(3)})


def test_a_layer_of_another_name_is_no_recurrent_pair():
    pair = fn.named("bidirectional", fn.branch(forward=fn.dense(2), backward=fn.dense(2)))
    params, state = pair.init(KEY, jnp.ones((1, 2)))
    assert {"forward.weight", "backward.weight"} < fn.to_torch(pair, params, state).keys()


def test_a_combinator_that_stacks_layers_in_a_way_of_its_own_is_refused():
    inner = fn.dense(4)
    init = lambda key, x: jax.vmap(lambda key: inner.init(key, x))(jax.random.split(key, 3))
    made = fn.Wrapped(inner, lambda other: other, direct=False)
    layer = fn.Layer("experts", init, inner.apply, inner.fwd, inner.bwd, made)
    with pytest.raises(fn.InputError, match="does not call its layer directly"):
        fn.to_torch(layer, *layer.init(jax.random.key(0), jnp.ones((2, 4))))
