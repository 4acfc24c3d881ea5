"""`remat` runs its layer again in the backward pass, on the same input and key, and saves no more."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import funcnet as fn
from funcnet.layer import no_params
from tests.trees import assert_same, draw

S = jax.ShapeDtypeStruct
KEY = jax.random.key(0)
BLOCK = fn.serial(fn.dense(5), fn.gelu(), fn.dropout(0.2))


def test_remat_is_transparent_and_saves_its_input_alone():
    model = fn.remat(BLOCK)
    assert (model.name, model.parts) == (BLOCK.name, BLOCK.parts)
    params, state, x = draw(model, S((3, 5), jnp.float32))
    y, _, saved = model.fwd(params, state, x, KEY)
    assert_same(y, BLOCK.fwd(params, state, x, KEY)[0])
    arrays = [leaf for leaf in jax.tree.leaves(saved) if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)]
    assert [leaf.shape for leaf in arrays] == [(3, 5)]


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_remat_pulls_back_what_the_layer_does_and_spreads_no_bad_cotangent(jit):
    """One example's cotangent is infinite or NaN: the others' dx must not notice."""
    params, state, x = draw(BLOCK, S((4, 5), jnp.float32))

    def pull(layer):
        bwd = jax.jit(layer.bwd) if jit else layer.bwd
        residuals = layer.fwd(params, state, x, KEY)[2]
        return [bwd(params, residuals, x.at[1, 2].set(bad)) for bad in (0.5, jnp.inf, -jnp.inf, jnp.nan)]

    plain, again = pull(BLOCK), pull(fn.remat(BLOCK))
    if jit:  # compiled apart, the two may round differently
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), again, plain)
    else:
        assert_same(again, plain)
    assert all(np.isfinite(dx[np.array([0, 2, 3])]).all() for _, dx in again)


def probe():
    """y = x; its bwd answers with the input that it is run again on."""
    return fn.stateless("probe", no_params, lambda params, x: (x, x), lambda params, x, dy, contract: ({}, x))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16, jnp.bfloat16, jnp.int8, jnp.uint32, jnp.bool_])
def test_remat_runs_again_on_its_input_bit_for_bit_whatever_the_cotangent(dtype):
    special = [0.0, -0.0, 1.0, -1.5, jnp.inf, -jnp.inf, jnp.nan] if jnp.issubdtype(dtype, jnp.floating) else [0, 1, 100]
    x = jnp.array(special, dtype)
    layer = fn.remat(probe())
    saved = layer.fwd({}, (), x, None)[2]
    for dy in (0.0, -3.0, 3e38, jnp.inf, -jnp.inf, jnp.nan):
        for bwd in (layer.bwd, jax.jit(layer.bwd)):
            again = bwd({}, saved, jnp.full(x.shape, dy))[1]
            assert (again.dtype, np.asarray(again).tobytes()) == (dtype, np.asarray(x).tobytes())


def test_remat_of_an_integer_input_passes_its_missing_cotangent_on():
    layer = fn.remat(fn.flatten())
    saved = layer.fwd({}, (), jnp.arange(6).reshape(1, 2, 3), None)[2]
    assert layer.bwd({}, saved, None) == ({}, None)


def temp_bytes(wrap, width=128, batch=512, layers=8):
    """Temporary memory of a compiled forward and backward pass through gelu blocks."""
    block = wrap(fn.serial(fn.dense(2 * width), fn.gelu(), fn.dense(width)))
    model = fn.serial(**{f"block{i}": block for i in range(layers)})
    x = S((batch, width), jnp.float32)
    params, state = jax.eval_shape(model.init, KEY, x)

    def gradients(params, x):
        y, _, residuals = model.fwd(params, state, x, None)
        return model.bwd(params, residuals, y)

    return jax.jit(gradients).lower(params, x).compile().memory_analysis().temp_size_in_bytes


def test_remat_under_jit_takes_less_than_half_the_memory():
    assert temp_bytes(fn.remat) < temp_bytes(lambda layer: layer) / 2


def test_remat_contracts_like_the_layer():
    layer = fn.serial(fn.dense(5), fn.gelu())
    params, state, x = draw(layer, S((3, 2, 5), jnp.float32))

    def norms(layer):
        return layer.bwd(params, layer.fwd(params, state, x, None)[2], jnp.cos(x), fn.squared_norm)[0]

    assert_same(norms(fn.remat(layer)), norms(layer))
