"""Gradients side by side: which leaf is wrong, where, and by how much of its own scale."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import funcnet as fn
from funcnet.check.judge import tolerance

KERNEL = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
BIAS = np.float32([1e-3, -2e-3, 3e-3, 4e-3])
WANTED = {"dense": {"kernel": 1000 * KERNEL, "bias": BIAS}}


def with_bias(bias):
    return {"dense": {"kernel": 1000 * KERNEL, "bias": bias}}


def changed(i, value):
    bias = BIAS.copy()
    bias[i] = value
    return bias


def wrong(report):
    return [leaf for leaf in report.leaves if not leaf.ok]


def test_equal_trees_hold():
    report = fn.compare_grads(WANTED, jax.tree.map(jnp.asarray, WANTED))
    assert report.ok
    assert report.failures == ()
    assert [leaf.error for leaf in report.leaves] == [0, 0]
    assert report.raise_for_failure() is None
    assert str(report).endswith("all 2 leaves hold")


def test_a_small_wrong_leaf_is_seen_beside_a_large_right_one():
    """Half a percent of one entry of a bias whose kernel is a million times its size."""
    report = fn.compare_grads(with_bias(changed(2, 3.015e-3)), WANTED)
    (leaf,) = wrong(report)
    assert leaf.leaf == "['dense']['bias']"
    assert (leaf.index, leaf.shape, leaf.dtype) == ((2,), (4,), "float32")
    np.testing.assert_allclose((leaf.got, leaf.wanted, leaf.scale), (3.015e-3, 3e-3, 4e-3), rtol=1e-6)
    np.testing.assert_allclose((leaf.error, leaf.relative), (1.5e-5, 1.5e-5 / 4e-3), rtol=1e-4)
    np.testing.assert_allclose(leaf.ulps, 1.5e-5 / np.spacing(np.float32(3e-3)), rtol=1e-3)
    (failure,) = report.failures
    assert (failure.leaf, failure.oracle, failure.kind, failure.index) == (leaf.leaf, "reference", "value", (2,))
    assert (failure.got, failure.wanted) == (leaf.got, leaf.wanted)


def test_the_report_as_text_names_the_leaf_the_place_and_both_values():
    report = fn.compare_grads(with_bias(changed(2, 0.5)), WANTED, name="params")
    lines = str(report).splitlines()
    assert lines[0] == report.title
    line, sentence = [line for line in lines if "WRONG" in line]
    assert sentence.split()[:2] == ["WRONG", "params['dense']['bias']:"]
    assert line.split()[0] == "params['dense']['bias']"
    for part in ("float32[4]", "[2]", "0.5", "0.003"):
        assert part in line
    assert sum(" ok " in line for line in lines) == 1
    assert lines[-1] == "1 of 2 leaves wrong: params['dense']['bias']"
    with pytest.raises(AssertionError) as error:
        report.raise_for_failure()
    assert str(error.value) == str(report)


@pytest.mark.parametrize(
    ("got", "problem"),
    [
        (None, "no gradient for float32[4]"),
        (BIAS[None], "the gradient float32[1, 4] for float32[4]"),
        (BIAS[:3], "the gradient float32[3] for float32[4]"),
        (1.0, "the gradient float64[] for float32[4]"),
        (np.int32([1, 2, 3, 4]), "the gradient int32[4]; a gradient is floating, or None"),
    ],
)
def test_structure_shape_and_dtype_must_match(got, problem):
    report = fn.compare_grads(with_bias(got), WANTED)
    assert [leaf.leaf for leaf in wrong(report)] == ["['dense']['bias']"]
    assert [(failure.kind, failure.message) for failure in report.failures] == [("structure", problem)]
    assert problem in str(report)


@pytest.mark.parametrize("dtype", [np.float64, jnp.bfloat16])
def test_two_dtypes_are_compared_when_it_is_said_with_whose_rounding(dtype):
    other = BIAS.astype(dtype)
    report = fn.compare_grads(other, BIAS)
    assert not report.ok
    assert report.failures[0].message.startswith(f"the gradient {other.dtype}[4] for float32[4]; to compare them")
    assert fn.compare_grads(other, BIAS, dtype=other.dtype if dtype == jnp.bfloat16 else "float32").ok
    assert not fn.compare_grads(other + other, BIAS, dtype="bfloat16").ok


def test_numbers_are_compared_too():
    assert fn.compare_grads({"x": 1.5}, {"x": np.float64(1.5)}).ok
    assert not fn.compare_grads({"x": 1.5}, {"x": 1.25}).ok
    assert fn.compare_grads({}, {}).summary == "nothing was compared: there is no gradient"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tensors_of_pytorch_are_compared_with_arrays(dtype):
    torch = pytest.importorskip("torch")
    tensor = torch.nn.Parameter(torch.tensor([1.0, 2.0], dtype=getattr(torch, dtype)))
    assert fn.compare_grads({"a": tensor}, {"a": jnp.asarray([1, 2], dtype)}).ok
    report = fn.compare_grads({"a": jnp.asarray([1, -2], dtype)}, {"a": tensor})
    assert [(leaf.leaf, leaf.dtype) for leaf in wrong(report)] == [("['a']", dtype)]


def test_a_dtype_that_is_none_is_refused():
    with pytest.raises(fn.InputError, match="a floating dtype"):
        fn.compare_grads(WANTED, WANTED, dtype="flot")


def test_a_leaf_too_many_is_wrong():
    report = fn.compare_grads(WANTED | {"extra": BIAS}, WANTED)
    assert [leaf.leaf for leaf in wrong(report)] == ["['extra']"]
    assert report.failures[0].message == "the gradient float32[4] for a leaf that has none"


@pytest.mark.parametrize("nothing", [None, np.zeros((3,), jax.dtypes.float0)])
@pytest.mark.parametrize("other", [None, np.zeros((3,), jax.dtypes.float0)])
def test_none_and_float0_both_mean_no_gradient(nothing, other):
    report = fn.compare_grads({"x": BIAS, "ids": nothing}, {"x": BIAS, "ids": other})
    assert report.ok
    assert [leaf.leaf for leaf in report.leaves] == ["['x']"]


@pytest.mark.parametrize(
    ("got", "wanted", "ok"),
    [
        (np.nan, np.nan, True),
        (np.inf, np.inf, True),
        (np.nan, 1.0, False),
        (1.0, np.nan, False),
        (np.inf, 1.0, False),
        (1.0, np.inf, False),
        (np.inf, -np.inf, False),
        (np.nan, np.inf, False),
        (0.0, -0.0, True),
    ],
)
def test_values_that_are_not_finite_agree_only_with_themselves(got, wanted, ok):
    report = fn.compare_grads(changed(1, got), changed(1, wanted))
    assert report.ok == ok
    if not ok:
        assert report.leaves[0].index == (1,)


def test_an_infinite_entry_does_not_hide_a_wrong_one_beside_it():
    got, wanted = changed(0, np.inf), changed(0, np.inf)
    got[3] *= 1.01
    (leaf,) = wrong(fn.compare_grads(got, wanted))
    assert leaf.index == (3,)


@pytest.mark.parametrize(("got", "ok"), [(0.0, True), (1e-6, True), (1e-3, False)])
def test_where_the_reference_is_zero_the_error_is_absolute(got, ok):
    assert fn.compare_grads(np.float32([0, got]), np.zeros(2, np.float32)).ok == ok


@pytest.mark.parametrize(
    ("dtype", "least", "most"),
    [("float64", 1e-14, 1e-12), ("float32", 1e-6, 1e-3), ("float16", 1e-3, 0.05), ("bfloat16", 8e-3, 0.2)],
)
def test_the_tolerance_is_a_multiple_of_the_dtypes_rounding(dtype, least, most):
    assert least < tolerance(dtype) < most


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_errors_are_held_to_the_tolerance_of_the_dtype(dtype):
    wanted = jnp.ones(4, dtype)
    nudge = lambda share: wanted.at[2].add(jnp.asarray(share * tolerance(dtype), dtype))
    assert fn.compare_grads(nudge(0.5), wanted).ok
    assert not fn.compare_grads(nudge(2.0), wanted).ok


def test_a_coarser_dtype_can_be_allowed():
    got = with_bias(changed(0, 1.01e-3))
    assert not fn.compare_grads(got, WANTED).ok
    assert fn.compare_grads(got, WANTED, dtype=jnp.bfloat16).ok
    assert not fn.compare_grads(with_bias(-BIAS), WANTED, dtype=jnp.bfloat16).ok


def test_the_worst_leaf_comes_first():
    wanted = {name: np.ones(3, np.float32) for name in "abcd"}
    got = {"a": wanted["a"], "b": 1.1 * wanted["b"], "c": 3 * wanted["c"], "d": wanted["d"] + np.float32(1e-6)}
    names = [leaf.leaf for leaf in fn.compare_grads(got, wanted).leaves]
    assert names == ["['c']", "['b']", "['d']", "['a']"]


def test_scalars_and_empty_arrays_are_leaves_too():
    tree = {"scalar": jnp.float32(2), "empty": jnp.zeros((0, 3))}
    report = fn.compare_grads(tree, tree)
    assert report.ok
    assert len(report.leaves) == 2
    assert not fn.compare_grads(tree | {"scalar": jnp.float32(3)}, tree).ok


def test_the_mistake_is_named_where_it_has_a_pattern():
    (leaf,) = wrong(fn.compare_grads(with_bias(-BIAS), WANTED))
    assert leaf.diagnosis == "the sign is flipped"
