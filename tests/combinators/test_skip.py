"""`skip`: its shortcut, and the inputs that it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import funcnet as fn
from tests.trees import draw

S = jax.ShapeDtypeStruct
KEY = jax.random.key(0)


def test_skip_refuses_integers():
    with pytest.raises(fn.InputError, match="floating"):
        fn.skip(fn.flatten()).apply({}, (), jnp.ones((2, 3), jnp.int32))


def test_skip_takes_numpys_float64_for_jaxs_float32():
    model = fn.skip(fn.serial(fn.layer_norm(), fn.dense(3)))
    params, state = model.init(KEY, np.ones((2, 3)))
    assert model.apply(params, state, np.ones((2, 3))).dtype == jnp.float32


def test_a_shortcut_is_added_in_the_place_of_the_input(x64):
    model = fn.skip(fn.serial(fn.dense(4), fn.tanh()), fn.dense(4, use_bias=False))
    params, state, x = draw(model, S((3, 5), jnp.float64))
    y, _, residuals = model.fwd(params, state, x, None)
    wanted = x @ params["shortcut"]["kernel"] + model.parts["main"].apply(params["main"], state["main"], x)
    np.testing.assert_allclose(y, wanted, rtol=1e-12)
    dparams, dx = model.bwd(params, residuals, y)
    assert set(dparams) == {"main", "shortcut"}
    grads = jax.grad(lambda params, x: jnp.vdot(model.apply(params, state, x), y), (0, 1))(params, x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10), (dparams, dx), grads)
    with pytest.raises(fn.InputError, match=r"(?s)output like the shortcut's output, float64\[3, 4\].*float64\[3, 5\]"):
        fn.skip(fn.dense(5), fn.dense(4)).init(KEY, x)
