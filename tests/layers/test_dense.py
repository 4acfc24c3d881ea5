"""dense: the rule, the forward pass against NumPy, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import funcnet as fn

S = jax.ShapeDtypeStruct
KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
# (features, input shape)
CASES = [(3, (5,)), (3, (4, 5)), (7, (4, 5)), (4, (3, 2, 5)), (2, (2, 3, 2, 5)), (1, (1, 1)), (1, (7, 1)), (5, (1, 3))]


@pytest.mark.parametrize(("features", "shape"), CASES)
def test_the_output_is_the_affine_map_of_the_last_axis(features, shape, x64):
    x, kernel, bias = (RNG.normal(size=s) for s in (shape, (shape[-1], features), (features,)))
    wanted = np.einsum("...i,ij->...j", x, kernel)
    y = fn.dense(features, use_bias=False).apply({"kernel": kernel}, (), x)
    np.testing.assert_allclose(y, wanted, rtol=1e-12, atol=1e-14)
    y, state, residuals = fn.dense(features).fwd({"kernel": kernel, "bias": bias}, (), x, None)
    np.testing.assert_allclose(y, wanted + bias, rtol=1e-12, atol=1e-14)
    assert state == ()
    np.testing.assert_array_equal(residuals, x)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("like", [lambda shape, dtype: jnp.ones(shape, dtype), S])
def test_init_reads_size_and_dtype_off_the_input(like, dtype):
    params, state = fn.dense(3).init(KEY, like((4, 2, 5), dtype))
    assert {name: (leaf.shape, leaf.dtype) for name, leaf in params.items()} == {
        "kernel": ((5, 3), jnp.dtype(dtype)),
        "bias": ((3,), jnp.dtype(dtype)),
    }
    assert state == ()
    assert set(fn.dense(3, use_bias=False).init(KEY, like((4, 5), dtype))[0]) == {"kernel"}


def test_numpys_float64_is_jaxs_float32():
    params, state = fn.dense(3).init(KEY, np.ones((2, 5)))
    assert {leaf.dtype for leaf in params.values()} == {fn.dense(3).apply(params, state, np.ones((2, 5))).dtype}


def test_the_initial_kernel_keeps_the_variance_and_the_bias_is_zero():
    params, _ = fn.dense(400).init(KEY, S((1, 100), jnp.float32))
    np.testing.assert_allclose(params["kernel"].std(), 0.1, rtol=0.02)
    np.testing.assert_allclose(params["kernel"].mean(), 0, atol=0.002)
    assert not params["bias"].any()


def test_initialisers_can_be_chosen_and_keys_draw_apart():
    layer = fn.dense(3, kernel_init=jax.nn.initializers.ones, bias_init=jax.nn.initializers.constant(2.0))
    params, _ = layer.init(KEY, S((1, 5), jnp.float32))
    np.testing.assert_array_equal(layer.apply(params, (), jnp.ones((2, 5))), np.full((2, 3), 7))
    one, other = (fn.dense(3).init(jax.random.key(i), S((1, 5), jnp.float32))[0]["kernel"] for i in (0, 1))
    assert (one != other).all()


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_half_precision_gradients_are_summed_in_float32(dtype):
    """4096 ones: float16 counts to 2048 by ones, bfloat16 to 256."""
    ones = jnp.ones((64, 64, 1), dtype)
    params = {"kernel": jnp.ones((1, 1), dtype), "bias": jnp.ones(1, dtype)}
    y, _, residuals = fn.dense(1).fwd(params, (), ones, None)
    dparams, dx = fn.dense(1).bwd(params, residuals, ones)
    assert {leaf.dtype for leaf in jax.tree.leaves((y, dparams, dx))} == {jnp.dtype(dtype)}
    assert (dparams["kernel"].item(), dparams["bias"].item()) == (4096, 4096)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_half_precision_dx_sums_its_features_in_float32(dtype):
    params = {"kernel": jnp.ones((1, 4096), dtype), "bias": jnp.ones(4096, dtype)}
    _, dx = fn.dense(4096).bwd(params, jnp.ones((1, 1), dtype), jnp.ones((1, 4096), dtype))
    assert (dx.dtype, dx.item()) == (dtype, 4096)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_half_precision_is_near_float64(dtype):
    x, kernel, bias, dy = (jnp.asarray(RNG.normal(size=s), dtype) for s in ((16, 8), (8, 4), (4,), (16, 4)))
    wide = lambda a: np.asarray(a, np.float64)
    params = {"kernel": kernel, "bias": bias}
    y, _, residuals = fn.dense(4).fwd(params, (), x, None)
    dparams, dx = fn.dense(4).bwd(params, residuals, dy)
    eps = float(jnp.finfo(dtype).eps)
    for got, wanted in (
        (y, wide(x) @ wide(kernel) + wide(bias)),
        (dx, wide(dy) @ wide(kernel).T),
        (dparams["kernel"], wide(x).T @ wide(dy)),
        (dparams["bias"], wide(dy).sum(0)),
    ):
        np.testing.assert_allclose(wide(got), wanted, rtol=0, atol=2 * eps * np.abs(wanted).max())


def test_nan_spoils_its_own_row_alone():
    params = {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}
    y = fn.dense(2).apply(params, (), jnp.ones((4, 3)).at[1, 2].set(jnp.nan))
    np.testing.assert_array_equal(np.isnan(y).all(1), [False, True, False, False])
    np.testing.assert_array_equal(np.isnan(y).any(1), [False, True, False, False])


@pytest.mark.parametrize("features", [0, -1, 3.0])
def test_no_features_are_refused(features):
    with pytest.raises(fn.InputError, match="features as a positive whole number"):
        fn.dense(features)


KERNEL, BIAS = jnp.ones((5, 3)), jnp.ones(3)


@pytest.mark.parametrize(
    ("params", "x", "message"),
    [
        ({"kernel": KERNEL, "bias": BIAS}, jnp.ones((2, 4)), "5 features"),
        ({"kernel": KERNEL, "bias": BIAS}, jnp.ones((2, 5), jnp.int32), "floating"),
        ({"kernel": KERNEL, "bias": BIAS}, jnp.ones((0, 5)), "not empty"),
        ({"kernel": KERNEL, "bias": BIAS}, jnp.ones(()), "floating"),
        ({"kernel": KERNEL, "bias": BIAS}, jnp.ones((2, 5), jnp.float16), "kernel: float16"),
        ({"kernel": KERNEL}, jnp.ones((2, 5)), r"bias: float32\[3\]"),
        ({"kernel": KERNEL, "bias": BIAS[:2]}, jnp.ones((2, 5)), r"bias: float32\[3\]"),
        ({"kernel": KERNEL[:, :2], "bias": BIAS}, jnp.ones((2, 5)), r"kernel: float32\[5, 3\]"),
        ({"kernel": KERNEL, "bias": BIAS, "scale": BIAS}, jnp.ones((2, 5)), "kernel"),
        ({"scale": BIAS}, jnp.ones((2, 5)), "kernel"),
        (None, jnp.ones((2, 5)), "kernel"),
    ],
)
def test_params_and_inputs_that_do_not_fit_are_refused(params, x, message):
    for call in (fn.dense(3).apply, lambda params, state, x: fn.dense(3).fwd(params, state, x, None)):
        with pytest.raises(fn.InputError, match=message):
            call(params, (), x)


@pytest.mark.parametrize("dy", [jnp.ones((2, 2)), jnp.ones((3, 2)), jnp.ones((2, 3), jnp.float16), np.ones((2, 1, 3))])
def test_a_cotangent_that_does_not_fit_is_refused(dy):
    with pytest.raises(fn.InputError, match=r"float32\[2, 3\]"):
        fn.dense(3).bwd({"kernel": KERNEL, "bias": BIAS}, jnp.ones((2, 5)), dy)


def test_numpy_cotangents_are_taken():
    dparams, dx = fn.dense(3).bwd({"kernel": KERNEL, "bias": BIAS}, jnp.ones((2, 5)), np.ones((2, 3), np.float32))
    assert (dx == 3).all()
    assert (dparams["bias"] == 2).all()
