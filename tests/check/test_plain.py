"""Custom rules are found and replaced wherever a program can hold them, and the float64 shadow is in float64."""

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import io_callback
from jax.experimental import pallas as pl

import funcnet as fn
from funcnet.check.plain import trace

X = np.array([0.5, -1.25, 2.0], "float32")


def ruled(factor=1.0, forward=jnp.sin, derivative=jnp.cos, **options):
    """A custom_vjp with its gradient times `factor`: 1 is right."""
    f = jax.custom_vjp(lambda x: forward(x))
    f.defvjp(lambda x: (forward(x), x), lambda x, dy: (factor * derivative(x) * dy,), **options)
    return f


def pushed(factor=1.0):
    """A custom_jvp with its derivative times `factor`."""
    f = jax.custom_jvp(lambda x: jnp.sin(x))
    f.defjvp(lambda primals, tangents: (jnp.sin(*primals), factor * jnp.cos(*primals) * tangents[0]))
    return f


def nested(f):
    """f in the forward and the backward pass of another rule."""
    g = jax.custom_vjp(lambda x: 2 * f(x))
    g.defvjp(lambda x: (2 * f(x), x), lambda x, dy: (2 * jax.vjp(f, x)[1](dy)[0],))
    return g


def under_vmap(f):
    @jax.custom_batching.custom_vmap
    def g(x):
        return f(x)

    @g.def_vmap
    def mapped(size, batched, x):
        return jax.vmap(f)(x), True

    return g


def while_loop(f):
    """A loop with a rule of its own, that calls f as well."""
    loop = lambda x: jax.lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, f(c[1])), (0, x))[1]
    g = jax.custom_vjp(loop)

    def fwd(x):
        return loop(x), x

    def bwd(x, dy):
        return jax.vjp(lambda x: f(f(f(x))), x)[1](dy)

    g.defvjp(fwd, bwd)
    return g


PLACES = {
    "bare": lambda f: f,
    "jit": lambda f: jax.jit(f),
    "jit in jit": lambda f: jax.jit(lambda x: jax.jit(f)(2 * x)),
    "scan": lambda f: lambda x: jax.lax.scan(lambda c, _: (f(c), c), x, None, length=3),
    "scan, unrolled and backwards": lambda f: lambda x: jax.lax.scan(
        lambda c, a: (f(c + a), c), x[0], x, reverse=True, unroll=2
    ),
    "map": lambda f: lambda x: jax.lax.map(f, x),
    "fori_loop": lambda f: lambda x: jax.lax.fori_loop(0, 3, lambda i, c: f(c), x),
    "cond": lambda f: lambda x: jax.lax.cond(x[0] > 0, f, jnp.cos, x),
    "switch": lambda f: lambda x: jax.lax.switch(1, [jnp.cos, f, jnp.exp], x) + jax.lax.switch(
        (x[0] > 0).astype(int), [jnp.cos, f], x
    ),
    "while": while_loop,
    "remat": lambda f: jax.checkpoint(lambda x: f(f(x))),
    "remat with a policy": lambda f: jax.checkpoint(f, policy=jax.checkpoint_policies.everything_saveable),
    "vmap": lambda f: jax.vmap(f),
    "vmap of grad": lambda f: lambda x: jax.vmap(lambda a: f(a) * jnp.exp(a))(x),
    "another rule": nested,
    "closed_call": lambda f: lambda x: jax.closure_convert(f, x)[0](x, *jax.closure_convert(f, x)[1]),
    "a closure over a tracer": lambda f: lambda x: jax.lax.scan(lambda c, a: (c + f(a * x[0]), None), x[1], x)[0],
    "associative_scan": lambda f: lambda x: jax.lax.associative_scan(jnp.add, f(x)),
    "reduce": lambda f: lambda x: jax.lax.reduce(f(x), np.float32(0), jax.lax.add, (0,)),
    "linear solve": lambda f: lambda x: jax.lax.custom_linear_solve(
        lambda v: (2 + f(x)) * v, x, lambda mv, b: b / (2 + f(x)), symmetric=True
    ),
    "root": lambda f: lambda x: jax.lax.custom_root(
        lambda y: y**3 + y - f(x), x, lambda g, y: jax.lax.fori_loop(0, 40, lambda i, y: y - g(y) / (3 * y**2 + 1), y),
        lambda g, y: y / g(jnp.ones_like(y)),
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("place", "rule"),
    [*((place, ruled) for place in PLACES), *((place, pushed) for place in ("bare", "scan", "cond", "another rule"))],
)
def test_a_rule_is_replaced_wherever_it_stands(place, rule):
    """Its values are those of the same program without rules; autodiff of it refuses a wrong rule, not a right one."""
    oracle = "numerical" if place == "while" else "autodiff"  # there is no reverse mode through a while loop
    right, wrong = (PLACES[place](rule(factor)) for factor in (1.0, 1.1))
    program = trace(wrong, X)
    assert program.rules
    assert not program.stuck
    wanted = jax.tree.leaves(PLACES[place](jnp.sin)(X))
    with jax.enable_x64(True):
        wide = jax.tree.leaves(program(X, double=True))
    for a, b, c in zip(jax.tree.leaves(program(X, double=False)), wide, wanted, strict=True):
        assert (a.dtype, b.dtype) == (c.dtype, jnp.float64)
        np.testing.assert_allclose(a, c, rtol=1e-6)
        np.testing.assert_allclose(b, c, rtol=1e-5)
    assert fn.check_vjp(right, X, oracles=(oracle,)).ok
    assert not fn.check_vjp(wrong, X, oracles=(oracle,), shrink=False).ok


class Pair(NamedTuple):
    a: jax.Array
    b: jax.Array


@partial(jax.tree_util.register_dataclass, data_fields=("w", "extra"), meta_fields=("power",))
@dataclasses.dataclass
class Weights:
    w: jax.Array
    extra: jax.Array | None = None
    power: int = 2


def trees(factor):
    """A rule over a NamedTuple, a dict with None and integers, and a registered dataclass; it returns integers too."""

    def forward(pair, table, weights):
        y = pair.a * jnp.sin(pair.b) + table["x"] * weights.w**weights.power
        return {"y": y, "best": jnp.argmax(y), "none": None}

    f = jax.custom_vjp(forward)

    def bwd(saved, dy):
        pair, table, weights = saved
        dy = dy["y"]
        gradient = Weights(dy * table["x"] * 2 * weights.w * factor)
        none = np.zeros(table["i"].shape, jax.dtypes.float0)
        return (
            Pair(dy * jnp.sin(pair.b), dy * pair.a * jnp.cos(pair.b)),
            {"x": dy * weights.w**2, "i": none, "no": None},
            gradient,
        )

    f.defvjp(lambda *args: (forward(*args), args), bwd)
    return f


def test_trees_with_none_integers_and_records():
    point = Pair("f32[3]", "f32[3]"), {"x": "f32[3]", "i": "i32[2]<5", "no": None}, Weights("f32[3]")
    assert fn.check_vjp(trees(1.0), *point).ok
    report = fn.check_vjp(trees(1.1), *point, shrink=False)
    assert [leaf.leaf for leaf in report.leaves if not leaf.ok] == ["[2].w"]


def power(factor):
    @partial(jax.custom_vjp, nondiff_argnums=(0, 2))
    def f(n, x, g):
        return g(x) ** n

    f.defvjp(
        lambda n, x, g: (g(x) ** n, x),
        lambda n, g, x, dy: (factor * jax.vjp(lambda x: g(x) ** n, x)[1](dy)[0],),
    )
    return lambda x: f(3, x, jnp.sin)


def zeros(factor):
    """symbolic_zeros: what is not differentiated arrives as an object without values."""
    f = jax.custom_vjp(lambda x, y: (x * y, jnp.sin(x)))

    def fwd(x, y):
        return (x.value * y.value, jnp.sin(x.value)), (x.value, y.value)

    def bwd(saved, dys):
        x, y = saved
        a, b = (jnp.zeros_like(x) if isinstance(dy, jax.custom_derivatives.SymbolicZero) else dy for dy in dys)
        return a * y + factor * b * jnp.cos(x), a * x

    f.defvjp(fwd, bwd, symbolic_zeros=True)
    return lambda x: sum(f(x, 2 * x)) + f(x, x)[0]


def keyed(factor):
    """Dropout with a key: an argument without a gradient."""
    forward = lambda key, x: jnp.where(jax.random.bernoulli(key, 0.5, x.shape), 2 * x, 0)
    f = jax.custom_vjp(forward)
    mask = lambda key, x: forward(key, jnp.ones_like(x))
    f.defvjp(lambda k, x: (forward(k, x), mask(k, x)), lambda mask, dy: (None, factor * mask * dy))
    return f


def mixed(factor):
    """bfloat16 in and out, float32 within."""
    forward = lambda x: jnp.tanh(x.astype(jnp.float32) * 1.5).astype(x.dtype)
    f = jax.custom_vjp(forward)

    def bwd(x, dy):
        x, dy = x.astype(jnp.float32), dy.astype(jnp.float32)
        return ((factor * 1.5 * (1 - jnp.tanh(1.5 * x) ** 2) * dy).astype(jnp.bfloat16),)

    f.defvjp(lambda x: (forward(x), x), bwd)
    return f


def turned(factor):
    """Complex in, real and complex out."""
    forward = lambda z: (jnp.abs(z) ** 2, z * z)
    f = jax.custom_vjp(forward)
    bwd = lambda z, dys: (factor * 2 * jax.lax.complex(dys[0], 0 * dys[0]) * jnp.conj(z) + 2 * z * dys[1],)
    f.defvjp(lambda z: (forward(z), z), bwd)
    return f


def gathered(factor):
    """Integer indices among the arguments, their gradient None."""
    f = jax.custom_vjp(lambda table, ids: table[ids])
    bwd = lambda saved, dy: (factor * jnp.zeros_like(saved[0]).at[saved[1]].add(dy), None)
    f.defvjp(lambda table, ids: (table[ids], (table, ids)), bwd)
    return f


def recomputed(factor):
    """optimize_remat: JAX builds a program of its own around fwd."""
    return jax.checkpoint(ruled(factor, optimize_remat=True))


KINDS = {
    "nondiff_argnums": (power, ["f32[3]"]),
    "symbolic_zeros": (zeros, ["f32[3]"]),
    "key": (keyed, ["key", "f32[6]"]),
    "bfloat16 about float32": (mixed, ["bf16[6]"]),
    "complex": (turned, ["c64[3]"]),
    "integers": (gathered, ["f32[5,2]", "i32[4]<5"]),
    "optimize_remat": (recomputed, ["f32[3]"]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_rule(kind):
    make, args = KINDS[kind]
    report = fn.check_vjp(make(1.0), *args)
    assert report.ok, str(report)
    report = fn.check_vjp(make(1.1), *args, oracles=("autodiff",), shrink=False)
    assert not report.ok
    assert "custom rules" in str(report)


def test_a_rule_out_of_reach_is_said():
    """JAX has no reverse mode through custom_vmap: forward mode alone runs the rule in it."""
    program = trace(under_vmap(ruled()), X)
    assert program.rules
    assert program.stuck == {"custom_vmap_call"}


def test_shard_map():
    mesh = jax.make_mesh((1,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
    placed = lambda f: jax.shard_map(f, mesh=mesh, in_specs=jax.P("i"), out_specs=jax.P("i"))
    right, wrong = (placed(ruled(factor)) for factor in (1.0, 1.1))
    assert fn.check_vjp(right, X, oracles=("autodiff", "numerical")).ok
    report = fn.check_vjp(wrong, X, oracles=("autodiff", "numerical"), shrink=False)
    assert not report.ok


def kernel(factor):
    """A Pallas kernel, interpreted, with a rule of its own."""

    def body(x_ref, y_ref):
        y_ref[...] = x_ref[...] ** 2

    forward = lambda x: pl.pallas_call(body, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype), interpret=True)(x)
    f = jax.custom_vjp(forward)
    f.defvjp(lambda x: (forward(x), x), lambda x, dy: (factor * 2 * x * dy,))
    return f


def test_a_pallas_kernel():
    square = lambda x: x * x
    assert fn.check_vjp(kernel(1.0), X, reference=square).ok
    assert not fn.check_vjp(kernel(1.1), X, reference=square, oracles=("autodiff",), shrink=False).ok
    report = fn.check_vjp(kernel(1.1), X, oracles=("numerical",), shrink=False)
    assert not report.ok


def test_a_linearized_function():
    """jax.linearize runs the rule: what is left of it is its derivative, held against itself."""
    f = jax.linearize(pushed(1.1), X)[1]
    assert fn.check_vjp(f, X, oracles=("autodiff", "numerical")).ok


def test_precision_of_a_product():
    """A product that rounds its factors to bfloat16 has a smooth shadow all the same."""
    precision = jax.lax.DotAlgorithmPreset.BF16_BF16_F32
    f = lambda a, b: jax.lax.dot(a, b, precision=precision, preferred_element_type=jnp.float32)
    program = trace(f, *(jnp.ones((2, 2), jnp.bfloat16) for _ in range(2)))
    a = 1 + np.arange(4.0).reshape(2, 2) * 1e-9
    with jax.enable_x64(True):
        np.testing.assert_allclose(program(a, a, double=True), a @ a, rtol=1e-15)


def test_what_is_taken_from_bits_is_known_to_be_narrow():
    assert trace(lambda x: jax.lax.bitcast_convert_type(x, jnp.int32), X).narrow
    assert trace(lambda a: jax.random.gamma(jax.random.key(0), a), X).narrow
    assert not trace(lambda x: x * jax.random.normal(jax.random.key(0), (3,)), X).narrow


@pytest.mark.parametrize("flag", ["jax_custom_vjp3", "jax_remat3"])
def test_rules_as_jax_will_hold_them(flag):
    """JAX's stated future: a custom rule and a checkpoint are objects, with no program among their parameters."""
    before = getattr(jax.config, flag, None)
    if before is None:
        pytest.skip(f"no {flag}")
    jax.config.update(flag, True)
    try:
        for place in ("bare", "scan", "remat"):
            right, wrong = (PLACES[place](ruled(factor)) for factor in (1.0, 1.1))
            assert trace(wrong, X).rules
            assert fn.check_vjp(right, X, oracles=("autodiff", "numerical")).ok
            assert not fn.check_vjp(wrong, X, oracles=("autodiff",), shrink=False).ok
    finally:
        jax.config.update(flag, before)


def hosted(call):
    """A right and a wrong rule around what Python computes, with a function made anew at every call."""
    kind = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)
    return [ruled(factor, lambda x: call(lambda x: np.sin(x), kind(x), x)) for factor in (1.0, 1.1)]


HOSTED = {
    "pure_callback": jax.pure_callback,
    "pure_callback, vectorized": partial(jax.pure_callback, vmap_method="expand_dims"),
    "io_callback": io_callback,
}


@pytest.mark.parametrize("how", HOSTED)
def test_a_callback_is_called_as_it_is_written_for_and_judged_by_numbers(how):
    """Autodiff has no word: JAX differentiates no callback."""
    right, wrong = hosted(HOSTED[how])
    report = fn.check_vjp(right, X)
    assert report.ok
    assert report.leaves[0].verdicts["numerical"] == "ok"
    assert report.leaves[0].verdicts["autodiff"] == "-"
    assert any("autodiff has no word" in note for note in report.notes)
    report = fn.check_vjp(wrong, X, shrink=False)
    assert report.leaves[0].verdicts["numerical"] == "WRONG"


@pytest.mark.parametrize("x64", [False, True])
def test_a_callback_beside_sums_and_in_a_loop(x64):
    """In every dtype, in a scan, and where the function, not its rule, holds the callback."""

    def model(f):
        def step(carry, _):
            return f(carry) + 0.5, jnp.sum(carry)

        return lambda x: jax.lax.scan(step, x, None, length=2)

    right, wrong = map(model, hosted(jax.pure_callback))
    assert fn.check_vjp(right, X, oracles=("autodiff", "numerical"), x64=x64).ok
    assert not fn.check_vjp(wrong, X, oracles=("numerical",), x64=x64, shrink=False).ok


SPOKEN = {
    "debug.print": lambda x: jax.debug.print("{}", x),
    "debug.callback": lambda x: jax.debug.callback(lambda x: None, x),
}


@pytest.mark.parametrize("how", SPOKEN)
def test_what_a_function_says_is_no_part_of_it(how):
    def said(x):
        SPOKEN[how](x)
        return jnp.sin(x)

    assert fn.check_vjp(ruled(1.0, said), X).ok
    report = fn.check_vjp(ruled(1.1, said), X, shrink=False)
    assert report.leaves[0].verdicts == {"autodiff": "WRONG", "numerical": "WRONG", "algebra": "WRONG"}
