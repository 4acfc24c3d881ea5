"""What a layer owes beside its gradient: one thing broken at a time, and named."""

from dataclasses import replace
from itertools import count

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import funcnet as fn
from funcnet.check import laws
from tests.check.points import layer_point

X = np.random.default_rng(0).normal(size=(3, 2, 4)).astype(np.float32)
DENSE = fn.dense(2)


def found(failures):
    return [(failure.leaf, failure.oracle, failure.kind) for failure in failures]


def test_a_right_layer_breaks_none_and_its_residuals_are_counted():
    point = layer_point(DENSE, X)
    assert laws.residuals(point) == laws.laws(point) == []
    assert point.notes == [f"residuals: {3 * 2 * 4 * 8} bytes in 1 arrays"]


# Contractions


def answering(contract, change, name="kernel"):
    """A dense layer that changes what one contraction gives for one parameter."""

    def bwd(params, residuals, dy, by=fn.total):
        dparams, dx = DENSE.bwd(params, residuals, dy, by)
        return (dparams | {name: change(dparams[name])} if by is contract else dparams), dx

    return replace(DENSE, bwd=bwd)


def raising(params, residuals, dy, contract=fn.total):
    if contract is not fn.total:
        raise ZeroDivisionError("for this one")
    return DENSE.bwd(params, residuals, dy)


def refusing(refused):
    def bwd(params, residuals, dy, contract=fn.total):
        if contract is refused:
            raise fn.InputError("another contraction", contract.name, "leave it")
        return DENSE.bwd(params, residuals, dy, contract)

    return replace(DENSE, bwd=bwd)


WRONG = {
    "keep": (answering(fn.keep, lambda factor: replace(factor, x=2 * factor.x)), "keep, then total at"),
    "keep, an array": (answering(fn.keep, lambda factor: jnp.zeros((4, 2))), "keep, then total at"),
    "keep, in another order": (
        answering(fn.keep, lambda factor: replace(factor, x=factor.x[::-1], dy=factor.dy[::-1])),
        "keep, then per_example at",
    ),
    "keep, of another shape": (
        answering(fn.keep, lambda factor: jnp.zeros(2)),
        "keep, then total gives float64[2] for a leaf",
    ),
    "rows": (answering(fn.rows, lambda g: 1.1 * g), "rows at"),
    "rows, rounded": (answering(fn.rows, lambda g: g.astype(jnp.float32)), "rows gives float32[4, 2] for a leaf"),
    "per_example": (answering(fn.per_example, lambda g: 1.1 * g), "the sum of per_example at"),
    "per_example, in another order": (answering(fn.per_example, lambda g: g[::-1]), "the last of per_example at"),
    "per_example, summed": (
        answering(fn.per_example, lambda g: g.sum(0)),
        "per_example gives the gradient itself: let bwd return contract(factor, param)",
    ),
    "per_example, rounded": (
        answering(fn.per_example, lambda g: g.astype(jnp.float32)),
        "per_example gives float32[3, 4, 2] for a leaf",
    ),
    "squared_norm": (answering(fn.squared_norm, lambda n: 1.1 * n), "squared_norm at"),
    "squared_norm, not squared": (answering(fn.squared_norm, jnp.sqrt), "squared_norm at"),
    "squared_norm, summed": (answering(fn.squared_norm, jnp.sum), "squared_norm gives float64[] for 3 examples"),
    "squared_norm, a column": (answering(fn.squared_norm, lambda n: n[:, None]), "squared_norm gives float64[3, 1]"),
    "squared_norm, rounded": (
        answering(fn.squared_norm, lambda n: n.astype(jnp.bfloat16)),
        "squared_norm gives bfloat16[3]",
    ),
    "an error": (
        replace(DENSE, bwd=raising),
        "bwd raises for other contractions than total: ZeroDivisionError: for this one (test_laws.py",
    ),
    **{
        f"{refused.name} is refused": (
            refusing(refused),
            f"bwd refuses {refused.name} for examples that have no part in each other",
        )
        for refused in (fn.keep, fn.per_example, fn.squared_norm)
    },
}


@pytest.mark.parametrize("name", WRONG)
def test_the_contraction_that_is_wrong_is_named(name):
    layer, message = WRONG[name]
    (failure, *more) = laws.laws(layer_point(layer, X))
    assert failure.message.startswith(message)
    leaf = "" if message.startswith("bwd") else "params['kernel']"
    assert found([failure]) == [(leaf, "laws", "contractions")]
    assert all(each.leaf == leaf for each in more)  # the bias is right


def test_touched_rows_are_held_to_the_table_that_they_stand_for():
    embedding, ids = fn.embedding(7, 2), np.array([[5, 0], [5, 2]])
    assert laws.laws(layer_point(embedding, ids)) == []

    def bwd(params, residuals, dy, by=fn.total):
        dparams, dx = embedding.bwd(params, residuals, dy, by)
        return jax.tree.map(lambda rows: 2 * rows if by is fn.rows and rows.ndim > 1 else rows, dparams), dx

    (failure,) = laws.laws(layer_point(replace(embedding, bwd=bwd), ids))
    assert failure.message.startswith("rows at")
    stacked = fn.Rows(np.array([[2, 3], [0, 1]]), jnp.arange(4.0).reshape(2, 2, 1))
    np.testing.assert_array_equal(laws._table(stacked, jnp.zeros((2, 3, 1)))[..., 0], [[0, 0, 0], [2, 3, 0]])


def test_a_layer_that_mixes_examples_may_refuse_and_a_note_says_so():
    point = layer_point(fn.batch_norm(), X)
    assert laws.laws(point) == []
    assert [note.split(":")[0] for note in point.notes] == ["per_example is refused", "squared_norm is refused"]
    one = layer_point(refusing(fn.squared_norm), X[:1])  # one example alone cannot be seen not to mix
    assert laws.laws(one) == []


# State and apply


def test_a_state_of_another_shape_or_structure_is_refused():
    for state in (np.zeros(3), {"a": np.zeros(2)}, np.zeros(2, np.float32)):
        grown = replace(
            DENSE,
            init=lambda key, x: (DENSE.init(key, x)[0], np.zeros(2)),
            fwd=lambda params, _, x, key, new=state: (DENSE.fwd(params, (), x, key)[0], new, x),
        )
        point = layer_point(grown, X)
        with point.subject.mode():
            (failure,) = laws._state(point)
        assert found([failure]) == [("", "laws", "state")]
        assert failure.message.endswith("for ['float64[2]']")


def drawing(params, state, x, key):
    y, state, saved = DENSE.fwd(params, state, x, key)
    return y + 1e-6 * jax.random.normal(key, y.shape, y.dtype), state, saved


APPLIES = {
    "right": (DENSE, []),
    "another value": (
        replace(DENSE, apply=lambda *args: 1.1 * DENSE.apply(*args)),
        [("y", "laws", "apply")],
    ),
    "another shape": (replace(DENSE, apply=lambda *args: DENSE.apply(*args)[0]), [("", "laws", "apply")]),
    "another where something is drawn": (
        replace(DENSE, fwd=drawing, apply=lambda *args: 1.1 * DENSE.apply(*args)),
        [],
    ),
    "another where there is a state": (
        replace(
            DENSE,
            init=lambda key, x: (DENSE.init(key, x)[0], np.zeros(2)),
            apply=lambda params, state, x: 1.1 * DENSE.apply(params, (), x),
            fwd=lambda params, state, x, key: (DENSE.fwd(params, (), x, key)[0], state, x),
        ),
        [],
    ),
}


@pytest.mark.parametrize("name", APPLIES)
def test_apply_is_fwd_s_output_where_there_is_no_state_and_nothing_is_drawn(name):
    layer, wanted = APPLIES[name]
    point = layer_point(layer, X)
    with point.subject.mode():
        assert found(laws._apply(point)) == wanted


# Residuals


def saving(save, use=lambda saved: saved["x"]):
    """A dense layer that saves what `save(params, x)` gives."""

    def fwd(params, state, x, key):
        return DENSE.fwd(params, state, x, key)[0], state, save(params, x)

    return replace(DENSE, fwd=fwd, bwd=lambda params, saved, dy, by=fn.total: DENSE.bwd(params, use(saved), dy, by))


calls = count(1)
RESIDUALS = {
    "of the input": (lambda params, x: {"x": x, "mixed": x * params["kernel"][None, None, :, 0]}, []),
    "of neither": (lambda params, x: {"x": x, "places": jnp.arange(3)}, []),
    "of the parameters": (
        lambda params, x: {"x": x, "w": params["kernel"] * 2},
        [("residuals['w']", "residuals", "parameters")],
    ),
    "a number": (lambda params, x: {"x": x, "n": 3}, [("residuals['n']", "residuals", "not an array")]),
    "a text": (lambda params, x: {"x": x, "name": "relu"}, [("residuals['name']", "residuals", "not an array")]),
    "another each time": (
        lambda params, x: {"x": x, "i": 0 * x + next(calls)},
        [("residuals['i']", "residuals", "repeatable")],
    ),
    "not a number, twice": (lambda params, x: {"x": x, "i": x * np.nan}, []),
}


@pytest.mark.parametrize("name", RESIDUALS)
def test_residuals_are_arrays_of_the_input_and_the_same_each_time(name):
    save, wanted = RESIDUALS[name]
    assert found(laws.residuals(layer_point(saving(save), X))) == wanted


def test_an_output_that_differs_each_time_is_refused():
    def fwd(params, state, x, key):
        y, state, saved = DENSE.fwd(params, state, x, key)
        return y + next(calls), state, saved

    (failure,) = laws.residuals(layer_point(replace(DENSE, fwd=fwd), X))
    assert failure.message == "two calls of fwd with the same key give different outputs or states"


def test_keys_are_compared_by_their_bits():
    keys = jax.random.split(jax.random.key(0), 2)
    assert laws._changed({"k": keys}, {"k": keys}) is None
    assert laws._changed({"a": jnp.ones(2), "k": keys}, {"a": jnp.ones(2), "k": keys[::-1]}) == "['k']"
    assert laws._changed(jnp.float32(0), jnp.float32(-0.0)) is None
    assert laws._changed([jnp.ones(1), jnp.asarray(True)], [jnp.ones(1), jnp.asarray(False)]) == "[1]"


@pytest.mark.parametrize("wrap", [lambda layer: layer, lambda layer: fn.mixed(layer, compute="bfloat16")])
def test_a_rule_that_multiplies_dy_by_a_number_holds_in_bfloat16(wrap):
    """NumPy makes float32 of a number times bfloat16: contractions are asked with JAX's arrays."""
    inner = fn.dense(3)
    bwd = lambda params, saved, dy, contract=fn.total: inner.bwd(params, saved, 2.0 * dy, contract)
    doubled = replace(
        inner,
        apply=lambda *args: 2.0 * inner.apply(*args),
        fwd=lambda *args: (2.0 * inner.fwd(*args)[0], *inner.fwd(*args)[1:]),
        bwd=bwd,
    )
    layer = wrap(doubled)
    dtype = "float32" if layer is not doubled else "bfloat16"
    fn.check_layer(layer, "f32[4,2]", dtype=dtype, oracles=("laws",)).raise_for_failure()
    params, state = layer.init(jax.random.key(0), jnp.ones((4, 2), dtype))
    y, _, saved = layer.fwd(params, state, jnp.ones((4, 2), dtype), None)
    if layer is not doubled:
        assert layer.bwd(params, saved, np.ones(y.shape, "float32"))[1].shape == (4, 2)


@pytest.mark.parametrize(("off", "holds"), [(0.0, True), (1e3, False)])
def test_apply_may_be_off_by_what_rounding_makes_of_cancelling_terms(off, holds):
    def forward(params, x):
        a, b, c = x[:, :1], x[:, 1:2], x[:, 2:]
        return (a + b) + c, x

    def bwd(params, x, dy, contract):
        return {}, jnp.concatenate([dy, dy, dy], axis=1)

    def other(params, state, x):
        return x[:, :1] + (x[:, 1:2] + x[:, 2:]) + off

    layer = replace(fn.stateless("sum", lambda key, x: {}, forward, bwd), apply=other)
    x = np.float32([[2, 3e8 + 32, -3e8], [1, 7e8, -7e8 - 64]])
    report = fn.check_layer(layer, x, dtype="float32", oracles=("laws",))
    assert [failure.kind for failure in report.failures] == ([] if holds else ["apply"])


def summing(positionwise, reverse=False):
    """y_t = x_1 + .. + x_t, or x_t + .. + x_T, which is another thing at each position alone."""
    return fn.stateless(
        "summing",
        lambda key, x: {},
        lambda params, x: (jax.lax.cumsum(x, 1, reverse), ()),
        lambda params, saved, dy, contract: ({}, jax.lax.cumsum(dy, 1, not reverse)),
        positionwise=positionwise,
    )


def test_a_layer_that_looks_at_other_positions_may_not_say_that_it_does_not():
    assert laws.laws(layer_point(summing(False), X)) == laws.laws(layer_point(summing(True), X[:, 0])) == []
    for reverse in (False, True):
        assert found(laws.laws(layer_point(summing(True, reverse), X))) == [("y", "laws", "positionwise")]
    assert found(laws.laws(layer_point(replace(fn.flatten(), positionwise=True), X))) == [("y", "laws", "positionwise")]
