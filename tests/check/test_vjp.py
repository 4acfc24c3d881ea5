"""check_vjp: rules of JAX functions held against the functions; what cannot be checked is refused in words."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import funcnet as fn
from tests.check.points import ruled

FEW = {"oracles": ("autodiff",), "shrink": False}


def sine(factor=1.0):
    return ruled(jnp.sin, lambda x: (jnp.sin(x), x), lambda x, dy: (factor * dy * jnp.cos(x),))


def product(wrong=1.0):
    """x @ w, the rule of w off by a factor."""
    f = lambda x, w: x @ w
    return ruled(f, lambda x, w: (x @ w, (x, w)), lambda r, dy: (dy @ r[1].T, wrong * (r[0].T @ dy)))


def wrong(report):
    return sorted(leaf.leaf for leaf in report.leaves if not leaf.ok)


def test_a_right_rule_holds_before_every_oracle():
    report = fn.check_vjp(product(), "f32[5,3]", "f32[3,2]")
    report.raise_for_failure()
    assert [leaf.leaf for leaf in sorted(report.leaves, key=lambda leaf: leaf.leaf)] == ["[0]", "[1]"]
    assert all(leaf.verdicts == {"autodiff": "ok", "numerical": "ok", "algebra": "ok"} for leaf in report.leaves)
    assert any("custom_vjp" in note for note in report.notes)
    assert report.repeat == ""


def test_a_wrong_one_is_refused_by_every_oracle_and_the_leaf_beside_it_is_not_blamed():
    report = fn.check_vjp(product(0.9), "f32[5,3]", "f32[3,2]")
    assert wrong(report) == ["[1]"]
    assert {failure.oracle for failure in report.failures} == {"autodiff", "numerical", "algebra"}
    assert report.leaves[0].diagnosis == "times 0.9: a constant factor"
    assert report.repeat == 'fn.check_vjp(f, "f32[1,1]", "f32[1,1]", seed=0)'


@pytest.mark.parametrize("oracle", ["autodiff", "numerical", "algebra"])
def test_each_oracle_finds_it_alone(oracle):
    assert wrong(fn.check_vjp(product(1.001), "f32[5,3]", "f32[3,2]", oracles=(oracle,), shrink=False)) == ["[1]"]


def test_leaves_are_named_as_keystr_names_them():
    f = lambda p, x: {"y": jnp.tanh(p["w"] @ x + p["b"]), "i": jnp.argmax(x)}
    report = fn.check_vjp(f, {"w": "f32[3,4]", "b": "f32[3]", "none": None}, "f32[4]", **FEW)
    assert sorted(leaf.leaf for leaf in report.leaves) == ["[0]['b']", "[0]['w']", "[1]"]
    assert report.ok


@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
def test_half_precision_is_judged_against_float64(dtype):
    specs = (f"{dtype}[5,3]", f"{dtype}[3,2]")
    fn.check_vjp(product(), *specs).raise_for_failure()
    assert wrong(fn.check_vjp(product(0.8), *specs, shrink=False)) == ["[1]"]
    assert wrong(fn.check_vjp(product(0.8), *specs, oracles=("numerical",), shrink=False)) == ["[1]"]


def test_float64_needs_the_64_bit_mode_and_is_exact_there():
    x = np.random.default_rng(0).normal(size=(4,))
    with pytest.raises(fn.InputError, match="x64=True"):
        fn.check_vjp(sine(), x)
    report = fn.check_vjp(sine(), x, x64=True, **FEW)
    assert report.leaves[0].dtype == "float64"
    assert report.ok
    assert wrong(fn.check_vjp(sine(1 + 1e-10), "f32[4]", x64=True, **FEW)) == ["[0]"]
    assert jnp.ones(1).dtype == jnp.float32


def test_a_rule_that_is_wrong_in_float32_alone_is_refused_in_the_64_bit_mode_too(x64):
    rule = ruled(jnp.sin, lambda x: (jnp.sin(x), x), lambda x, dy: (dy * jnp.cos(x) * (1 + (x.dtype == np.float32)),))
    assert wrong(fn.check_vjp(rule, "f32[4]", **FEW)) == ["[0]"]
    fn.check_vjp(rule, "f64[4]", **FEW).raise_for_failure()


@pytest.mark.parametrize(("factor", "ok"), [(1.0, True), (0.99, False)])
def test_complex_functions_are_checked_too(factor, ok):
    assert fn.check_vjp(sine(factor), "c64[4]", shrink=False).ok == ok


def test_a_function_that_is_not_holomorphic_has_a_vjp_too():
    f = lambda x: jnp.real(x) * jnp.exp(jnp.imag(x))
    fn.check_vjp(f, "c64[4]").raise_for_failure()
    rule = ruled(f, lambda x: (f(x), x), lambda x, dy: (jnp.conj(jax.vjp(f, x)[1](dy)[0]),))
    assert wrong(fn.check_vjp(rule, "c64[4]", **FEW)) == ["[0]"]


def test_a_reference_stands_in_for_the_function():
    assert fn.check_vjp(sine(), "f32[4]", reference=jnp.sin, **FEW).ok
    report = fn.check_vjp(sine(), "f32[4]", reference=lambda x: jnp.sin(x) + x)
    assert wrong(report) == ["[0]"]
    assert any(failure.kind == "output" for failure in report.failures)


def test_keys_and_integers_have_no_gradient():
    f = lambda key, i, x: x[i] * jax.random.bernoulli(key, 0.5, i.shape).astype(x.dtype)
    fn.check_vjp(f, "key", "i32[6]<4", "f32[4]").raise_for_failure()


def test_a_gradient_of_the_wrong_shape_is_named_and_explained():
    bias = ruled(lambda x, b: x + b[None], lambda x, b: (x + b[None], None), lambda _, dy: (dy, dy))
    report = fn.check_vjp(bias, "f32[5,3]", "f32[3]", **FEW)
    assert wrong(report) == ["[1]"]
    assert "float32[5, 3] for float32[3]" in report.failures[0].message
    assert {leaf.leaf: leaf.diagnosis for leaf in report.leaves}["[1]"].startswith("not summed over axis 0")


def test_a_seed_gives_one_report_and_another_seed_another():
    same = [str(fn.check_vjp(sine(), "f32[n,m]", seed=seed, **FEW)) for seed in (1, 1, 2)]
    assert same[0] == same[1] != same[2]


@pytest.mark.parametrize(
    "options",
    [
        {"oracles": ("autograd",)},
        {"oracles": "autodiff"},
        {"oracles": ()},
        {"oracles": ("laws",)},
        {"oracles": 3},
        {"directions": 0},
        {"directions": 1.5},
        {"seed": -1},
    ],
)
def test_options_that_mean_nothing_are_refused(options):
    with pytest.raises(fn.InputError):
        fn.check_vjp(jnp.sin, "f32[2]", **options)
