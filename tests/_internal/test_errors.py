"""One kind of error, which says where, what was expected, what came, and the remedy."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from funcnet._internal.errors import InputError, at, by, describe

S = jax.ShapeDtypeStruct
F32 = jnp.dtype("float32")


def test_an_input_error_is_a_value_error_with_its_four_parts_on_lines_of_their_own():
    error = InputError("two eggs", "one egg", "buy another")
    assert isinstance(error, ValueError)
    assert (error.expected, error.received, error.remedy, error.path) == ("two eggs", "one egg", "buy another", ())
    assert str(error) == "argument\n  expected  two eggs\n  received  one egg\n  remedy    buy another"


def test_at_puts_names_in_front_of_the_path_from_the_outermost():
    with pytest.raises(InputError) as error, at("block"), at("dense_1"):
        raise InputError("a", "b", "c")
    assert error.value.path == ("block", "dense_1")
    assert str(error.value).splitlines()[0] == "block/dense_1"


@pytest.mark.parametrize(("path", "where"), [((), "dense"), (("dense_1",), "dense_1"), (("head",), "head (dense)")])
def test_by_names_the_kind_of_a_layer_where_its_path_does_not(path, where):
    @by("skip")
    def complain(path):
        with at(path[0]) if path else contextlib.nullcontext(), by("dense"):
            raise InputError("a", "b", "c")

    with pytest.raises(InputError) as error:
        complain(path)
    assert str(error.value).splitlines()[0] == where


def test_at_notes_the_layers_on_other_errors():
    with pytest.raises(KeyError) as error, at("block"), at("dense"):
        raise KeyError("kernel")
    assert error.value.__notes__ == ["in layer 'dense'", "in layer 'block'"]


def test_at_names_the_operations_of_a_profile():
    def f(x):
        with at("block"):
            return jnp.sin(x)

    (eqn,) = jax.make_jaxpr(f)(1.0).jaxpr.eqns
    assert "block" in str(eqn.source_info.name_stack)


@pytest.mark.parametrize(
    ("x", "text"),
    [
        (jnp.ones((32, 64)), "float32[32, 64]"),
        (S((), jnp.int8), "int8[]"),
        (np.ones(3, bool), "bool[3]"),
        ((jnp.ones(1), None), "(float32[1], None)"),
        ([jnp.ones(1)], "(float32[1])"),
        ({"kernel": jnp.ones((1, 2)), "n": 3}, "{kernel: float32[1, 2], n: int}"),
        ("text", "str"),
    ],
)
def test_describe(x, text):
    assert describe(x) == text
