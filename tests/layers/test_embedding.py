"""Embeddings: lookups and gradients against NumPy and PyTorch, touched rows, ids out of range; positions, rotations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import funcnet as fn

S = jax.ShapeDtypeStruct
KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
TABLE = RNG.normal(size=(7, 5))
IDS = np.array([[3, 0, 3], [6, 6, 6], [1, 2, 3], [0, 0, 5]])
DY = RNG.normal(size=(4, 3, 5))
TOLERANCES = pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float64", 1e-10)])
HALF = pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])


def summed(ids, dy, vocab=7):
    """The table's gradient, in NumPy."""
    table = np.zeros((vocab, dy.shape[-1]))
    np.add.at(table, ids.reshape(-1), dy.reshape(-1, dy.shape[-1]))
    return table


def contracted(how, ids=IDS, dy=DY, table=TABLE):
    ids, dy, table = jnp.asarray(ids), jnp.asarray(dy, jnp.float32), jnp.asarray(table, jnp.float32)
    return jax.jit(how)(fn.Gather(ids, dy, len(table)), table)


# embedding


@pytest.mark.parametrize("shape", [(), (4,), (4, 3), (2, 1, 3, 2)])
@pytest.mark.parametrize("kind", ["int8", "uint8", "int32", "uint32"])
def test_the_output_is_the_rows_of_the_table(shape, kind):
    ids = RNG.integers(0, 7, shape).astype(kind)
    table = TABLE.astype(np.float32)
    y, state, saved = fn.embedding(7, 5).fwd({"embedding": jnp.asarray(table)}, (), ids, None)
    np.testing.assert_array_equal(y, table[ids])
    np.testing.assert_array_equal(saved, ids)
    assert state == ()


def test_ids_of_eight_bits_reach_into_a_larger_table():
    table = jnp.arange(600.0).reshape(300, 2)
    ids = jnp.array([[127, 3]], jnp.int8)
    for run in (fn.embedding(300, 2).apply, jax.jit(fn.embedding(300, 2).apply)):
        np.testing.assert_array_equal(run({"embedding": table}, (), ids), [[[254, 255], [6, 7]]])
    gradient = fn.total(fn.Gather(ids, jnp.ones((1, 2, 2)), 300), table)
    np.testing.assert_array_equal(np.flatnonzero(gradient[:, 0]), [3, 127])


@TOLERANCES
def test_output_and_gradient_are_those_of_pytorch(dtype, tolerance, x64):
    torch = pytest.importorskip("torch")
    table = torch.tensor(TABLE.astype(dtype), requires_grad=True)
    theirs = torch.nn.functional.embedding(torch.tensor(IDS), table)
    theirs.backward(torch.tensor(DY.astype(dtype)))
    params = {"embedding": jnp.asarray(TABLE.astype(dtype))}
    y, _, saved = fn.embedding(7, 5).fwd(params, (), IDS, None)
    dparams, dx = fn.embedding(7, 5).bwd(params, saved, DY.astype(dtype))
    assert dx is None
    np.testing.assert_array_equal(y, theirs.detach().numpy())
    np.testing.assert_allclose(dparams["embedding"], table.grad.numpy(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_init_draws_rows_of_length_one(dtype):
    params, state = fn.embedding(50, 400, dtype=dtype).init(KEY, S((4, 3), jnp.int32))
    table = params["embedding"]
    assert (table.shape, table.dtype, state) == ((50, 400), dtype, ())
    np.testing.assert_allclose(np.square(np.asarray(table, np.float32)).sum(1).mean(), 1, rtol=0.05)


@HALF
def test_half_precision_gradients_are_summed_in_float32(dtype):
    ids, ones = jnp.zeros((64, 64), jnp.int32), jnp.ones((64, 64, 1), dtype)
    factor, param = fn.Gather(ids, ones, 3), jnp.ones((3, 1), dtype)
    total, touched, each, squares = jax.jit(
        lambda *args: [how(*args) for how in (fn.total, fn.rows, fn.per_example, fn.squared_norm)]
    )(factor, param)
    for answer in (total, touched.rows, each.sum(0)):
        assert answer.dtype == dtype
        assert answer[0, 0] == 4096
    np.testing.assert_array_equal(squares, np.full(64, 4096.0))


def test_squared_norm_counts_the_products_of_equal_ids_and_forms_no_table():
    wanted = [np.square(summed(i, d)).sum() for i, d in zip(IDS, DY, strict=True)]
    np.testing.assert_allclose(contracted(fn.squared_norm, table=np.zeros((1000, 5))), wanted, rtol=1e-5)
    program = jax.make_jaxpr(lambda ids, dy, table: fn.squared_norm(fn.Gather(ids, dy, 1000), table))(
        jnp.asarray(IDS), jnp.asarray(DY), jnp.zeros((1000, 5))
    )
    assert not any(1000 in v.aval.shape for eqn in program.jaxpr.eqns for v in eqn.outvars)


def test_rows_are_the_touched_rows_each_once():
    touched = contracted(fn.rows)
    np.testing.assert_array_equal(touched.ids, [0, 1, 2, 3, 5, 6, *[7] * 6])
    np.testing.assert_allclose(touched.rows[:6], summed(IDS, DY)[[0, 1, 2, 3, 5, 6]], rtol=1e-5, atol=1e-6)
    assert not touched.rows[6:].any()
    assert touched.rows.dtype == jnp.float32
    again = jnp.zeros((7, 5)).at[touched.ids].add(touched.rows)
    np.testing.assert_allclose(again, contracted(fn.total), rtol=1e-6, atol=1e-7)


def test_rows_under_jit_and_repeat_and_beside_other_factors():
    ids, dy = np.stack([IDS, IDS[::-1]]), np.stack([DY, 2 * DY])
    factor = fn.Stacked(fn.Gather(jnp.asarray(ids), jnp.asarray(dy, jnp.float32), 7))
    touched = jax.jit(fn.rows)(factor, jnp.zeros((2, 7, 5)))
    assert (touched.ids.shape, touched.rows.shape) == ((2, 12), (2, 12, 5))
    for i in range(2):
        table = jnp.zeros((7, 5)).at[touched.ids[i]].add(touched.rows[i])
        np.testing.assert_allclose(table, summed(ids[i], dy[i]), rtol=1e-5, atol=1e-5)
    x = jnp.asarray(DY, jnp.float32)
    np.testing.assert_array_equal(fn.rows(fn.Shift(x), x[0, 0]), fn.total(fn.Shift(x), x[0, 0]))


def test_rows_through_a_model_form_no_gradient_of_the_tables_size():
    model = fn.serial(fn.embedding(1000, 4), fn.flatten(), fn.dense(3))
    objective, batch = fn.objective(model, fn.cross_entropy()), (jnp.asarray(IDS), jnp.array([0, 1, 2, 0]))
    params, state = objective.init(KEY, batch)
    run = fn.value_and_grad(objective)
    grads = run(params, state, batch, None, contract=fn.rows)[1]["model"]
    wanted = run(params, state, batch, None)[1]["model"]
    touched = grads["embedding"]["embedding"]
    assert isinstance(touched, fn.Rows)
    table = jnp.zeros((1000, 4)).at[touched.ids].add(touched.rows)
    np.testing.assert_allclose(table, wanted["embedding"]["embedding"], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(grads["dense"]["kernel"], wanted["dense"]["kernel"], rtol=1e-6)


@pytest.mark.parametrize("bad", [7, -1, 1000])
def test_an_id_out_of_range_is_refused_where_it_can_be_read(bad):
    ids = IDS.copy()
    ids[1, 2] = bad
    layer, params = fn.embedding(7, 5), {"embedding": jnp.ones((7, 5))}
    for call in (layer.apply, lambda *args: layer.fwd(*args, None), lambda p, s, x: layer.init(KEY, x)):
        with pytest.raises(fn.InputError, match=rf"from 0 to 6(.|\n)*id {bad} at index \(1, 2\)\n"):
            call(params, (), ids)


def test_under_jit_an_id_out_of_range_gives_nan_and_no_gradient():
    ids = jnp.array([[3, -1, 7], [0, 99, 3]])
    params, dy = {"embedding": jnp.ones((7, 5))}, jnp.full((2, 3, 5), jnp.nan).at[:, ::2].set(1.0)
    dy = dy.at[0, 2].set(jnp.nan)

    run = {
        how.name: jax.jit(lambda ids, how=how: pulled(params, ids, dy, how))(ids)
        for how in (fn.total, fn.per_example, fn.squared_norm, fn.rows)
    }
    np.testing.assert_array_equal(np.isnan(run["total"][0]).all(-1), [[False, True, True], [False, True, False]])
    assert not np.isnan(run["total"][0])[[0, 1, 1], [0, 0, 2]].any()
    np.testing.assert_array_equal(run["total"][1][:, 0], [1, 0, 0, 2, 0, 0, 0])
    np.testing.assert_array_equal(run["per_example"][1][..., 0], [[0, 0, 0, 1, 0, 0, 0], [1, 0, 0, 1, 0, 0, 0]])
    np.testing.assert_array_equal(run["squared_norm"][1], [5, 10])
    np.testing.assert_array_equal(run["rows"][1].ids, [0, 3, 7, 7, 7, 7])
    np.testing.assert_array_equal(run["rows"][1].rows[:, 0], [1, 2, 0, 0, 0, 0])


def pulled(params, ids, dy, how):
    y, _, saved = fn.embedding(7, 5).fwd(params, (), ids, None)
    return y, fn.embedding(7, 5).bwd(params, saved, dy, how)[0]["embedding"]


@pytest.mark.parametrize(
    ("params", "x", "message"),
    [
        ({"embedding": jnp.ones((7, 5))}, jnp.ones((2, 3)), "integer ids"),
        ({"embedding": jnp.ones((7, 5))}, [1, 2], "integer ids"),
        ({"embedding": jnp.ones((7, 4))}, IDS, r"embedding: float32\[7, 5\]"),
        ({"embedding": jnp.ones((7, 5), jnp.int32)}, IDS, r"embedding: float32\[7, 5\]"),
        ({"kernel": jnp.ones((7, 5))}, IDS, r"embedding: float32\[7, 5\]"),
        (None, IDS, r"embedding: float32\[7, 5\]"),
    ],
)
def test_params_and_ids_that_do_not_fit_are_refused(params, x, message):
    with pytest.raises(fn.InputError, match=message):
        fn.embedding(7, 5).apply(params, (), x)


@pytest.mark.parametrize("dy", [DY[..., :4], DY[:2], DY.astype(np.float16), None])
def test_a_cotangent_that_does_not_fit_is_refused(dy):
    with pytest.raises(fn.InputError, match=r"float32\[4, 3, 5\]"):
        fn.embedding(7, 5).bwd({"embedding": jnp.ones((7, 5))}, jnp.asarray(IDS), dy)


@pytest.mark.parametrize("sizes", [(0, 5), (7, 0), (7.0, 5)])
def test_sizes_that_are_no_counts_are_refused(sizes):
    with pytest.raises(fn.InputError, match="positive whole number"):
        fn.embedding(*sizes)


@pytest.mark.parametrize("pad", [0, 3, 6, np.int64(3)])
@pytest.mark.parametrize("kind", ["int8", "uint8", "int32", "uint32"])
def test_a_padding_row_is_pytorchs(pad, kind, x64):
    """Looked up as it is, without a gradient; zeros at first."""
    torch = pytest.importorskip("torch")
    theirs = torch.nn.Embedding(7, 5, padding_idx=int(pad), dtype=torch.float64)
    layer, ids = fn.embedding(7, 5, dtype=float, padding_id=pad), IDS.astype(kind)
    first = layer.init(KEY, ids)[0]["embedding"]
    np.testing.assert_array_equal(np.flatnonzero(~first.any(1)), np.flatnonzero(~theirs.weight.detach().any(1)))
    theirs.weight.data = torch.tensor(TABLE)
    out = theirs(torch.tensor(IDS))
    out.backward(torch.tensor(DY))
    params = {"embedding": jnp.asarray(TABLE)}
    y, _, saved = jax.jit(layer.fwd)(params, (), ids, None)
    np.testing.assert_array_equal(y, out.detach().numpy())
    np.testing.assert_array_equal(layer.apply(params, (), ids), y)
    wanted = theirs.weight.grad.numpy()
    np.testing.assert_allclose(layer.bwd(params, saved, DY)[0]["embedding"], wanted, rtol=1e-12)
    plain = jax.grad(lambda params: jnp.sum(layer.apply(params, (), ids) * DY))(params)
    np.testing.assert_allclose(plain["embedding"], wanted, rtol=1e-12)


def test_no_contraction_gives_a_padding_row_anything():
    layer, params, dy = fn.embedding(7, 5, padding_id=3), {"embedding": jnp.ones((7, 5))}, jnp.asarray(DY, jnp.float32)
    saved = layer.fwd(params, (), IDS, None)[2]
    by = lambda contract: layer.bwd(params, saved, dy, contract)[0]["embedding"]
    each = np.stack([summed(ids, d) for ids, d in zip(IDS, DY, strict=True)])
    each[:, 3] = 0
    np.testing.assert_allclose(by(fn.total), each.sum(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(by(fn.per_example), each, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(by(fn.squared_norm), np.square(each).sum((1, 2)), rtol=1e-5)
    np.testing.assert_allclose(fn.total(by(fn.keep), params["embedding"]), by(fn.total))
    touched = by(fn.rows)
    assert 3 not in touched.ids
    np.testing.assert_allclose(jnp.zeros((7, 5)).at[touched.ids].add(touched.rows), by(fn.total), rtol=1e-6)


def test_a_padding_row_that_is_a_heads_too_has_the_heads_gradient(x64):
    """As in PyTorch, where `padding_idx` is the lookup's own."""
    torch = pytest.importorskip("torch")
    model = fn.serial(fn.embedding(7, 5, dtype=float, padding_id=3), head=fn.dense(7, use_bias=False))
    model = fn.tied(model, {"head/kernel": "embedding/embedding.T"})
    params = {"embedding": {"embedding": jnp.asarray(TABLE)}, "head": {}}
    y, _, residuals = model.fwd(params, model.init(KEY, IDS)[1], IDS, None)
    table = torch.tensor(TABLE, requires_grad=True)
    out = torch.nn.functional.embedding(torch.tensor(IDS), table, padding_idx=3) @ table.T
    out.backward(torch.cos(out.detach()))
    np.testing.assert_allclose(y, out.detach().numpy(), rtol=1e-12, atol=1e-12)
    for contract in (fn.total, fn.per_example):
        answer = model.bwd(params, residuals, jnp.cos(y), contract)[0]["embedding"]["embedding"]
        answer = answer if contract is fn.total else answer.sum(0)
        np.testing.assert_allclose(answer, table.grad.numpy(), rtol=1e-10, atol=1e-12)
    each = model.bwd(params, residuals, jnp.cos(y), fn.per_example)[0]["embedding"]["embedding"]
    squares = model.bwd(params, residuals, jnp.cos(y), fn.squared_norm)[0]["embedding"]["embedding"]
    np.testing.assert_allclose(squares, np.square(each).sum((1, 2)), rtol=1e-10)


@pytest.mark.parametrize("bad", [-1, 7, 2.0, True, "3"])
def test_a_padding_id_that_is_no_id_is_refused(bad):
    with pytest.raises(fn.InputError, match="a padding_id from 0 to 6"):
        fn.embedding(7, 5, padding_id=bad)


# Positions
