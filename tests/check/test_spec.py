"""Arrays in a few letters: read, written, drawn, cut."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import funcnet as fn
from funcnet.check.spec import Spec, drawn, parse, resized, settled, sizes_of, specs


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("f32[8,16]", Spec("float32", (8, 16))),
        (" bf16[ 3 , n ] ", Spec("bfloat16", (3, "n"))),
        ("f64[]", Spec("float64", ())),
        ("float16[2]", Spec("float16", (2,))),
        ("i32[8]<100", Spec("int32", (8,), None, 100)),
        ("u8[8] >2 <9", Spec("uint8", (8,), 2, 9)),
        ("f32[4]>0", Spec("float32", (4,), 0)),
        ("f32[4]<1e-3>-.5", Spec("float32", (4,), -0.5, 1e-3)),
        ("bool[0,2]", Spec("bool", (0, 2))),
        ("c64[2]", Spec("complex64", (2,))),
        ("i32[2,8]<5 sorted", Spec("int32", (2, 8), None, 5, True)),
        ("f32[n]>0 sorted", Spec("float32", ("n",), 0, None, True)),
        ("key", Spec("key", ())),
    ],
)
def test_a_text_is_read_and_written_again(text, spec):
    assert parse(text) == spec
    assert parse(str(spec)) == spec


@pytest.mark.parametrize(
    "text",
    [
        "",
        "f32",
        "f32[",
        "f32[2",
        "f33[2]",
        "f32[-1]",
        "f32[2.5]",
        "f32[2]<",
        "i32[2]",
        "i32[2]<0",
        "f32[2]>1<0",
        "f32[a1]",
        "f32[²]",
        "f32[8,,16]",
        "f32[8]<e",
        "f32[8]<--3",
        "f32[8]<3<5",
        "f32[8]<1e999",
        "f16[3]>1e9",
        "i32[8]<0.5",
        "i32[8]<2.5",
        "c64[3]>0",
        "bool[8]<3",
        "bool[8] sorted",
        "c64[3] sorted",
        "f32[] sorted",
    ],
)
def test_what_cannot_be_read_is_refused_with_the_text(text):
    with pytest.raises(fn.InputError) as error:
        parse(text)
    assert error.value.received == repr(text)


@pytest.mark.parametrize(
    ("text", "low", "high"),
    [
        ("i32[500]<7", 0, 6),
        ("i32[500]>2<5", 2, 4),
        ("f32[500]>3", 3, 9),
        ("f32[500]<-3", -9, -3),
        ("f64[500]>0<1", 0, 1),
    ],
)
def test_values_keep_to_their_bounds(text, low, high):
    (values,) = drawn((parse(text),), 0)
    assert low <= values.min()
    assert values.max() <= high
    assert values.dtype == parse(text).dtype


def test_draws_are_normal_and_depend_on_the_seed_alone():
    tree = (parse("f32[50,40]"), parse("bool[50]"), parse("c64[9]"), parse("key"))
    first, again, other = (drawn(tree, seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first[0], again[0])
    assert not np.array_equal(first[0], other[0])
    assert abs(first[0].mean()) < 0.1
    assert abs(first[0].std() - 1) < 0.1
    assert 0 < first[1].sum() < 50
    assert np.iscomplexobj(first[2])
    assert jnp.issubdtype(first[3].dtype, jax.dtypes.prng_key)


def test_a_letter_is_one_size_everywhere():
    a, b = settled((parse("f32[n,m]"), parse("f32[m,n]")), 3)
    assert a.sizes == b.sizes[::-1]
    assert all(1 <= size <= 7 for size in a.sizes)
    assert len({settled((parse("f32[n,m]"),), seed)[0].sizes for seed in range(20)}) > 5


def test_specs_and_arrays_shrink_alike():
    tree = specs({"a": "f32[4,3]", "b": np.arange(12.0).reshape(3, 4), "c": np.float32(1)})
    assert sizes_of(tree) == [4, 3]
    smaller = resized(tree, {4: 2})
    assert smaller["a"].sizes == (2, 3)
    np.testing.assert_array_equal(smaller["b"], tree["b"][:, :2])


@pytest.mark.parametrize(
    ("leaf", "message"),
    [(1.0, "the number 1.0"), (object(), "object"), (jax.ShapeDtypeStruct((2,), "int32"), "which integers are valid")],
)
def test_what_is_no_array_is_refused(leaf, message):
    with pytest.raises(fn.InputError, match=message):
        specs((leaf,))
