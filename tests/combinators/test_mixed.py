"""`mixed` computes in another dtype: what is rounded, and what is not."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import funcnet as fn
from funcnet._internal.casting import cast
from funcnet.layer import no_params
from tests.trees import assert_same, draw, dtypes, normal

S = jax.ShapeDtypeStruct
KEY = jax.random.key(0)
BLOCK = fn.serial(fn.dense(5), fn.gelu(), fn.dropout(0.2))


@pytest.mark.parametrize(
    ("compute", "wrap"),
    [
        ("bfloat16", fn.mixed),
        ("float16", fn.mixed),
        ("bfloat16", lambda layer, **to: fn.mixed(fn.repeat(fn.skip(layer), 2), **to)),
        ("float16", lambda layer, **to: fn.repeat(fn.skip(fn.mixed(layer, **to)), 2)),
        ("bfloat16", lambda layer, **to: fn.remat(fn.mixed(layer, **to))),
        ("bfloat16", lambda layer, **to: fn.mixed(fn.remat(layer), **to)),
        ("bfloat16", lambda layer, **to: fn.serial(first=fn.dense(5), then=fn.mixed(layer, **to))),
    ],
    ids=["alone", "float16", "of repeat", "in repeat", "in remat", "of remat", "in serial"],
)
def test_params_and_gradients_are_float32_and_near_those_of_float32(compute, wrap):
    model, exact = wrap(BLOCK, compute=compute), wrap(BLOCK, compute="float32")
    params, state, x = draw(exact, S((4, 5), jnp.float32))
    assert dtypes(jax.eval_shape(model.init, KEY, x)[0]) == {"float32"}

    @jax.jit
    def both(params, x):
        run = lambda model: (y := model.fwd(params, state, x, KEY))[:1] + model.bwd(params, y[2], jnp.cos(x))
        return run(model), run(exact)

    got, wanted = both(params, x)
    assert dtypes(got) == {"float32"}
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(g, w, rtol=0, atol=0.05 * np.abs(w).max())


@pytest.mark.parametrize("shape", [(4, 5), (2, 3, 5)])
def test_mixed_initialises_from_shapes_alone(shape):
    model = fn.mixed(BLOCK)
    by_shape, by_value = (model.init(KEY, x)[0] for x in (S(shape, jnp.float32), jnp.ones(shape)))
    assert_same(by_shape, by_value)


def test_mixed_residuals_are_in_the_compute_dtype():
    model = fn.mixed(fn.serial(fn.dense(7), fn.gelu(), fn.dense(5)))
    params, state, x = draw(model, S((4, 5), jnp.float32))
    y, _, residuals = model.fwd(params, state, x, None)
    assert y.dtype == jnp.float32
    assert dtypes(residuals) == {"bfloat16"}


def test_mixed_computes_what_casting_by_hand_does():
    params, state, x = draw(fn.dense(7), S((4, 5), jnp.float32))
    half = cast((params, x), jnp.bfloat16)
    wanted = (half[1] @ half[0]["kernel"] + half[0]["bias"][None]).astype(jnp.float32)
    np.testing.assert_array_equal(fn.mixed(fn.dense(7)).apply(params, state, x), wanted)
    assert np.abs(wanted - fn.dense(7).apply(params, state, x)).max() > 1e-4


def test_mixed_gradients_are_not_rounded_to_the_compute_dtype():
    """They are the float32 contraction of bfloat16 factors, and most of their digits do not fit bfloat16."""
    model = fn.mixed(fn.dense(7))
    params, state, x = draw(model, S((64, 5), jnp.float32))
    dy = normal(3, S((64, 7), jnp.float32))
    got = model.bwd(params, model.fwd(params, state, x, None)[2], dy)[0]
    x, dy = (np.asarray(a.astype(jnp.bfloat16), np.float64) for a in (x, dy))
    np.testing.assert_allclose(got["kernel"], x.T @ dy, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(got["bias"], dy.sum(0), rtol=1e-5, atol=1e-5)
    assert not np.any(got["kernel"] == got["kernel"].astype(jnp.bfloat16).astype(jnp.float32))


def test_mixed_sums_a_bias_gradient_in_float32():
    model = fn.mixed(fn.dense(1))
    params, state = model.init(KEY, jnp.ones((4099, 1)))
    dparams, _ = model.bwd(params, model.fwd(params, state, jnp.ones((4099, 1)), None)[2], jnp.ones((4099, 1)))
    assert (dparams["bias"].item(), dparams["kernel"].item()) == (4099, 4099)


def test_factors_kept_by_mixed_contract_later_as_at_once():
    model = fn.mixed(fn.repeat(fn.dense(5), 2))
    params, state, x = draw(model, S((4, 5), jnp.float32))
    hows = fn.total, fn.per_example, fn.squared_norm

    @jax.jit
    def run(params, x):
        residuals = model.fwd(params, state, x, None)[2]
        pull = lambda how: model.bwd(params, residuals, x, how)[0]
        kept = pull(fn.keep)
        return kept, [jax.tree.map(how, kept, params, is_leaf=fn.is_factor) for how in hows], list(map(pull, hows))

    kept, later, once = run(params, x)
    assert dtypes(kept) == {"bfloat16"}
    assert dtypes(later) == dtypes(once) == {"float32"}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), later, once)


@pytest.mark.parametrize(
    ("param", "output"), [("bfloat16", "bfloat16"), ("float32", "bfloat16"), ("bfloat16", "float32")]
)
def test_each_dtype_of_mixed_can_be_chosen(param, output):
    model = fn.mixed(BLOCK, param=param, output=output)

    def run(x):
        params, state = model.init(KEY, x)
        y, _, residuals = model.fwd(params, state, x, KEY)
        return (params, model.bwd(params, residuals, y)[0]), (y, model.bwd(params, residuals, y)[1])

    of_params, of_arrays = jax.eval_shape(run, S((4, 5), output))
    assert (dtypes(of_params), dtypes(of_arrays)) == ({param}, {output})


def test_mixed_is_transparent_and_leaves_integers_alone():
    assert (fn.mixed(BLOCK).name, fn.mixed(BLOCK).parts) == (BLOCK.name, BLOCK.parts)
    ids = jnp.arange(6).reshape(2, 3, 1)
    y, _, residuals = fn.mixed(fn.flatten()).fwd({}, (), ids, None)
    np.testing.assert_array_equal(y, ids.reshape(2, 3))
    assert y.dtype == ids.dtype
    assert fn.mixed(fn.flatten()).bwd({}, residuals, None) == ({}, None)


@pytest.mark.parametrize(
    "loss", [fn.cross_entropy(), fn.binary_cross_entropy(), fn.mse(), fn.cosine()], ids=lambda loss: loss.name
)
@pytest.mark.parametrize("wrap", [fn.mixed, lambda loss: fn.remat(fn.mixed(loss))], ids=["mixed", "in remat"])
def test_mixed_around_a_loss_gives_float32_values_and_gradients_of_half_precision_predictions(wrap, loss):
    """The values are float32 already, and so must their cotangent be: rounded to bfloat16, 1/3 is off by 1e-3."""
    z, t = normal(0, S((6, 5), jnp.float32)), jax.nn.softmax(normal(1, S((6, 5), jnp.float32)))
    dy = jnp.arange(1, 7) / 3

    def pull(loss, x):
        values, _, residuals = loss.fwd({}, (), x, None)
        return values, loss.bwd({}, residuals, dy)[1]

    got = pull(wrap(loss), (z, t))  # compiled, XLA may leave the rounding to bfloat16 out
    wanted = pull(loss, cast((z, t), jnp.bfloat16))
    assert dtypes(got) == {"float32"}
    np.testing.assert_allclose(got[0], wanted[0], rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b.astype(jnp.float32), rtol=8e-3), got[1], wanted[1])
    np.testing.assert_allclose(wrap(loss).apply({}, (), (z, t)), got[0], rtol=1e-6)


def test_mixed_passes_a_losses_cotangent_on_unrounded():
    def fwd(params, x):
        return jnp.sum(x[0].astype(jnp.float32), 1), x

    loss = fn.stateless("sum", no_params, fwd, lambda params, x, dy, contract: ({}, (dy, None)))
    saved = fn.mixed(loss).fwd({}, (), (jnp.ones((3, 2)), jnp.arange(3)), None)[2]
    third = jnp.full(3, 1 / 3)
    np.testing.assert_array_equal(fn.mixed(loss).bwd({}, saved, third)[1][0], third)


def test_a_cotangent_of_another_structure_is_refused_by_the_layer_inside_mixed():
    layer = fn.mixed(fn.parallel(fn.dense(3), fn.flatten()))
    x = jnp.ones((2, 5)), jnp.arange(4).reshape(2, 2)
    params, state = layer.init(KEY, x)
    saved = layer.fwd(params, state, x, None)[2]
    assert layer.bwd(params, saved, (jnp.ones((2, 3)), None))[1][0].dtype == jnp.float32
    with pytest.raises(fn.InputError, match="a tuple of 2 cotangents"):
        layer.bwd(params, saved, jnp.ones((2, 3)))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_mixed_refuses_an_input_of_another_dtype(dtype):
    model = fn.mixed(fn.dense(3))
    params, state = model.init(KEY, jnp.ones((2, 5)))
    for call in (
        model.init,
        lambda _, x: model.apply(params, state, x),
        lambda key, x: model.fwd(params, state, x, key),
    ):
        with pytest.raises(fn.InputError, match="an input of dtype float32"):
            call(KEY, jnp.ones((2, 5), dtype))


def test_cast_changes_floating_arrays_only():
    tree = {"x": jnp.ones(2), "ids": jnp.arange(2), "mask": jnp.ones(2, bool), "key": KEY, "none": None}
    out = cast(tree, jnp.bfloat16)
    assert out["x"].dtype == jnp.bfloat16
    assert all(out[name] is tree[name] for name in ("ids", "mask", "key", "none"))


def test_a_cotangent_of_another_dtype_is_refused():
    layer = fn.mixed(fn.dense(3))
    params, state = layer.init(jax.random.key(0), jnp.ones((2, 4)))
    y, _, residuals = layer.fwd(params, state, jnp.ones((2, 4)), None)
    with pytest.raises(fn.InputError, match="a cotangent of dtype float32"):
        layer.bwd(params, residuals, y.astype(jnp.float16))


def relative(got, wanted):
    got, wanted = np.asarray(got, np.float64), np.asarray(wanted, np.float64)
    return np.linalg.norm(got - wanted) / np.linalg.norm(wanted)


LONG = (2, 64, 4)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda layer, **to: fn.mixed(layer, **to),
        lambda layer, **to: fn.mixed(fn.serial(fn.serial(layer)), **to),
        lambda layer, **to: fn.mixed(fn.repeat(fn.skip(layer), 1), **to),
        lambda layer, **to: fn.mixed(fn.remat(fn.named("recurrence", layer)), **to),
        lambda layer, **to: fn.mixed(fn.weight_norm(fn.serial(layer), ("kernel_real",)), **to),
    ],
    ids=["alone", "in serial", "in repeat", "in remat", "in weight_norm"],
)
@pytest.mark.parametrize("compute", ["bfloat16", "float16"])
def test_the_logarithms_of_an_lru_are_not_rounded_by_mixed(wrap, compute, x64):
    """Rounded, they turn the states by another angle at every step: y was off by 9% to 63%. Many draws at once."""
    lru = fn.lru(4, 8, r_min=0.9, r_max=0.999)
    layer, exact = wrap(lru, compute=compute), wrap(lru, param="float64", compute="float64", output="float64")
    x, dy = normal(1, S(LONG, jnp.float32)), normal(2, S(LONG, jnp.float32))

    def run(layer, params, x, dy):
        y, _, residuals = layer.fwd(params, state, x, None)
        return y, *layer.bwd(params, residuals, dy)

    @jax.jit
    @jax.vmap
    def both(params):
        high = cast((params, x, dy), jnp.float64)
        return run(layer, params, x, dy), run(exact, *high)

    params, state = jax.jit(jax.vmap(lambda key: layer.init(key, x)))(jax.random.split(KEY, 12))
    assert dtypes(params) == {"float32"}
    got, wanted = both(params)
    assert dtypes(got) == {"float32"}
    for path, leaf in jax.tree_util.tree_leaves_with_path(wanted):
        mine = dict(jax.tree_util.tree_leaves_with_path(got))[path]
        for a, b in zip(mine, leaf, strict=True):
            assert relative(a, b) < (0.02 if path else 0.01), jax.tree_util.keystr(path)


def test_the_logarithms_of_a_frozen_lru_are_not_rounded_either():
    seen = []

    def note(params, x):
        seen.append({name: str(leaf.dtype) for name, leaf in params.items()})
        return x

    lru = fn.stateless(
        "lru", no_params, lambda params, x: (note(params, x), x), lambda params, x, dy, contract: (params, dy)
    )
    lru = replace(lru, init=fn.lru(4, 8).init, unrounded=("nu", "theta"))
    layer = fn.mixed(
        fn.serial(fn.freeze(lru), fn.spectral_norm(fn.serial(fn.dense(4), fn.freeze(lru))), fn.freeze(fn.serial(lru)))
    )
    params, state = layer.init(KEY, S((2, 3, 4), jnp.float32))
    seen.clear()
    layer.apply(params, state, jnp.ones((2, 3, 4)))
    half = dict.fromkeys(["kernel_real", "kernel_imag", "out_real", "out_imag"], "bfloat16")
    assert seen == [half | {"nu": "float32", "theta": "float32"}] * 3


def test_an_lru_of_half_precision_has_its_logarithms_in_float32():
    params, _ = fn.lru(4, 8).init(KEY, S(LONG, jnp.bfloat16))
    assert {name: str(leaf.dtype) for name, leaf in params.items() if leaf.dtype != jnp.bfloat16} == {
        "nu": "float32",
        "theta": "float32",
    }


# Layers that are kept

KEEPING = fn.serial(
    fn.dense(4), fn.repeat(fn.serial(fn.layer_norm(), fn.dense(4)), 2), fn.dropout(0.2), head=fn.dense(3)
)


def test_layers_that_are_kept_compute_in_the_dtype_of_params():
    model = fn.mixed(KEEPING, keep=("repeat/layer_norm", "head"))
    params, state, x = draw(KEEPING, S((5, 4), jnp.float32))
    assert list(model.parts) == list(KEEPING.parts)
    assert_same(model.init(KEY, x), fn.mixed(KEEPING).init(KEY, x))

    def by_hand(params, x):
        low = lambda tree: cast(tree, jnp.bfloat16)
        x = fn.dense(4).apply(low(params["dense"]), (), low(x))
        for i in range(2):
            own = jax.tree.map(lambda leaf, i=i: leaf[i], params["repeat"])
            x = low(fn.layer_norm().apply(own["layer_norm"], (), cast(x, jnp.float32)))
            x = fn.dense(4).apply(low(own["dense"]), (), x)
        head = fn.dense(3).apply(params["head"], (), cast(x, jnp.float32))
        return cast(low(head), jnp.float32)

    np.testing.assert_allclose(model.apply(params, state, x), by_hand(params, x), rtol=1e-2, atol=1e-2)
    y, _, residuals = model.fwd(params, state, x, KEY)
    dparams, dx = model.bwd(params, residuals, y)
    assert dtypes((y, dparams, dx)) == {"float32"}
    assert residuals.residuals["head"].residuals.dtype == jnp.float32
    assert residuals.residuals["dense"].dtype == jnp.bfloat16
    exact = KEEPING.bwd(params, KEEPING.fwd(params, state, x, KEY)[2], y)[0]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=0.06 * np.abs(b).max()), dparams, exact)


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (("hed",), "'hed', where serial has the parts"),
        (("head/kernel",), "'head/kernel', where dense has the parts"),
        (("repeat/norm",), "where repeat has the parts"),
        (("",), "''"),
        ("head", "a tuple of paths"),
        ((1,), "a tuple of paths"),
        (None, "a tuple of paths"),
        (("head", "head"), "none inside another"),
        (("repeat/layer_norm", "head", "repeat"), "none inside another"),
    ],
)
def test_a_path_that_leads_to_no_layer_is_refused(keep, message):
    with pytest.raises(fn.InputError, match=message):
        fn.mixed(KEEPING, keep=keep)
