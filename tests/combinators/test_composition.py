"""Combinators against the plain composition written out, by `jax.vjp`; their names, and rebuilt of parts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import funcnet as fn
from tests.trees import assert_close, assert_same, draw, normal, turns

S = jax.ShapeDtypeStruct
KEY = jax.random.key(0)


def dense(p, x):
    return x @ p["kernel"] + p["bias"][None]


def block(p, x):
    return jnp.tanh(dense(p["dense"], x))


def in_turn(f, p, n, x):
    for turn in turns(p, n):
        x = f(turn, x)
    return x


BLOCK = fn.serial(fn.dense(5), fn.tanh())
X = S((3, 5), jnp.float64)
# name: (model, input, the same function in plain JAX)
PLAIN = {
    "serial": (
        fn.serial(fn.dense(4), fn.tanh(), fn.dense(2)),
        X,
        lambda p, x: dense(p["dense_1"], jnp.tanh(dense(p["dense"], x))),
    ),
    "serial of one": (fn.serial(fn.dense(1)), S((1, 1), jnp.float64), lambda p, x: dense(p["dense"], x)),
    "skip": (fn.skip(BLOCK), X, lambda p, x: x + block(p, x)),
    "skip of a skip": (fn.skip(fn.skip(fn.dense(5))), X, lambda p, x: x + (x + dense(p, x))),
    "parallel": (
        fn.parallel(fn.dense(4), BLOCK, last=fn.identity()),
        (X, X, S((2, 7), jnp.float64)),
        lambda p, x: (dense(p["dense"], x[0]), block(p["serial"], x[1]), x[2]),
    ),
    "branch": (
        fn.branch(fn.dense(4), BLOCK, last=fn.identity()),
        X,
        lambda p, x: (dense(p["dense"], x), block(p["serial"], x), x),
    ),
    "branch of a pair": (
        fn.branch(fn.parallel(fn.dense(4), fn.tanh()), b=fn.parallel(fn.tanh(), fn.identity())),
        (X, S((2, 7), jnp.float64)),
        lambda p, x: ((dense(p["parallel"]["dense"], x[0]), jnp.tanh(x[1])), (jnp.tanh(x[0]), x[1])),
    ),
    "repeat": (fn.repeat(BLOCK, 3), X, lambda p, x: in_turn(block, p, 3, x)),
    "repeat once": (fn.repeat(fn.dense(5), 1), X, lambda p, x: in_turn(dense, p, 1, x)),
    "repeat without params": (fn.repeat(fn.tanh(), 2), X, lambda p, x: jnp.tanh(jnp.tanh(x))),
    "repeat of repeat": (
        fn.repeat(fn.skip(fn.repeat(BLOCK, 2)), 3),
        X,
        lambda p, x: in_turn(lambda p, x: x + in_turn(block, p, 2, x), p, 3, x),
    ),
    "repeat of parallel": (
        fn.repeat(fn.parallel(a=fn.dense(5), b=fn.tanh()), 2),
        (X, X),
        lambda p, x: in_turn(lambda p, x: (dense(p["a"], x[0]), jnp.tanh(x[1])), p, 2, x),
    ),
}


@pytest.mark.parametrize("name", PLAIN)
def test_values_and_gradients_are_those_of_the_plain_composition(name, x64):
    model, x, plain = PLAIN[name]
    params, state, x = draw(model, x)

    @jax.jit
    def both(params, x):
        y, new_state, residuals = model.fwd(params, state, x, None)
        wanted, pullback = jax.vjp(plain, params, x)
        dy = normal(4, wanted)
        return (
            (y, model.apply(params, state, x), *model.bwd(params, residuals, dy)),
            (wanted, wanted, *pullback(dy)),
            new_state,
        )

    got, wanted, new_state = both(params, x)
    assert jax.tree.structure(new_state) == jax.tree.structure(state)
    assert_close(got, wanted, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("where", ["front", "back", "both"])
def test_nesting_serial_changes_nothing_but_names(where, x64):
    a, b, c = fn.dense(4), fn.gelu(), fn.dense(2)
    flat = fn.serial(a=a, b=b, c=c)
    nested = {
        "front": fn.serial(ab=fn.serial(a=a, b=b), c=c),
        "back": fn.serial(a=a, bc=fn.serial(b=b, c=c)),
        "both": fn.serial(all=fn.serial(a=fn.serial(a=a), bc=fn.serial(b=b, c=c))),
    }[where]
    params, state, x = draw(flat, X)

    def renamed(p):
        front, back = {"a": p["a"], "b": p["b"]}, {"b": p["b"], "c": p["c"]}
        return {
            "front": {"ab": front, "c": p["c"]},
            "back": {"a": p["a"], "bc": back},
            "both": {"all": {"a": {"a": p["a"]}, "bc": back}},
        }[where]

    y, _, residuals = flat.fwd(params, state, x, None)
    z, _, nested_residuals = nested.fwd(renamed(params), renamed(state), x, None)
    assert_same(z, y)
    dparams, dx = flat.bwd(params, residuals, jnp.cos(y))
    assert_same(nested.bwd(renamed(params), nested_residuals, jnp.cos(y)), (renamed(dparams), dx))


EVERYTHING = fn.serial(
    fn.dense(4),
    fn.layer_norm(),
    fn.repeat(fn.skip(fn.serial(fn.rms_norm(), fn.dense(4), fn.gelu(), fn.dropout(0.3))), 2),
    fn.remat(fn.serial(fn.dense(6), fn.silu(), fn.dropout(0.2))),
    out=fn.dense(3),
)


def test_a_model_of_every_combinator_holds_to_the_laws():
    params, state, x = draw(EVERYTHING, S((3, 5), jnp.float32))
    fn.check_layer(EVERYTHING, x, params=params, state=state).raise_for_failure()


def test_forward_mode_through_the_backward_pass_gives_hessian_vector_products(x64):
    params, state, x = draw(EVERYTHING, X)
    params, state = {"model": params, "loss": {}}, {"model": state, "loss": ()}
    run = fn.value_and_grad(fn.objective(EVERYTHING, fn.cross_entropy()))
    batch = x, jnp.array([0, 2, 1])
    by_hand = lambda params: run(params, state, batch, KEY)[1]
    automatic = jax.grad(lambda params: run(params, state, batch, KEY)[0][0])

    @jax.jit
    def products(params, v):
        return [jax.jvp(gradient, (params,), (v,))[1] for gradient in (by_hand, automatic)]

    got, wanted = products(params, normal(5, params))
    assert_close(got, wanted, rtol=1e-9, atol=1e-12)
    assert all(np.abs(leaf).max() > 1e-6 for leaf in jax.tree.leaves(wanted))


@pytest.mark.parametrize("combinator", [fn.serial, fn.parallel, fn.branch])
@pytest.mark.parametrize(
    ("layers", "named", "expected"),
    [
        ([fn.dense(3)], {}, ["dense"]),
        ([fn.dense(3), fn.relu(), fn.dense(3)], {}, ["dense", "relu", "dense_1"]),
        ([fn.dense(3)] * 12, {}, ["dense", *(f"dense_{i}" for i in range(1, 12))]),
        ([fn.dense(3), fn.skip(fn.dense(3))], {"head": fn.dense(3)}, ["dense", "skip", "head"]),
        ([], {"b": fn.dense(3), "a": fn.dense(3)}, ["b", "a"]),
        ([fn.repeat(fn.relu(), 2), fn.serial(fn.relu()), fn.serial(fn.relu())], {}, ["repeat", "serial", "serial_1"]),
        ([fn.remat(fn.dense(3)), fn.mixed(fn.dense(3))], {}, ["dense", "dense_1"]),
    ],
)
def test_names_are_the_kinds_numbered_when_repeated_and_then_the_given_ones(combinator, layers, named, expected):
    model = combinator(*layers, **named)
    assert list(model.parts) == expected
    x = S((2, 3), jnp.float32)
    params, state = jax.eval_shape(model.init, KEY, (x,) * len(expected) if combinator is fn.parallel else x)
    assert set(params) == set(state) == set(expected)


@pytest.mark.parametrize("combinator", [fn.serial, fn.parallel, fn.branch])
@pytest.mark.parametrize(
    ("layers", "named", "message"),
    [
        ([], {}, "at least one layer"),
        ([fn.dense(3)], {"dense": fn.dense(3)}, r"\['dense'\] twice"),
        ([fn.dense(3)] * 2, {"dense_1": fn.dense(3)}, r"\['dense_1'\] twice"),
    ],
)
def test_no_layers_and_clashing_names_are_refused(combinator, layers, named, message):
    with pytest.raises(fn.InputError, match=message):
        combinator(*layers, **named)


TWO = (S((3, 5), jnp.float32),) * 2


def everything(model, params, state, x):
    """What each function of a model returns."""
    y, new_state, residuals = model.fwd(params, state, x, KEY)
    return model.init(KEY, x), model.apply(params, state, x), y, new_state, residuals, model.bwd(params, residuals, y)


@pytest.mark.parametrize(
    ("model", "x"),
    [
        (fn.serial(fn.dense(4), fn.dense(3)), TWO[0]),
        (fn.parallel(fn.dense(4), tanh=fn.tanh()), TWO),
        (fn.branch(fn.dense(4), tanh=fn.tanh()), TWO[0]),
        (fn.skip(BLOCK), TWO[0]),
        (fn.skip(BLOCK, fn.dense(5)), TWO[0]),
        (fn.repeat(BLOCK, 2), TWO[0]),
        (fn.remat(BLOCK), TWO[0]),
        (fn.mixed(BLOCK), TWO[0]),
        (fn.freeze(BLOCK), TWO[0]),
        (fn.named("a", BLOCK), TWO[0]),
        (fn.reversible(fn.dense(5), fn.tanh()), TWO),
        (fn.tied(fn.serial(a=fn.dense(5), b=fn.dense(5)), {"b/kernel": "a/kernel"}), TWO[0]),
    ],
    ids=(
        [
            "serial",
            "parallel",
            "branch",
            "skip",
            "skip_with_a_shortcut",
            "repeat",
            "remat",
            "mixed",
            "freeze",
            "named",
            "reversible",
            "tied",
        ]
    ),
)
def test_rebuilt_of_its_own_parts_a_combinator_is_the_same(model, x):
    rebuilt = model.rebuild(model.parts)
    assert (rebuilt.name, list(rebuilt.parts)) == (model.name, list(model.parts))
    params, state, x = draw(model, x)
    program = lambda model: str(jax.make_jaxpr(lambda *args: everything(model, *args))(params, state, x))
    assert program(rebuilt) == program(model)


@pytest.mark.parametrize(
    "wrap",
    [fn.skip, fn.remat, fn.mixed, fn.freeze, lambda layer: fn.named("a", layer), lambda layer: fn.repeat(layer, 2)],
)
def test_rebuilt_of_other_parts_a_combinator_runs_those(wrap):
    others = {"dense": fn.dense(5, use_bias=False), "tanh": fn.gelu()}
    rebuilt, wanted = wrap(BLOCK).rebuild(others), wrap(fn.serial(**others))
    assert dict(rebuilt.parts) == others
    params, state, x = draw(wanted, TWO[0])
    program = lambda model: str(jax.make_jaxpr(lambda *args: everything(model, *args))(params, state, x))
    assert program(rebuilt) == program(wanted) != program(wrap(fn.serial(dense=others["dense"], tanh=fn.tanh())))
    assert wrap(fn.dense(5)).rebuild is None
