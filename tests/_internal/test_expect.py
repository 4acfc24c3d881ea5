"""What functions expect of their input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from funcnet._internal import expect
from funcnet._internal.errors import InputError, describe

S = jax.ShapeDtypeStruct
F32 = jnp.dtype("float32")


@pytest.mark.parametrize(
    ("x", "array", "floating", "concrete"),
    [
        (jnp.ones(2), True, True, True),
        (np.ones(2, np.float16), True, True, True),
        (jnp.ones(2, jnp.bfloat16), True, True, True),
        (jnp.ones(2, jnp.int32), True, False, True),
        (jnp.ones(2, jnp.complex64), True, False, True),
        (S((2,), jnp.float32), True, True, False),
        (jax.random.key(0), True, False, True),
        (1.0, False, False, False),
        ([1.0], False, False, False),
        (None, False, False, False),
    ],
)
def test_kinds_of_input(x, array, floating, concrete):
    assert (expect.is_array(x), expect.is_floating(x), expect.is_concrete(x)) == (array, floating, concrete)


def test_another_order_of_bytes_is_refused():
    """Once a program is compiled JAX reads such numbers as if they were native."""
    for kind in (">f4", ">i4"):
        with pytest.raises(InputError, match="order of bytes"):
            expect.native_order(np.ones(3, kind))
    with pytest.raises(InputError, match="order of bytes"):
        expect.float_array(np.ones(3, ">f4"))
    expect.native_order(np.ones(3, ">f4").astype("=f4"))
    expect.native_order(jax.random.key(0))


def test_a_tracer_is_not_concrete():
    seen = []
    jax.jit(lambda x: seen.append(expect.is_concrete(x)))(jnp.ones(2))
    assert seen == [False]


@pytest.mark.parametrize("x", [S((2, 3), jnp.float32), S((3,), jnp.bfloat16), np.ones((1, 1, 3))])
def test_float_array_accepts(x):
    expect.float_array(x, features=3)


@pytest.mark.parametrize(
    ("x", "options", "expected", "remedy"),
    [
        (S((2, 3), jnp.int32), {}, "a floating-point array", "convert"),
        ([[1.0]], {}, "a floating-point array", "convert"),
        (None, {}, "a floating-point array", "convert"),
        (S((), jnp.float32), {}, "a floating-point array", "axes"),
        (S((3,), jnp.float32), {"rank": 2}, "of at least 2 axes", "batch axis"),
        (S((0, 3), jnp.float32), {}, "not empty", "empty batch"),
        (S((2, 4), jnp.float32), {"features": 3}, "with 3 features", "init"),
    ],
)
def test_float_array_refuses(x, options, expected, remedy):
    with pytest.raises(InputError) as error:
        expect.float_array(x, **options)
    assert expected in error.value.expected
    assert error.value.received == ("a list of 1" if isinstance(x, list) else describe(x))
    assert remedy in error.value.remedy


@pytest.mark.parametrize("value", [1, 7, np.int64(3)])
def test_count_takes_positive_whole_numbers(value):
    assert expect.count(value, "times") == value
    assert type(expect.count(value, "times")) is int


@pytest.mark.parametrize("value", [0, -1, True, 2.0, "3", None])
def test_count_refuses_everything_else(value):
    with pytest.raises(InputError, match="times as a positive whole number") as error:
        expect.count(value, "times")
    assert error.value.received == repr(value)


@pytest.mark.parametrize("value", [0, 0.5, np.float32(0.25), 1 - 1e-9])
def test_fraction_takes_numbers_from_0_to_1(value):
    assert expect.fraction(value, "rate", "remedy") == value


@pytest.mark.parametrize("value", [1, -0.1, float("nan"), "0.5", None, 0.5j])
def test_fraction_refuses_everything_else(value):
    with pytest.raises(InputError) as error:
        expect.fraction(value, "rate", "remedy")
    assert (error.value.received, error.value.remedy) == (f"rate={value!r}", "remedy")


@pytest.mark.parametrize("given", ["float32", "bfloat16", np.float64, jnp.float16, np.dtype("float32")])
def test_a_floating_dtype_is_one_however_it_is_written(given):
    assert expect.floating_dtype(given) == jnp.dtype(given)


@pytest.mark.parametrize("given", ["bf16", "int32", bool, None, 3])
def test_what_is_no_floating_dtype_is_refused(given):
    with pytest.raises(InputError, match="a floating dtype"):
        expect.floating_dtype(given)


def test_shapes_are_those_of_arrays_alone():
    assert expect.shapes({"a": np.ones(2)}) == {"a": S((2,), jnp.float32)}
    with pytest.raises(InputError, match="convert it"):
        expect.shapes([[1.0, 2.0]])


def test_key_takes_one_typed_key():
    key = jax.random.key(0)
    assert expect.key(key) is key
    for bad in (None, 0, jnp.zeros(2, jnp.uint32), jax.random.split(key)):
        with pytest.raises(InputError, match="a random key"):
            expect.key(bad)


@pytest.mark.parametrize(
    ("given", "meant"), [("float64", "float32"), ("int64", "int32"), ("float16", "float16"), ("bfloat16", "bfloat16")]
)
def test_dtype_is_the_one_that_jax_would_make_of_it(given, meant):
    assert expect.dtype(np.ones(2, jnp.dtype(given))) == meant


def test_dtype_keeps_double_precision_where_jax_does(x64):
    assert expect.dtype(np.ones(2)) == np.float64


PARAMS = {"kernel": S((3, 2), jnp.float32), "bias": S((2,), jnp.float32)}


@pytest.mark.parametrize(
    ("params", "remedy"),
    [
        (None, "this layer's init"),
        ({}, "this layer's init"),
        ({"kernel": PARAMS["kernel"]}, "this layer's init"),
        (PARAMS | {"scale": PARAMS["bias"]}, "this layer's init"),
        (PARAMS | {"bias": 0.0}, "for such input"),
        (PARAMS | {"bias": S((3,), jnp.float32)}, "for such input"),
        (PARAMS | {"bias": S((2,), jnp.bfloat16)}, "mixed"),
    ],
)
def test_fields_refuses_the_params_of_another_layer(params, remedy):
    shapes = {name: leaf.shape for name, leaf in PARAMS.items()}
    expect.fields(PARAMS, F32, shapes)
    with pytest.raises(InputError) as error:
        expect.fields(params, F32, shapes)
    assert error.value.expected == "parameters {kernel: float32[3, 2], bias: float32[2]}"
    assert error.value.received == describe(params)
    assert remedy in error.value.remedy


@pytest.mark.parametrize(
    ("params", "size"),
    [(PARAMS, 3), ({}, None), (None, None), ({"kernel": 1.0}, None), ({"kernel": jnp.ones(())}, None)],
)
def test_size_is_that_of_the_first_axis_or_none(params, size):
    assert expect.size(params, "kernel") == size


@pytest.mark.parametrize("tree", [{"a": 1}, {"a": 1, "b": 2, "c": 3}, (), None])
def test_other_keys_are_refused(tree):
    expect.keys({"b": 2, "a": 1}, ("a", "b"), "params")
    with pytest.raises(InputError, match=r"params for the layers \['a', 'b'\]"):
        expect.keys(tree, ("a", "b"), "params")


def test_cotangent_makes_a_jax_array():
    dy = expect.cotangent(np.ones((2, 3), np.float32), (2, 3), F32)
    assert isinstance(dy, jax.Array)


@pytest.mark.parametrize("dy", [jnp.ones((3, 2)), jnp.ones((1, 2, 3)), jnp.ones((2, 3), jnp.bfloat16), 1.0])
def test_cotangent_refuses_another_shape_or_dtype(dy):
    with pytest.raises(InputError, match="cotangent like the output") as error:
        expect.cotangent(dy, (2, 3), F32)
    assert "float32[2, 3]" in error.value.expected


@pytest.mark.parametrize("value", [0.5, 1, np.float32(0.5), np.float64(0.5), np.int8(1), np.array(0.5)])
def test_a_number_is_pythons_own(value):
    assert type(expect.number(value, "slope")) is float


def test_a_number_of_jax_is_pythons_own():
    assert type(expect.number(jnp.float32(0.5), "slope")) is float


@pytest.mark.parametrize("value", [True, "0.5", None, 1j, np.ones(1), [0.5], np.bool_(True)])
def test_what_is_no_number_is_refused(value):
    with pytest.raises(InputError, match="slope as a real number"):
        expect.number(value, "slope")


def test_a_traced_number_is_refused():
    with pytest.raises(InputError, match="slope as a real number"):
        jax.jit(lambda value: expect.number(value, "slope"))(0.5)


class Tensor:
    """An array of another library: its dtype is its own."""

    shape, ndim = (2, 3), 2
    dtype = type("dtype", (), {"__str__": lambda self: "torch.float32"})()


def test_an_array_of_another_library_is_refused_with_the_remedy():
    for look in (expect.is_array, expect.is_floating, expect.is_concrete, expect.float_array, expect.shapes):
        with pytest.raises(InputError, match=r"received  torch.float32\[2, 3\]\n  remedy    convert it with x.numpy"):
            look(Tensor())
    assert not expect.is_array(Tensor)
    assert not expect.is_array(np.float32)
    assert expect.is_array(np.float32(1))
    assert expect.is_array(jax.random.key(0))
    assert expect.is_array(jax.eval_shape(lambda: jax.random.key(0)))


def test_what_was_donated_is_told_from_what_was_not():
    kept, given = jnp.ones(3), jnp.ones(3)
    jax.jit(lambda x: x + 1, donate_argnums=0)(given)
    expect.not_donated({"a": kept, "b": np.ones(3), "c": 1.0})
    jax.jit(lambda x: expect.not_donated(x))(kept)
    with pytest.raises(InputError, match="the train state that the last step returned"):
        expect.not_donated({"a": kept, "b": given})
