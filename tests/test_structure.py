"""What a layer says of how it was made: its record, its call, and the tree that shows both."""

import inspect
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import funcnet as fn
from funcnet.check.cases import CASES
from funcnet.combinators.repeat import Repeat

INNER = fn.serial(fn.dense(3), fn.relu())


def wrapped(layer):
    return replace(layer, name="wrapped", made=fn.Wrapped(layer, wrapped))


def test_a_wrapper_has_the_parts_of_what_it_wraps_and_is_made_again_of_other_ones():
    layer = wrapped(INNER)
    assert layer.parts == INNER.parts
    again = layer.rebuild({"dense": fn.dense(3), "relu": fn.tanh()})
    assert (again.name, again.parts["relu"].name) == ("wrapped", "tanh")
    assert wrapped(fn.dense(3)).rebuild is None


def test_a_record_stands_for_the_rule_that_it_was_given_with():
    layer = fn.repeat(INNER, 2)
    match layer.structure:
        case Repeat(inner=inner, times=times):
            assert (inner, times) == (INNER, 2)
        case _:
            pytest.fail("a repeat says that it is one")
    for name in ("init", "apply", "fwd", "bwd"):
        other = replace(layer, **{name: lambda *args: None})
        assert other.structure is None
        assert other.rebuild is None
        assert other.parts == INNER.parts
    assert replace(layer, name="other").structure is layer.structure


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_layer_shows_as_the_call_that_made_it_without_addresses(case):
    text = repr(case.layer)
    assert "0x" not in text
    assert "<" not in text
    if case.constructor not in ("elementwise", "stateless"):
        assert case.constructor in text


@pytest.mark.parametrize("name", fn.__all__)
def test_signatures_show_no_addresses(name):
    if inspect.isfunction(getattr(fn, name)) or name in ("Layer", "Loss"):
        assert "0x" not in str(inspect.signature(getattr(fn, name)))


def test_a_call_leaves_out_what_is_at_its_default():
    init = jax.nn.initializers.ones
    shown = {
        "dense(8)": fn.dense(8, use_bias=True),
        "dense(8, use_bias=False, kernel_init=ones)": fn.dense(8, use_bias=False, kernel_init=init),
        "conv(8, 3, strides=(2, 2), padding='VALID')": fn.conv(8, 3, (2, 2), "VALID"),
        "reshape(7, 7)": fn.reshape(7, 7),
        "embedding(4, 3, dtype=bfloat16)": fn.embedding(4, 3, dtype=jnp.bfloat16),
        "cross_entropy(class_weights=float32[2])": fn.cross_entropy(class_weights=jnp.ones(2)),
        "from_function(tanh)": fn.from_function(jnp.tanh),
    }
    assert {text: repr(layer) for text, layer in shown.items()} == {text: text for text in shown}
    long = fn.cross_entropy(class_weights=list(range(1, 100)))
    assert len(repr(long)) < 100


def test_a_model_shows_as_a_tree():
    block = fn.skip(fn.serial(fn.layer_norm(), fn.mlp(8, 4)))
    model = fn.serial(fn.weight_norm(fn.dense(4)), fn.dense(4), blocks=fn.repeat(fn.remat(block), 12), head=fn.dense(3))
    assert repr(model).splitlines() == [
        "serial",
        "  weight_norm",
        "    dense(4)",
        "  dense(4)",
        "  blocks: repeat(12)",
        "    remat",
        "      skip",
        "        serial",
        "          layer_norm()",
        "          mlp(8, 4)",
        "            hidden: dense(8)",
        "            activation: gelu()",
        "            out: dense(4)",
        "  head: dense(3)",
    ]
    assert repr(fn.objective(fn.named("middle", fn.dense(4)), fn.mse())).splitlines() == [
        "objective",
        "  model: named('middle')",
        "    dense(4)",
        "  loss: mse()",
    ]
    assert len(repr(fn.serial(blocks=fn.repeat(fn.transformer_block(64, 4), 12))).splitlines()) < 60


def test_a_constructor_from_outside_shows_too():
    @fn.constructor
    def scaled(layer, by, *, times=1):
        """A layer, scaled."""
        return replace(layer, name="scaled", made=fn.Wrapped(layer, lambda other: scaled(other, by, times=times)))

    assert repr(scaled(INNER, 2.0, times=3)).splitlines() == ["scaled(2.0, times=3)", *indented(repr(INNER))]
    assert scaled.__doc__ == "A layer, scaled."
    with pytest.raises(TypeError, match="scaled"):
        scaled(INNER)


def indented(text):
    return [f"  {line}" for line in text.splitlines()]


def test_a_users_constructor_around_one_of_ours_changes_what_is_shown_alone():
    pytest.importorskip("torch")

    @fn.constructor
    def lstm(features):
        return fn.lstm(features, reverse=True)

    layer = lstm(3)
    assert repr(layer) == "lstm(3)"
    with pytest.raises(fn.InputError, match="in reverse"):
        fn.to_torch(layer, *layer.init(jax.random.key(0), jnp.ones((2, 3, 4))))


def test_options_may_be_rules_of_jax_and_tuples_of_arrays():
    f = jax.custom_vjp(jnp.tanh)
    assert repr(fn.from_function(f)).startswith("from_function(")

    @fn.constructor
    def sized(sizes=(1, 2)):
        return fn.relu()

    assert repr(sized((jnp.array([1, 2]), 2))).startswith("sized(sizes=(")


@pytest.mark.parametrize("wrap", [fn.skip, fn.mixed, fn.remat, lambda layer: layer])
def test_rebuilt_a_layer_keeps_its_name_and_call(wrap):
    layer = wrap(fn.mlp(8, 4))
    again = layer.rebuild({name: fn.named(name, part) for name, part in layer.parts.items()})
    assert again.name == layer.name
    assert repr(again).splitlines()[0] == repr(layer).splitlines()[0]
    assert list(fn.serial(fn.mixed(fn.mlp(8, 4), keep=("hidden",))).parts) == ["mlp"]


def test_what_returns_no_layer_is_no_constructor():
    @fn.constructor
    def pair():
        return fn.relu(), fn.relu()

    with pytest.raises(fn.InputError, match="a layer from the constructor pair"):
        pair()


def test_single_numbers_of_any_kind_are_shown():
    assert repr(fn.dropout(np.float32(0.5))) == "dropout(0.5)"
    assert repr(fn.dense(np.int64(3))) == "dense(3)"
    assert repr(fn.serial(fn.relu6(), fn.relu6())).splitlines() == ["serial", "  relu6()", "  relu6()"]
