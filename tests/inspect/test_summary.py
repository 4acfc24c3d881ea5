"""The table by layer: its numbers against what fwd really returns."""

import jax
import jax.numpy as jnp
import numpy as np

import funcnet as fn

MODEL = fn.serial(
    fn.dense(8),
    fn.relu(),
    fn.skip(fn.serial(fn.layer_norm(), fn.dense(8))),
    blocks=fn.repeat(fn.serial(fn.dense(8), fn.tanh(), fn.dense(8)), 3),
    out=fn.remat(fn.dense(2)),
)
X = jax.ShapeDtypeStruct((4, 6), jnp.float32)


def test_totals_are_those_of_the_arrays():
    params, state = MODEL.init(jax.random.key(0), X)
    table = fn.summary(MODEL, X)
    assert table.parameters == sum(p.size for p in jax.tree.leaves(params))
    assert table.parameter_bytes == 4 * table.parameters
    residuals = jax.jit(MODEL.fwd)(params, state, np.ones(X.shape, X.dtype), jax.random.key(1))[2]
    # saved twice, kept once: relu's output, layer_norm's input; each tanh's output is the next dense layer's input
    shared = sum(leaf.nbytes for leaf in jax.tree.leaves((residuals["blocks"]["tanh"], residuals["relu"])))
    key = 8  # the key that remat keeps
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(residuals) if leaf.dtype == jnp.float32)
    assert table.residual_bytes == whole - shared + key


def test_rows_are_the_layers_by_path():
    rows = {row.path: row for row in fn.summary(MODEL, X).rows}
    assert list(rows) == [
        ("dense",), ("relu",), ("skip",), ("skip", "layer_norm"), ("skip", "dense"),
        ("blocks",), ("blocks", "dense"), ("blocks", "tanh"), ("blocks", "dense_1"), ("out",),
    ]  # fmt: skip
    assert rows[("dense",)].output == "float32[4, 8]"
    assert rows[("blocks",)].parameters == 3 * 2 * (8 * 8 + 8)
    assert rows[("blocks", "dense")].parameters == 8 * 8 + 8
    assert rows[("skip", "layer_norm")].residual_bytes == 4 * (4 * 8 + 5 * 4)


def test_a_huge_model_costs_nothing():
    huge = fn.serial(*[fn.dense(1_000_000)] * 3)
    table = fn.summary(huge, jax.ShapeDtypeStruct((4096, 1_000_000), jnp.float32))
    assert table.parameters == 3 * (10**12 + 10**6)


def test_it_prints_a_table_with_a_total():
    lines = str(fn.summary(MODEL, X)).splitlines()
    assert lines[0].split() == ["layer", "kind", "output", "parameters", "residual", "bytes"]
    assert lines[-2].startswith("total")
    assert "one turn" in lines[-1]


def test_a_single_layer_is_its_own_row():
    (row,) = fn.summary(fn.dense(3), X).rows
    assert (row.kind, row.parameters) == ("dense", 21)


def test_an_objective_is_tabulated_with_its_loss():
    batch = X, jax.ShapeDtypeStruct((4,), jnp.int32)
    body = fn.serial(fn.dense(8), fn.relu())
    head = fn.summary(fn.objective(body, fn.linear_cross_entropy(5)), batch)
    rows = {row.path: row for row in head.rows}
    assert list(rows) == [("model",), ("model", "dense"), ("model", "relu"), ("loss",)]
    assert (rows[("loss",)].kind, rows[("loss",)].output) == ("linear_cross_entropy", "float32[4]")
    assert rows[("loss",)].parameters == 8 * 5 + 5
    assert head.parameters == 6 * 8 + 8 + 8 * 5 + 5
    plain = fn.summary(fn.objective(fn.serial(*body.parts.values(), fn.dense(5)), fn.cross_entropy()), batch)
    assert plain.parameters == head.parameters
    assert plain.residual_bytes > 0
    assert "cross_entropy" in str(plain)


def test_frozen_layers_learn_nothing_and_named_ones_keep_their_kind():
    frozen = fn.freeze(fn.serial(fn.dense(8), fn.named("bend", fn.relu())))
    table = fn.summary(fn.serial(frozen, fn.named("head", fn.freeze(fn.dense(2))), fn.dense(3)), X)
    rows = [(row.path, row.kind, row.parameters) for row in table.rows]
    assert rows == [
        (("serial",), "serial, frozen", 0),
        (("serial", "dense"), "dense", 0),
        (("serial", "bend"), "relu", 0),
        (("head",), "dense, frozen", 0),
        (("dense",), "dense", 9),
    ]
    assert table.parameters == 9


def test_a_stack_of_reversible_layers_keeps_less_than_its_layers_do():
    block = fn.reversible(fn.dense(3), fn.dense(3))
    table = fn.summary(fn.serial(fn.serial(block, block), fn.repeat(block, 2)), X)
    kept = {row.path: row.residual_bytes for row in table.rows}
    y, key = 4 * 6 * 4, 8
    assert kept[("serial", "reversible")] == y + key
    assert kept[("serial",)] == kept[("repeat",)] == y + 2 * key


def test_a_layer_that_stands_in_two_places_is_pointed_out():
    inner = fn.dense(4)
    found = fn.summary(fn.serial(inner, fn.relu(), inner, fn.relu()), jnp.ones((2, 4)))
    assert found.again == ((("dense",), ("dense_1",)),)
    assert "dense and dense_1 are one layer with parameters of its own at each place" in str(found)
    assert not fn.summary(fn.repeat(fn.serial(fn.dense(4), fn.tanh()), 3), jnp.ones((2, 4))).again
