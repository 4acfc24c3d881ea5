"""The checker: wrong rules are refused and blamed on the right leaf or law, right ones pass."""

import re
from dataclasses import replace
from functools import partial
from itertools import count

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import funcnet as fn
from tests.check.rules import masking

S = jax.ShapeDtypeStruct
X = S((3, 2, 4), jnp.float32)
SQUARE = S((3, 5), jnp.float32)


def check(layer, x, **options):
    """check_layer with parameters and state drawn by NumPy: most of its time goes into compiling `init`."""
    params, state = jax.eval_shape(layer.init, jax.random.key(0), x)
    rng = np.random.default_rng(1)
    params, state = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(leaf.dtype), (params, state))
    return fn.check_layer(layer, x, params=params, state=state, **options)


def rule(layer, bwd):
    """The layer with bwd(dparams, dx, params, residuals, dy) -> (dparams, dx) on top of its own."""

    def changed(params, residuals, dy, contract=fn.total):
        return bwd(*layer.bwd(params, residuals, dy, contract), params, residuals, dy)

    return replace(layer, bwd=changed)


def dparam(name, f, layer=None):
    """A dense layer, or another one, with the gradient of one parameter put through f(g, params, residuals, dy)."""
    return rule(layer or fn.dense(2), lambda dp, dx, *rest: ({**dp, name: f(dp[name], *rest)}, dx))


def dinput(f, layer=None):
    """A dense layer, or another one, with the gradient of its input put through f(dx, params, residuals, dy)."""
    return rule(layer or fn.dense(2), lambda dp, dx, *rest: (dp, f(dx, *rest)))


def saving(f, layer=None, unpack=lambda residuals: residuals):
    """A dense layer, or another one, that saves f(params, x, residuals), and unpacks it for its own bwd."""
    layer = layer or fn.dense(2)

    def fwd(params, state, x, key):
        y, state, residuals = layer.fwd(params, state, x, key)
        return y, state, f(params, x, residuals)

    def bwd(params, residuals, dy, contract=fn.total):
        return layer.bwd(params, unpack(residuals), dy, contract)

    return replace(layer, fwd=fwd, bwd=bwd)


def element(g, *_):
    return g.at[(0,) * g.ndim].multiply(0.9)


def kinked(name, slope):
    """relu or relu6 with another derivative."""
    right = {"relu": fn.relu(), "relu6": fn.relu6()}[name]
    return fn.elementwise(name, lambda x: right.apply({}, (), x), lambda y: slope(y).astype(y.dtype), "output")


def swapped(dp, dx, *_):
    return {"a": dp["b"], "b": dp["a"]}, dx


def turns_reversed(g, *_):
    return g[::-1]


KERNEL, BIAS = "params['kernel']", "params['bias']"
PAIR = (SQUARE, SQUARE)
LABELS = (S((3, 5), jnp.float32), np.array([0, 4, 2]))

# name: (layer, input, the leaves to blame, words of the law to blame)
WRONG = {
    # values
    "a stale residual": (saving(lambda p, x, r: r + 1), X, [KERNEL], ""),
    "two layers' gradients swapped": (
        rule(fn.parallel(a=fn.dense(2), b=fn.dense(2)), swapped),
        PAIR,
        ["params['a']['bias']", "params['a']['kernel']", "params['b']['bias']", "params['b']['kernel']"],
        "",
    ),
    "a gradient in a nested layer": (
        fn.serial(ok=fn.dense(3), deep=fn.serial(dense=dparam("bias", element))),
        X,
        ["params['deep']['dense']['bias']"],
        "",
    ),
    "repeat's turns in reverse": (dparam("bias", turns_reversed, fn.repeat(fn.dense(4), 2)), X, [BIAS], ""),
    "bias gradient is off by a billionth": (dparam("bias", lambda g, *_: g * (1 + 1e-9)), X, [BIAS], ""),
    "relu6 is off by a millionth beside a kink": (
        dinput(lambda g, *_: g * (1 + 1e-6), fn.relu6()),
        np.array([[6.0, 1, 2]]),
        ["x"],
        "",
    ),
    "a slope beyond both sides of a kink": (
        dinput(lambda g, p, y, dy: jnp.where(y == 0, 2 * dy, g), fn.relu()),
        np.array([[0.0, 1, 2]]),
        ["x"],
        "",
    ),
    # structure
    "bias gradient in float32": (dparam("bias", lambda g, *_: g.astype(jnp.float32)), X, [BIAS], ""),
    "dx in float32": (dinput(lambda g, *_: g.astype(jnp.float32)), X, ["x"], ""),
    "bias gradient of another shape": (dparam("bias", lambda g, *_: g[None]), X, [BIAS], ""),
    "kernel gradient of another shape": (dparam("kernel", lambda g, *_: g.T), X, [KERNEL], ""),
    "dx of another shape": (dinput(lambda g, *_: g.reshape(6, 4)), X, ["x"], ""),
    "bias gradient for each example": (dparam("bias", lambda g, p, x, dy: dy.sum(1)), X, [BIAS], ""),
    "bias gradient is missing": (rule(fn.dense(2), lambda dp, dx, *_: ({"kernel": dp["kernel"]}, dx)), X, [BIAS], ""),
    "bias gradient is None": (dparam("bias", lambda g, *_: None), X, [BIAS], ""),
    "a gradient too many": (
        rule(fn.dense(2), lambda dp, dx, *_: (dp | {"more": dp["bias"]}, dx)),
        X,
        ["params['more']"],
        "",
    ),
    "dx is None": (dinput(lambda g, *_: None), X, ["x"], ""),
    "dparams is None": (rule(fn.dense(2), lambda dp, dx, *_: (None, dx)), X, [BIAS, KERNEL], ""),
    # laws
    "bwd of the size of dy": (
        rule(fn.dense(2), lambda dp, dx, p, x, dy: (fn.dense(2).bwd(p, x, jnp.abs(dy))[0], dx)),
        X,
        [BIAS, KERNEL],
        "linearity",
    ),
    "bwd with something added": (dparam("bias", lambda g, *_: g + 1), X, [BIAS], "zero cotangent"),
    "dx clipped": (dinput(lambda g, *_: jnp.clip(g, -0.1, 0.1)), X, ["x"], "linearity"),
    "apply differs from fwd": (
        replace(fn.dense(2), apply=lambda p, s, x: 1.01 * fn.dense(2).apply(p, s, x)),
        X,
        [],
        "laws, apply",
    ),
    "apply of another shape": (
        replace(fn.dense(2), apply=lambda p, s, x: fn.dense(2).apply(p, s, x)[0]),
        X,
        [],
        "laws, apply",
    ),
    "fwd returns state that init did not": (
        replace(fn.dense(2), fwd=lambda p, s, x, key: (*fn.dense(2).fwd(p, s, x, key)[:1], jnp.ones(2), x)),
        X,
        [],
        "laws, state",
    ),
    "a parameter among the residuals": (
        saving(lambda p, x, r: (r, p["kernel"]), unpack=lambda r: r[0]),
        X,
        [],
        r"residuals\[1\].*parameter",
    ),
    "what depends on parameters alone among the residuals": (
        saving(lambda p, x, r: (r, p["kernel"].T), unpack=lambda r: r[0]),
        X,
        [],
        r"residuals\[1\].*param",
    ),
    "a number among the residuals": (saving(lambda p, x, r: (r, 3), unpack=lambda r: r[0]), X, [], "int, not an array"),
    "a text among the residuals": (
        saving(lambda p, x, r: (r, "relu"), unpack=lambda r: r[0]),
        X,
        [],
        "str, not an array",
    ),
    "a function among the residuals": (
        saving(lambda p, x, r: (r, max), unpack=lambda r: r[0]),
        X,
        [],
        "builtin.*not an array",
    ),
    "a NumPy array among the residuals": (
        saving(lambda p, x, r: (r, np.ones(2)), unpack=lambda r: r[0]),
        X,
        [],
        "ndarray|float64.*not an array",
    ),
}


def blamed(report):
    return sorted(leaf.leaf for leaf in report.leaves if not leaf.ok)


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_rule_is_refused_and_blamed_on_the_right_leaf_or_law(name):
    layer, x, leaves, words = WRONG[name]
    report = check(layer, x, shrink=False)
    assert not report.ok
    assert blamed(report) == sorted(leaves)
    said = "\n".join(map(str, report.failures))
    assert re.search(words, said), said
    assert {failure.leaf for failure in report.failures} <= {*leaves, "", "y", "residuals[1]"}
    with pytest.raises(AssertionError) as error:
        report.raise_for_failure()
    for leaf in leaves:
        assert any(leaf in line and "WRONG" in line for line in str(error.value).splitlines())


def test_a_fwd_that_draws_from_elsewhere_than_its_key_is_refused():
    calls, layer = count(100), masking()
    impure = replace(layer, fwd=lambda p, s, x, key: layer.fwd(p, s, x, jax.random.key(next(calls))))
    assert not fn.check_layer(impure, X).ok


def normal(*shape):
    return np.random.default_rng(0).normal(size=shape)


RIGHT = {
    "a rank of 1": (fn.dense(2), S((4,), jnp.float32)),
    "sizes of 1": (fn.dense(1), S((1, 1), jnp.float32)),
    "no parameters": (fn.relu(), X),
    "kinks themselves": (fn.relu6(), np.array([[0.0, 6.0, -1.0, 3.0]])),
    "randomness": (masking(), X),
    "randomness that two keys agree on": (masking(), np.ones((1, 1))),
    "integer input": (fn.flatten(), np.arange(6).reshape(1, 2, 3)),
    "integers beside floats": (fn.cross_entropy(), LABELS),
    "several inputs and outputs": (fn.parallel(fn.dense(2), fn.relu()), (X, SQUARE)),
    "residuals with a key": (fn.remat(fn.serial(fn.dense(2), masking())), X),
    "values far from 1": (fn.dense(3), 1e6 * normal(4, 5)),
    "an input whose gradient nearly vanishes": (fn.rms_norm(), normal(3, 1)),
}


@pytest.mark.parametrize("name", RIGHT)
def test_a_right_rule_passes(name):
    layer, x = RIGHT[name]
    report = check(layer, x)
    report.raise_for_failure()
    assert report.ok
    assert "hold" in str(report)


def test_leaves_are_named_by_their_paths_and_shapes():
    report = fn.check_layer(fn.serial(fn.dense(2)), X)
    assert {leaf.leaf: (leaf.shape, leaf.dtype) for leaf in report.leaves} == {
        "params['dense']['kernel']": ((4, 2), "float64"),
        "params['dense']['bias']": ((2,), "float64"),
        "x": ((3, 2, 4), "float64"),
    }
    assert "serial" in report.title


def test_a_seed_gives_one_report_and_another_seed_another():
    same = [str(fn.check_layer(fn.tanh(), SQUARE, seed=seed)) for seed in (1, 1, 2)]
    assert same[0] == same[1] != same[2]


def test_params_state_and_input_that_are_given_are_used():
    seen = []

    def fwd(params, state, x, key):
        seen.append((params["kernel"], state, x))
        y, _, residuals = fn.dense(2).fwd(params, (), x, key)
        return y, state, residuals

    layer = replace(fn.dense(2), fwd=fwd)
    params = {"kernel": np.full((4, 2), 3.0, np.float32), "bias": np.ones(2, np.float32)}
    x = np.full((3, 4), 5.0, np.float32)
    with jax.disable_jit():
        fn.check_layer(layer, x, params=params, state=np.float32(7)).raise_for_failure()
    kernel, state, at = (
        np.asarray(leaf) for leaf in next(call for call in seen if not isinstance(call[0], jax.core.Tracer))
    )
    np.testing.assert_array_equal(kernel, params["kernel"])
    np.testing.assert_array_equal(at, x)
    assert state == 7
    assert kernel.dtype == at.dtype == state.dtype == np.float64


def test_the_line_that_shows_a_failure_again_has_all_that_was_given():
    layer, x = fn.freeze(fn.dense(2)), normal(3, 4)
    state = jax.tree.map(lambda leaf: leaf + 1, layer.init(jax.random.key(0), x)[1])
    wrong = replace(layer, bwd=lambda params, saved, dy, contract=fn.total: (params, jnp.zeros_like(x)))
    report = fn.check_layer(wrong, x, state=state, directions=5, shrink=False)
    assert report.repeat.endswith(", state=()), seed=0, directions=5)")
    again = eval(report.repeat, {"fn": fn, "Frozen": fn.Frozen, "layer": wrong, "x": x, "state": state})
    assert again.failures == report.failures


def test_a_state_can_be_drawn_too():
    state = {"mean": "f32[4]", "var": "f32[4]>0"}
    report = fn.check_layer(fn.batch_norm(), "f32[5,4]", state=state, oracles=("autodiff", "laws"))
    report.raise_for_failure()


def test_params_alone_can_be_given():
    params = {"dense": {"kernel": normal(4, 2), "bias": normal(2)}}
    fn.check_layer(fn.serial(fn.dense(2)), X, params=params).raise_for_failure()


@pytest.mark.parametrize(("dtype", "share"), [("float32", 1e-2), ("bfloat16", 0.5)])
def test_a_coarser_dtype_has_a_coarser_tolerance(dtype, share):
    report = check(fn.dense(2), SQUARE, dtype=dtype)
    assert report.ok
    assert {leaf.dtype for leaf in report.leaves} == {dtype}
    off = dparam("kernel", lambda g, *_: g.at[0, 0].add(jnp.asarray(share * jnp.abs(g).max(), g.dtype)))
    assert blamed(check(off, SQUARE, dtype=dtype)) == [KERNEL]


def test_checking_leaves_the_precision_of_the_program_alone():
    fn.check_layer(fn.relu(), SQUARE)
    assert jnp.ones(1).dtype == jnp.float32
    with pytest.raises(ValueError, match="scale must"):
        fn.check_layer(replace(fn.relu(), fwd=partial(_refuse, "scale must be given")), SQUARE)
    assert jnp.ones(1).dtype == jnp.float32


def _refuse(message, *_):
    raise ValueError(message)


@pytest.mark.parametrize("options", [{"dtype": "float33"}, {"dtype": "int32"}, {"seed": -1}, {"seed": 0.5}])
def test_options_that_mean_nothing_are_refused(options):
    with pytest.raises(fn.InputError, match=r"floating dtype|a seed"):
        fn.check_layer(fn.relu(), SQUARE, **options)


@pytest.mark.parametrize(
    ("x", "message"),
    [(S((3,), jnp.int32), "values for an integer input"), ([1.0, 2.0], "expected  arrays"), ("f32[", "an array like")],
)
def test_an_input_that_cannot_be_drawn_is_refused(x, message):
    with pytest.raises(fn.InputError, match=message):
        fn.check_layer(fn.relu(), x)
