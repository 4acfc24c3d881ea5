"""What a gradient may be off by, and how a leaf is measured: numbers worked out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from funcnet.check.judge import Leaf, as_float64, blank, leaves_of, measure, mismatch, spacing, tolerance

S = jax.ShapeDtypeStruct
EPS = {"bfloat16": 2.0**-7, "float16": 2.0**-10, "float32": 2.0**-23, "float64": 2.0**-52}


@pytest.mark.parametrize(
    ("dtype", "rounding", "sums"),
    [("bfloat16", 4, "float32"), ("float16", 4, "float32"), ("float32", 64, "float32"), ("float64", 1024, "float64")],
)
@pytest.mark.parametrize("terms", [1, 2, 100])
def test_the_tolerance_is_that_of_the_formula(dtype, rounding, sums, terms):
    """A eps + B eps_acc sqrt(n)."""
    assert tolerance(dtype, terms) == rounding * EPS[dtype] + 16 * EPS[sums] * terms**0.5


def test_complex_numbers_have_the_tolerance_of_their_parts():
    assert tolerance("complex64") == tolerance("float32")
    assert tolerance("complex128", 9) == tolerance("float64", 9)


def test_one_wrong_element_is_found_and_told_in_every_unit():
    wanted = np.float64([[1, -4], [2, 0.5]])
    got = np.float32([[1, -4], [2, 0.5 + 2**-10]])
    leaf = measure("w", got, wanted, 2.0**-14)
    assert leaf == Leaf(
        leaf="w",
        shape=(2, 2),
        dtype="float32",
        scale=4.0,
        error=2.0**-10,
        relative=2.0**-12,
        allowed=2.0**-14,
        ulps=2.0**14,  # 0.5 has the spacing 2^-24
        index=(1, 1),
        got=0.5 + 2**-10,
        wanted=0.5,
    )
    assert not leaf.within
    assert measure("w", got, wanted, 2.0**-12).within  # the bound itself is allowed
    assert measure("w", np.float32(4), np.float64(1), 1.0).ulps == 3 * 2**23  # units of the reference


def test_the_scale_is_one_where_the_reference_is_zero_everywhere():
    leaf = measure("b", np.float32([0, 1e-3]), np.zeros(2), 1e-2)
    assert (leaf.scale, leaf.error, leaf.relative) == (0.0, np.float32(1e-3), np.float32(1e-3))
    assert leaf.within
    assert not measure("b", np.float32([0, 1e-1]), np.zeros(2), 1e-2).within


def test_what_is_not_finite_agrees_with_itself_alone():
    nan, inf = np.nan, np.inf
    assert measure("x", np.float32([nan, inf, -inf, 1]), np.float64([nan, inf, -inf, 1]), 1e-6).within
    for got, wanted in ((nan, 1), (1, nan), (inf, -inf), (inf, nan), (inf, 1)):
        leaf = measure("x", np.float32([3, got]), np.float64([3, wanted]), 1e-6)
        assert not leaf.within
        assert (leaf.index, leaf.error, leaf.scale) == ((1,), inf, 3.0)


def test_a_reference_beyond_the_dtype_is_rounded_to_infinity():
    assert measure("x", np.float16([np.inf]), np.float64([1e6]), 1e-3).within
    assert not measure("x", np.float16([-np.inf]), np.float64([1e6]), 1e-3).within
    assert not measure("x", np.float32([np.inf]), np.float64([1e6]), 1e-3).within


def test_elements_in_the_mask_are_left_out():
    got, wanted = np.float32([5, 1.5, 1]), np.float64([1, 1, 1])
    assert measure("x", got, wanted, 0.1).index == (0,)
    left = measure("x", got, wanted, 0.1, skip=np.array([True, False, False]))
    assert (left.index, left.error) == ((1,), 0.5)
    assert measure("x", got, wanted, 0.1, skip=np.array([True, True, False])).within


def test_honest_room_is_absolute_and_may_differ_by_element():
    """The worst element is the one with the most of its own room."""
    got, wanted = np.float32([2.5, 8.25]), np.float64([2, 8])
    assert measure("x", got, wanted, 0.125).index == (0,)
    leaf = measure("x", got, wanted, 0.0625, baseline_error=np.array([0.5, 0.0]))
    assert (leaf.index, leaf.allowed, leaf.relative) == ((0,), 0.125, 0.0625)
    leaf = measure("x", got, wanted, 0.0078125, baseline_error=np.array([0.5, 0.0]))
    assert (leaf.index, leaf.allowed, leaf.within) == ((1,), 0.0078125, False)
    assert measure("x", got, wanted, 0.0078125, baseline_error=0.5).within


def test_scalars_empty_and_complex_leaves_are_measured_too():
    assert measure("x", np.float32(2), np.float64(2), 1e-6).index == ()
    empty = measure("x", np.zeros((0, 3), np.float32), np.zeros((0, 3)), 1e-6)
    assert (empty.shape, empty.dtype, empty.allowed, empty.within) == ((0, 3), "float32", 1e-6, True)
    leaf = measure("x", np.complex64([1j, 3]), np.complex128([1j, 3 + 4j]), 1e-6)
    assert (leaf.error, leaf.scale, leaf.got, leaf.wanted) == (4.0, 5.0, 3, 3 + 4j)


def test_a_leaf_is_ok_if_no_oracle_finds_it_wrong():
    assert Leaf("x").ok
    assert Leaf("x", verdicts={"a": "ok", "b": "-", "c": "kink"}).ok
    assert not Leaf("x", verdicts={"a": "ok", "b": "WRONG"}).ok


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_spacing_is_numpys_for_normal_numbers(dtype):
    info = np.finfo(dtype)
    for value in [1, 1.5, 2 - info.eps, 2, 3.14159, 1e-3, 1000, float(info.tiny), float(info.max) / 2]:
        assert spacing(float(dtype(value)), dtype) == float(np.spacing(dtype(value))), value
    for value in (0.0, float(info.tiny) / 2, np.inf, np.nan):
        assert spacing(value, dtype) == float(np.spacing(info.tiny)), value


def test_spacing_in_bfloat16_has_eight_bits():
    assert [spacing(v, jnp.bfloat16) for v in (1.0, 1.99, 2.0, 256.0)] == [2.0**-7, 2.0**-7, 2.0**-6, 2.0]


def test_wide_is_float64_or_complex128():
    for dtype, wanted in (
        ("bfloat16", "float64"),
        ("float32", "float64"),
        ("int32", "float64"),
        ("complex64", "complex128"),
    ):
        assert as_float64(np.ones(2, jnp.dtype(dtype))).dtype == wanted
    assert as_float64(jnp.float32(0.1)) == np.float64(np.float32(0.1))


def test_leaves_without_a_gradient_have_no_path():
    tree = {"w": 1.0, "i": np.zeros(2, jax.dtypes.float0), "none": None, "pair": (2.0, [3.0])}
    assert leaves_of(tree, "p") == {"p['w']": 1.0, "p['pair'][0]": 2.0, "p['pair'][1][0]": 3.0}
    assert leaves_of(4.0, "x") == {"x": 4.0}


def test_a_mismatch_is_said_in_words():
    f32 = S((2, 3), jnp.float32)
    assert mismatch(f32, f32) == ""
    assert mismatch(None, f32) == "no gradient for float32[2, 3]"
    assert mismatch(f32, None) == "the gradient float32[2, 3] for a leaf that has none"
    assert mismatch(S((3, 2), jnp.float32), f32) == "the gradient float32[3, 2] for float32[2, 3]"
    assert mismatch(S((2, 3), jnp.bfloat16), f32) == "the gradient bfloat16[2, 3] for float32[2, 3]"
    assert mismatch(S((2, 3), jnp.int32), f32).endswith("int32[2, 3]; a gradient is floating, or None")


def test_a_leaf_whose_values_are_not_compared_has_its_shape_alone():
    verdicts = {"algebra": "WRONG"}
    assert blank("x", S((2,), jnp.float16), verdicts) == Leaf("x", (2,), "float16", verdicts=verdicts)
    assert blank("x", None, verdicts) == Leaf("x", verdicts=verdicts)
