"""Each algebraic law by itself: the rule that breaks it is named, and no other law is broken by the way."""

import os
import subprocess
import sys
from dataclasses import replace
from itertools import count

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import funcnet as fn
from funcnet.check import algebra
from funcnet.check.slopes import Numerical
from tests.check.points import layer_point, point_of, ruled

FEW = {"oracles": ("autodiff",), "shrink": False}
X, W = np.float32([[0.5, 1.0, -2.0], [0.3, -0.4, 1.5]]), np.float32([[1.0, 2.0, -1.0]])
LAWS = {
    "linearity": algebra.linearity,
    "repeatable": algebra.repeatable,
    "modes": algebra.modes,
    "uses": algebra.uses,
    "output": algebra.output,
    "adjoint": lambda point: algebra.adjoint(point, Numerical(point)),
}


def f(x, w):
    return jnp.sin(x) * w


def with_rule(of_w=lambda g, x, dy: g, forward=f, save=lambda x: x, load=lambda saved: saved):
    """f with a rule that puts the gradient of w through `of_w`, returns `forward`, and may keep x elsewhere."""

    def bwd(residuals, dy):
        x, w = load(residuals[0]), residuals[1]
        g = jnp.sum(dy * jnp.sin(x), 0, keepdims=True)
        return dy * jnp.cos(x) * w, of_w(g, x, dy)

    return ruled(f, lambda x, w: (forward(x, w), (save(x), w)), bwd)


def broken_by(rule):
    """{(law, kind, leaf)} of every law that is broken."""
    point = point_of(rule, X, W)
    return {(name, failure.kind, failure.leaf) for name, law in LAWS.items() for failure in law(point)}


calls, kept, depth = count(1), [], []


def keep(x):
    kept.append(x)
    return jnp.zeros(())


@jax.custom_batching.custom_vmap
def unbatched(g):
    return g


@unbatched.def_vmap
def _(size, batched, g):
    return 1.5 * g, True


@jax.custom_batching.custom_vmap
def unbatchable(g):
    return g


@unbatchable.def_vmap
def _(size, batched, g):
    raise NotImplementedError("one at a time")


def traced(g):
    return isinstance(g, jax.core.Tracer)


BROKEN = {
    "right": (with_rule(), set()),
    "another constant": (with_rule(lambda g, x, dy: 1.1 * g), {("adjoint", "adjoint", "[1]")}),
    "not linear": (
        with_rule(lambda g, x, dy: jnp.abs(g)),
        {("linearity", "linearity", "[1]"), ("adjoint", "adjoint", "[1]")},
    ),
    "affine": (
        with_rule(lambda g, x, dy: g + 0.1),
        {("linearity", "linearity", "[1]"), ("linearity", "zero cotangent", "[1]"), ("adjoint", "adjoint", "[1]")},
    ),
    "nothing where dy is 0, but for a trace": (
        with_rule(lambda g, x, dy: jnp.where(g == 0, 1e-30, g)),
        {("linearity", "zero cotangent", "[1]")},
    ),
    "another output": (with_rule(forward=lambda x, w: 1.01 * f(x, w)), {("output", "output", "y")}),
    "another each time": (
        with_rule(lambda g, x, dy: g * (1 if traced(g) else 1 + 1e-6 * next(calls))),
        {("repeatable", "repeatable", "[1]")},
    ),
    "another without jit": (
        with_rule(lambda g, x, dy: g if traced(g) else 1.1 * g),
        {("repeatable", "eager", "[1]")},
    ),
    "another under vmap": (with_rule(lambda g, x, dy: unbatched(g)), {("modes", "vmap", "[1]")}),
    "none under vmap": (with_rule(lambda g, x, dy: unbatchable(g)), {("modes", "vmap", "")}),
    "kept outside the residuals": (
        with_rule(save=keep, load=lambda saved: kept[-1]),
        {("uses", "two uses", "[0]"), ("uses", "two uses", "[1]")},
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_the_law_that_is_broken_is_named_with_the_leaf(name):
    rule, wanted = BROKEN[name]
    assert broken_by(rule) == wanted


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_an_output_whose_terms_cancel_may_be_off_by_their_rounding_and_no_more(dtype):
    """KL divergences near 0 were refused, one point in 400, for terms that were added in another order."""
    x = np.array([1.0, 1 / 3, -4 / 3 + 1e-6, 2.0, -2.0], dtype)
    eps = np.finfo(dtype).eps
    for off, broken in ((0.0, False), (1.5 * eps, False), (100 * eps, True)):
        rule = ruled(
            lambda x: jnp.sum(x), lambda x, off=off: (jnp.sum(x[::-1]) + off, x), lambda x, dy: (dy * jnp.ones_like(x),)
        )
        found = algebra.output(point_of(rule, x, x64=dtype == "float64"))
        assert [failure.kind for failure in found] == ["output"] * broken


def test_a_jump_at_the_point_excuses_no_other_output():
    rule = ruled(lambda x: x + jnp.floor(x), lambda x: (x + jnp.floor(x) + 1.0, None), lambda saved, dy: (dy,))
    for x in (np.arange(1.0, 6.0), np.array([1.0, 0.3, 0.4, 0.6, 2.7])):
        assert [failure.kind for failure in algebra.output(point_of(rule, np.float32(x)))] == ["output"]


def test_what_is_kept_on_the_host_is_told_by_two_uses():
    """The second pullback of a pair finds the first one's number, in no traced program."""

    def fwd(x):
        depth.append(1.0)
        return x**2, x

    def bwd(x, dy):
        depth.pop()
        return (2 * x * dy * (1.1 if depth else 1.0),)

    point = point_of(ruled(lambda x: x**2, fwd, bwd), X)
    depth.clear()
    assert [(failure.kind, failure.leaf) for failure in algebra.uses(point)] == [("two uses", "[0]")]


def test_integers_kept_outside_the_residuals_are_told_too():
    def fwd(x, i):
        kept.append(i)
        return x[i], jnp.zeros_like(x)

    table = ruled(lambda x, i: x[i], fwd, lambda nothing, dy: (nothing.at[kept[-1]].add(dy), None))
    point = point_of(table, X[0], np.int32([2, 0]))
    assert [(failure.kind, failure.leaf) for failure in algebra.uses(point)] == [("two uses", "[0]")]


def test_a_rule_that_raises_when_it_is_used_twice_is_told():
    def fwd(x):
        depth.append(1.0)
        if len(depth) > 1:
            raise RuntimeError("one at a time")
        return x**2, x

    def bwd(x, dy):
        depth.pop()
        return (2 * x * dy,)

    point = point_of(ruled(lambda x: x**2, fwd, bwd), X)
    depth.clear()
    (failure,) = algebra.uses(point)
    assert (failure.kind, failure.leaf) == ("two uses", "")
    assert "one at a time" in failure.message


def test_bounds_that_the_second_point_is_beyond_are_not_of_two_uses():
    """The nearby point is nearer to 0; without jit this rule looks at the values."""

    def fwd(x):
        if not traced(x) and (np.abs(x) < 1).any():
            raise ValueError("at least 1")
        return x**2, x

    point = point_of(ruled(lambda x: x**2, fwd, lambda x, dy: (2 * x * dy,)), np.float32([1, 2]))
    assert algebra.repeatable(point) == algebra.uses(point) == []


def test_a_rule_need_not_run_under_vmap_if_its_function_does_not():
    rule = ruled(unbatchable, lambda x: (unbatchable(x), None), lambda _, dy: (dy,))
    point = point_of(rule, X)
    assert algebra.modes(point) == []
    (note,) = [note for note in point.notes if "under vmap" in note]
    assert note.endswith("the plain program does not run under vmap either")


def test_a_layer_s_gradient_of_integers_is_taken_out():
    relu = fn.relu()
    point = layer_point(replace(relu, bwd=lambda *args: ({}, relu.bwd(*args)[1].astype(jnp.int32))), X)
    assert [(failure.kind, failure.leaf) for failure in algebra.structure(point)] == [("dtype", "x")]
    assert point.broken == {"x"}


def test_forward_mode_is_no_judge_at_a_kink():
    """At 0 it gives the slope 0, the rule 0.3, and both are between the sides."""
    bwd = lambda x, dy: (dy * jnp.where(x == 0, 0.3, jnp.sign(x)),)
    point = point_of(ruled(jnp.abs, lambda x: (jnp.abs(x), x), bwd), np.float32([0, 1]))
    assert algebra.adjoint(point, Numerical(point)) == []


def test_gradients_that_are_not_finite_break_no_linearity():
    point = point_of(jnp.sqrt, np.float32([0, 1]))
    assert algebra.linearity(point) == []
    lost = point_of(ruled(jnp.sin, lambda x: (jnp.sin(x), x), lambda x, dy: (dy * jnp.nan,)), np.float32([1]))
    assert algebra.linearity(lost) == []


def returning(*grads):
    return ruled(f, lambda x, w: (f(x, w), None), lambda _, dy: grads)


NO = jnp.zeros_like
STRUCTURES = {
    "no gradient": (lambda: returning(NO(X), None), set()),
    "another shape": (lambda: returning(NO(X), jnp.zeros(3)), {("structure", "[1]")}),
    "another dtype": (lambda: returning(NO(X), jnp.zeros((1, 3), jnp.bfloat16)), {("dtype", "[1]")}),
    "one too few": (lambda: returning(NO(X)), {("structure", "")}),
}


@pytest.mark.parametrize("name", STRUCTURES)
def test_a_gradient_unlike_its_leaf_is_named_and_taken_out(name):
    make, wanted = STRUCTURES[name]
    point = point_of(make(), X, W)
    failures = algebra.structure(point)
    assert {(failure.kind, failure.leaf) for failure in failures} == wanted
    assert {leaf for kind, leaf in wanted if kind == "structure" and leaf} <= point.broken
    assert point.raises == (name == "one too few")
    assert point.sound == ([] if point.raises else [p for p in ("[0]", "[1]") if p not in point.broken])


def test_a_gradient_in_a_weak_type_is_refused():
    assert (
        algebra._unlike("x", jax.ShapeDtypeStruct((), jnp.float32, weak_type=True), jnp.ones(()))[0].kind == "weak type"
    )
    weak = jax.ShapeDtypeStruct((), jnp.float32, weak_type=True)
    (failure,) = algebra._unlike("x", weak, jnp.ones(()))
    assert failure.kind == "weak type"
    assert algebra._unlike("x", weak, weak) == []
    assert algebra._unlike("x", jax.ShapeDtypeStruct((), jnp.float32), weak) == []


def test_a_layer_returns_trees_like_its_own():
    relu = fn.relu()
    assert algebra.structure(layer_point(relu, X)) == []
    none = replace(relu, bwd=lambda *args: (None, relu.bwd(*args)[1]))
    (failure,) = algebra.structure(layer_point(none, X))
    assert failure.kind == "structure"
    assert "the gradients (dparams, dx) have the structure PyTreeDef((None, *))" in failure.message


def test_a_pairing_takes_the_real_part_and_nothing_times_infinity_for_nothing():
    assert algebra._pairing(np.array([1.0, -2.0]), np.array([3.0, 5.0])) == (-7.0, 13.0)
    assert algebra._pairing(np.array([0.0, 1.0]), np.array([np.inf, 2.0])) == (2.0, 2.0)
    assert algebra._pairing(np.array([1j]), np.array([1j])) == (-1.0, 1.0)
    assert algebra._pairing(np.zeros(0), np.zeros(0)) == (0.0, 0.0)


def test_a_gradient_that_jax_drops_silently_is_seen():
    take = ruled(
        lambda x, i: x[i], lambda x, i: (x[i], (x, i)), lambda r, dy: (jnp.zeros_like(r[0]).at[r[1]].add(dy), dy)
    )
    report = fn.check_vjp(take, "f32[5]", "i32[4]<5", **FEW)
    assert [(failure.leaf, failure.kind) for failure in report.failures] == [("[1]", "structure")]


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
