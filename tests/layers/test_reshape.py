"""reshape and flatten: the rules, NumPy's order of entries, integers, and what does not fit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import funcnet as fn

S = jax.ShapeDtypeStruct
# (layer, input shape, output shape)
CASES = [
    (fn.flatten(), (4, 3), (4, 3)),
    (fn.flatten(), (4, 2, 3), (4, 6)),
    (fn.flatten(), (1, 2, 1, 3), (1, 6)),
    (fn.flatten(), (5,), (5, 1)),
    (fn.reshape(6), (4, 2, 3), (4, 6)),
    (fn.reshape(3, 2), (4, 6), (4, 3, 2)),
    (fn.reshape(3, -1), (4, 2, 3, 2), (4, 3, 4)),
    (fn.reshape(-1), (4, 2, 3), (4, 6)),
    (fn.reshape(1, 1), (7,), (7, 1, 1)),
    (fn.reshape(), (7, 1), (7,)),
]
ALL = pytest.mark.parametrize(("layer", "shape", "wanted"), CASES)


@ALL
def test_entries_keep_numpys_order_there_and_back(layer, shape, wanted):
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    y, state, residuals = layer.fwd({}, (), x, None)
    assert (y.shape, state) == (wanted, ())
    np.testing.assert_array_equal(y, x.reshape(wanted))
    dparams, dx = layer.bwd({}, residuals, y)
    assert dparams == {}
    np.testing.assert_array_equal(dx, x)


@ALL
def test_nothing_is_kept(layer, shape, wanted):
    residuals = layer.fwd({}, (), jnp.ones(shape), None)[2]
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(residuals)) == 0


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.int32, jnp.uint8, bool])
def test_every_dtype_passes_and_integers_have_no_cotangent(dtype):
    x = jnp.ones((2, 3, 4)).astype(dtype)
    y, _, residuals = fn.flatten().fwd(*fn.flatten().init(None, x), x, None)
    assert y.dtype == dtype
    dx = fn.flatten().bwd({}, residuals, y)[1]
    assert dx is None if not jnp.issubdtype(dtype, jnp.floating) else dx.dtype == dtype


def test_integer_inputs_hold_to_the_laws_too():
    fn.check_layer(fn.flatten(), np.arange(12).reshape(2, 3, 2)).raise_for_failure()


def test_in_a_model_the_batch_size_stays_open():
    model = fn.serial(fn.flatten(), fn.dense(2), fn.reshape(2, 1))
    params, state = model.init(jax.random.key(0), S((1, 3, 4), jnp.float32))
    assert model.apply(params, state, jnp.ones((5, 3, 4))).shape == (5, 2, 1)


@pytest.mark.parametrize("shape", [(-1, -1), (0,), (-2,), (3, 0, -1)])
def test_shapes_that_cannot_be_are_refused(shape):
    with pytest.raises(fn.InputError, match="positive sizes"):
        fn.reshape(*shape)


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (fn.reshape(5), jnp.ones((4, 6))),
        (fn.reshape(4, -1), jnp.ones((4, 6))),
        (fn.reshape(24), jnp.ones((4, 6))),
        (fn.flatten(), jnp.ones(())),
        (fn.flatten(), jnp.ones((0, 6))),
        (fn.reshape(), jnp.ones((4, 6))),
    ],
)
def test_inputs_that_do_not_fill_the_shape_are_refused(layer, x):
    with pytest.raises(fn.InputError, match="fill the shape"):
        layer.apply({}, (), x)


@pytest.mark.parametrize("dy", [jnp.ones((4, 3, 2)), jnp.ones((3, 6)), jnp.ones((4, 6), jnp.bfloat16)])
def test_a_cotangent_that_does_not_fit_is_refused(dy):
    residuals = fn.flatten().fwd({}, (), jnp.ones((4, 2, 3)), None)[2]
    with pytest.raises(fn.InputError, match=r"float32\[4, 6\]"):
        fn.flatten().bwd({}, residuals, dy)
