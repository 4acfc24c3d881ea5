"""A layer's point: what of `init` is taken in which dtype."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import funcnet as fn
from funcnet.check.layer import _initial


def turning():
    """y = x Q of an orthogonal Q in the state, and |x|^2; the rule finds x again as y Q^T."""

    def init(key, x):
        return {}, {"q": jnp.linalg.qr(jax.random.normal(key, (x.shape[-1],) * 2, x.dtype))[0]}

    def fwd(params, state, x, key):
        y = x @ state["q"]
        return (y, jnp.sum(x**2, -1)), state, (state["q"], y)

    def bwd(params, residuals, dy, contract=fn.total):
        q, y = residuals
        return {}, dy[0] @ q.T + 2 * (y @ q.T) * dy[1][:, None]

    return fn.Layer("turning", init, lambda params, state, x: fwd(params, state, x, None)[0], fwd, bwd)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_a_state_is_what_init_gives_in_its_own_dtype(dtype):
    assert fn.check_layer(turning(), "f32[4,3]", dtype=dtype).ok


def test_integers_of_64_bits_are_not_cut():
    large = 2**40 + 3
    layer = fn.Layer("large", lambda key, x: ({"n": jnp.asarray(np.int64(large))}, ()), None, None, None)
    with jax.enable_x64(True):
        params, _ = _initial(layer, jax.random.key(0), np.ones((2, 3)))
    assert int(params["n"]) == large


def test_parameters_are_those_for_float32_where_the_layer_takes_it_and_they_fit():
    """One program for every dtype, if it can be had: each init here says for which dtypes it is compiled."""
    asked = []

    def made(value, taken=("float32", "float16")):
        def init(key, x):
            if str(x.dtype) not in taken:
                raise ValueError(f"no {x.dtype}")
            asked.append(str(x.dtype))
            return {"w": jnp.full(3, value(x.dtype), x.dtype)}, ()

        return fn.Layer("made", init, None, None, None)

    key, x = jax.random.key(0), np.ones((2, 3), np.float16)
    for layer, value, dtypes in (
        (made(lambda dtype: 0.25), 0.25, {"float16", "float32"}),  # float16 for the shapes
        (made(lambda dtype: jnp.finfo(dtype).max), 65504, {"float16", "float32"}),  # infinite if cast
        (made(lambda dtype: 0.25, ("float16",)), 0.25, {"float16"}),
    ):
        asked.clear()
        params, state = _initial(layer, key, x)
        assert (set(asked), str(params["w"].dtype), state) == (dtypes, "float16", ())
        np.testing.assert_array_equal(np.asarray(params["w"]), np.full(3, value, np.float16))
