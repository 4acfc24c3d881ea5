"""check_vjp: rules of JAX functions held against the functions; what cannot be checked is refused in words."""

import os
import subprocess
import sys
from itertools import count

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import funcnet as fn

FEW = {"oracles": ("autodiff",), "shrink": False}


def ruled(f, fwd, bwd):
    """f with a rule of its own."""
    g = jax.custom_vjp(f)
    g.defvjp(fwd, bwd)
    return g


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


def test_a_gradient_that_jax_drops_silently_is_seen():
    take = ruled(
        lambda x, i: x[i], lambda x, i: (x[i], (x, i)), lambda r, dy: (jnp.zeros_like(r[0]).at[r[1]].add(dy), dy)
    )
    report = fn.check_vjp(take, "f32[5]", "i32[4]<5", **FEW)
    assert [(failure.leaf, failure.kind) for failure in report.failures] == [("[1]", "structure")]


def test_a_gradient_of_the_wrong_shape_is_named_and_explained():
    bias = ruled(lambda x, b: x + b[None], lambda x, b: (x + b[None], None), lambda _, dy: (dy, dy))
    report = fn.check_vjp(bias, "f32[5,3]", "f32[3]", **FEW)
    assert wrong(report) == ["[1]"]
    assert "float32[5, 3] for float32[3]" in report.failures[0].message
    assert {leaf.leaf: leaf.diagnosis for leaf in report.leaves}["[1]"].startswith("not summed over axis 0")


def test_kinks_are_told_apart_from_mistakes():
    at_zero = np.float32([0, 1, -1])
    report = fn.check_vjp(jax.nn.relu, at_zero)
    assert report.ok
    assert report.leaves[0].verdicts["numerical"] == report.leaves[0].verdicts["autodiff"] == "kink"
    assert any("kink" in note and "[0]" in note for note in report.notes)
    assert not fn.check_vjp(lambda x: jax.nn.relu(x) - jax.nn.relu(-x), at_zero, shrink=False).ok
    slope = lambda x, dy: jnp.where(x == 0, 2 * dy, dy * (x > 0).astype(dy.dtype))
    doubled = ruled(lambda x: jnp.maximum(x, 0.0), lambda x: (jnp.maximum(x, 0.0), x), lambda x, dy: (slope(x, dy),))
    report = fn.check_vjp(doubled, at_zero, oracles=("numerical",), shrink=False)
    assert [failure.kind for failure in report.failures] == ["beyond both sides"]


@pytest.mark.parametrize(("factor", "ok"), [(1.0, True), (2.0, False)])
def test_many_kinks_do_not_hide_a_mistake_elsewhere(factor, ok):
    slope = lambda x, dy: jnp.where(x > 0, jnp.asarray(factor, dy.dtype) * dy, 0.0)
    relu = ruled(lambda x: jnp.maximum(x, 0.0), lambda x: (jnp.maximum(x, 0.0), x), lambda x, dy: (slope(x, dy),))
    x = np.random.default_rng(0).normal(size=300).astype(np.float32)
    x[:100] = 0
    assert fn.check_vjp(relu, x, shrink=False).ok == ok


def test_a_gradient_that_is_not_finite_is_wrong_where_the_function_has_slopes():
    report = fn.check_vjp(jnp.linalg.norm, np.zeros(3, np.float32), oracles=("numerical",), shrink=False)
    assert [failure.kind for failure in report.failures] == ["not finite"]


def test_a_function_that_only_its_rule_makes_differentiable_is_judged_by_the_other_oracles():
    def root(a):  # Newton's iteration for the square root
        return jax.lax.while_loop(lambda y: jnp.any(jnp.abs(y * y - a) > 1e-6 * a), lambda y: 0.5 * (y + a / y), a)

    right = ruled(root, lambda a: (root(a), root(a)), lambda y, dy: (dy / (2 * y),))
    report = fn.check_vjp(right, "f32[3]>1", oracles=("autodiff", "algebra"))
    report.raise_for_failure()
    assert report.leaves[0].verdicts["autodiff"] == "-"
    assert any("reverse mode" in note for note in report.notes)


def test_a_seed_gives_one_report_and_another_seed_another():
    same = [str(fn.check_vjp(sine(), "f32[n,m]", seed=seed, **FEW)) for seed in (1, 1, 2)]
    assert same[0] == same[1] != same[2]


def prints(x):
    jax.debug.print("{}", x)
    return x


counter = count()

REFUSED = {
    "no function": (3, ("f32[2]",), "a function"),
    "no arguments": (lambda: jnp.ones(3), (), "at least one floating argument"),
    "wrong arity": (lambda x: x, ("f32[2]", "f32[2]"), "too many positional arguments"),
    "integers only": (lambda x: 2 * x, ("i32[3]<5",), "at least one floating argument"),
    "an integer output": (jnp.argmax, ("f32[3]",), "at least one floating output"),
    "no output": (lambda x: None, ("f32[3]",), "at least one floating output"),
    "NumPy inside": (np.sin, ("f32[3]",), "a function that JAX can trace"),
    "a Python branch": (lambda x: x if x.sum() > 0 else -x, ("f32[3]",), "a function that JAX can trace"),
    "shapes that do not fit": (lambda x, y: x @ y, ("f32[3,2]", "f32[3,2]"), "contracting dimensions"),
    "a print": (prints, ("f32[3]",), "without side effects"),
    "another function each time": (lambda x: x * next(counter), ("f32[3]",), "a pure function"),
    "a loop without reverse mode": (
        lambda x: jax.lax.while_loop(lambda c: c.sum() < 9, lambda c: 2 * c, x),
        ("f32[3]>0",),
        "that JAX can differentiate",
    ),
    "a number": (lambda x: x * 2, (2.0,), "the number 2.0"),
    "a text that is none": (lambda x: x * 2, ("f32[",), "an array like"),
    "an integer shape": (lambda x: x * 2, (jax.ShapeDtypeStruct((2,), "int32"),), "which integers are valid"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_checked_is_refused_with_a_remedy(name):
    f, args, message = REFUSED[name]
    with pytest.raises(fn.InputError, match=message) as error:
        fn.check_vjp(f, *args)
    assert error.value.remedy


@pytest.mark.parametrize(
    "options",
    [
        {"oracles": ("autograd",)},
        {"oracles": "autodiff"},
        {"oracles": ()},
        {"oracles": ("laws",)},
        {"directions": 0},
        {"seed": -1},
    ],
)
def test_options_that_mean_nothing_are_refused(options):
    with pytest.raises(fn.InputError):
        fn.check_vjp(jnp.sin, "f32[2]", **options)


def test_a_reference_with_other_outputs_is_refused():
    with pytest.raises(fn.InputError, match="a reference with the outputs"):
        fn.check_vjp(jnp.sin, "f32[2]", reference=jnp.sum)


ON_A_MESH = """
import jax, jax.numpy as jnp, numpy as np, funcnet as fn
mesh = jax.make_mesh((4,), ("data",))
with jax.set_mesh(mesh):
    x = jax.device_put(np.ones((8, 5), np.float32) / 3, jax.NamedSharding(mesh, jax.P("data", None)))
    for spec in (jax.P("data", None), jax.P(None, None)):
        f = jax.custom_vjp(jnp.sin)
        f.defvjp(lambda x: (jnp.sin(x), x), lambda x, dy: (jax.sharding.reshard(dy * jnp.cos(x), spec),))
        print([failure.kind for failure in fn.check_vjp(f, x, shrink=False).failures])
"""


def test_on_a_mesh_a_gradient_must_lie_as_its_leaf_does():
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    run = [sys.executable, "-c", ON_A_MESH]
    out = subprocess.run(run, env={**os.environ, **flags}, capture_output=True, text=True, check=True).stdout
    assert out.splitlines() == ["[]", "['sharding']"]
