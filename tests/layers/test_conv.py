"""conv: the forward pass and gradients against NumPy and PyTorch, every contraction, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import funcnet as fn

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
# input shape, features, and options
CASES = {
    "same": ((2, 5, 6, 3), 4, {"kernel_size": 3}),
    "same, even window": ((2, 5, 6, 3), 4, {"kernel_size": (2, 4), "strides": (3, 2)}),
    "valid, a remainder": ((2, 6, 8, 3), 4, {"kernel_size": 3, "strides": 2, "padding": "VALID"}),
    "pads": ((2, 5, 4, 2), 3, {"kernel_size": 2, "padding": ((0, 3), (4, 1))}),
    "dilation": ((2, 7, 8, 2), 3, {"kernel_size": (3, 2), "strides": (1, 2), "padding": 1, "dilation": (2, 3)}),
    "one entry": ((2, 5, 4, 3), 4, {"kernel_size": 1, "strides": 2}),
    "the whole input": ((2, 3, 4, 3), 4, {"kernel_size": (3, 4), "padding": "VALID"}),
    "kernel larger than the input": ((1, 2, 2, 4), 5, {"kernel_size": (3, 2), "padding": ((2, 0), (1, 3))}),
    "groups": ((2, 5, 4, 4), 6, {"kernel_size": 3, "strides": 2, "padding": 1, "groups": 2}),
    "depthwise": ((2, 5, 6, 3), 3, {"kernel_size": 3, "strides": (1, 2), "padding": 1, "groups": 3}),
    "depthwise, dilation": ((2, 7, 7, 3), 3, {"kernel_size": 3, "padding": "VALID", "dilation": 2, "groups": 3}),
    "depthwise, rows left over": ((2, 11, 4, 3), 3, {"kernel_size": (3, 2), "groups": 3}),
    "depthwise, strides, rows left over": ((2, 19, 3, 2), 2, {"kernel_size": 3, "strides": 2, "groups": 2}),
    "depthwise, two features each": ((2, 5, 6, 3), 6, {"kernel_size": 3, "groups": 3}),
    "one axis": ((2, 9, 3), 4, {"kernel_size": 3, "strides": 2, "padding": 1}),
    "three axes": ((2, 3, 4, 5, 2), 3, {"kernel_size": (2, 1, 3), "strides": (1, 2, 2), "padding": "VALID"}),
}
EACH = pytest.mark.parametrize("case", CASES)


def setting(case, dtype=np.float64):
    """Layer, params with a bias that is not 0, x."""
    shape, features, options = CASES[case]
    layer = fn.conv(features, **options)
    like = jax.eval_shape(layer.init, KEY, jax.ShapeDtypeStruct(shape, dtype))[0]
    draw = lambda shape: jnp.asarray(RNG.normal(size=shape).astype(dtype))
    return layer, {name: draw(leaf.shape) for name, leaf in like.items()}, draw(shape)


def pull(layer, params, x):
    """(y, dy, dparams, dx)."""
    y, state, residuals = jax.jit(lambda params, x: layer.fwd(params, (), x, None))(params, x)
    assert state == ()
    dy = jnp.asarray(np.random.default_rng(1).normal(size=y.shape).astype(y.dtype))
    return y, dy, *jax.jit(layer.bwd)(params, residuals, dy)


def full(case):
    """Strides, pads and dilation for each spatial axis."""
    shape, _, options = CASES[case]
    n = len(shape) - 2
    each = lambda value: value if isinstance(value, tuple) else (value,) * n
    window, strides, dilation = (each(options.get(k, 1)) for k in ("kernel_size", "strides", "dilation"))
    padding = options.get("padding", "SAME")
    if padding == "SAME":
        missing = [max(0, (-(-i // s) - 1) * s + k - i) for i, k, s in zip(shape[1:-1], window, strides, strict=True)]
        padding = tuple((m // 2, m - m // 2) for m in missing)
    elif not isinstance(padding, tuple):
        padding = ((0 if padding == "VALID" else padding,) * 2,) * n
    return strides, padding, dilation


def reference(case, x, dy, kernel, bias):
    """y, dx and dkernel, one window after the other."""
    (strides, pads, dilation), groups = full(case), CASES[case][2].get("groups", 1)
    padded = np.pad(x, [(0, 0), *pads, (0, 0)])
    dx, y, dkernel = np.zeros(padded.shape), np.empty(dy.shape), np.zeros(kernel.shape)
    channels, features = kernel.shape[-2], kernel.shape[-1] // groups
    for b, *position, g in np.ndindex(*dy.shape[:-1], groups):
        starts = zip(position, strides, dilation, kernel.shape, strict=False)
        seen = tuple(slice(j * s, j * s + d * (k - 1) + 1, d) for j, s, d, k in starts)
        seen = (b, *seen, slice(g * channels, (g + 1) * channels))
        out = slice(g * features, (g + 1) * features)
        at = (b, *position, out)
        y[at] = np.tensordot(padded[seen], kernel[..., out], axes=kernel.ndim - 1) + bias[out]
        dx[seen] += kernel[..., out] @ dy[at]
        dkernel[..., out] += np.multiply.outer(padded[seen], dy[at])
    inside = tuple(slice(low, low + n) for (low, _), n in zip(pads, x.shape[1:-1], strict=True))
    return y, dx[(slice(None), *inside)], dkernel


@EACH
def test_output_and_gradients_are_numpys(case, x64):
    layer, params, x = setting(case)
    y, dy, dparams, dx = pull(layer, params, x)
    wanted_y, wanted_dx, wanted_kernel = reference(case, *map(np.asarray, (x, dy, params["kernel"], params["bias"])))
    np.testing.assert_allclose(y, wanted_y, rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(dx, wanted_dx, rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(dparams["kernel"], wanted_kernel, rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(dparams["bias"], dy.sum(tuple(range(dy.ndim - 1))), rtol=1e-11, atol=1e-12)


@EACH
@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 1e-5), (np.float64, 1e-10)])
def test_output_and_gradients_are_pytorchs(case, dtype, tolerance, x64):
    torch = pytest.importorskip("torch")
    layer, params, x = setting(case, dtype)
    y, dy, dparams, dx = pull(layer, params, x)
    (strides, pads, dilation), groups = full(case), CASES[case][2].get("groups", 1)
    first = lambda a: np.array(np.moveaxis(np.asarray(a), -1, 1))
    x, bias = (torch.tensor(a, requires_grad=True) for a in (first(x), np.array(params["bias"])))
    kernel = torch.tensor(np.array(np.moveaxis(np.asarray(params["kernel"]), (-1, -2), (0, 1))), requires_grad=True)
    padded = torch.nn.functional.pad(x, [n for pair in reversed(pads) for n in pair])
    convolve = getattr(torch.nn.functional, f"conv{x.ndim - 2}d")
    there = convolve(padded, kernel, bias, strides, 0, dilation, groups)
    there.backward(torch.tensor(first(dy)))
    last = lambda a: np.moveaxis(a.detach().numpy(), 1, -1)
    wanted = (last(there), last(x.grad), np.moveaxis(kernel.grad.numpy(), (0, 1), (-1, -2)), bias.grad.numpy())
    for got, reference in zip((y, dx, dparams["kernel"], dparams["bias"]), wanted, strict=True):
        np.testing.assert_allclose(got, reference, rtol=tolerance, atol=tolerance * np.abs(reference).max())


@pytest.mark.parametrize("case", ["same", "dilation", "groups", "depthwise", "one entry", "one axis"])
def test_every_contraction_is_that_of_one_examples_own_gradient(case, x64):
    layer, params, x = setting(case)
    y, _, residuals = layer.fwd(params, (), x, None)
    dy = jnp.asarray(RNG.normal(size=y.shape))
    own = lambda x, dy: jax.grad(lambda params: jnp.vdot(layer.apply(params, (), x[None])[0], dy))(params)
    wanted = jax.jit(jax.vmap(own))(x, dy)
    factors = layer.bwd(params, residuals, dy, fn.keep)[0]
    assert isinstance(factors["kernel"], fn.Window)
    for name, each in wanted.items():
        norms = jnp.sum(jnp.square(each.reshape(len(x), -1)), axis=1)
        for contract, answer in ((fn.total, each.sum(0)), (fn.per_example, each), (fn.squared_norm, norms)):
            np.testing.assert_allclose(contract(factors[name], params[name]), answer, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("contract", [fn.total, fn.per_example, fn.squared_norm])
def test_contractions_under_repeat(contract, x64):
    model = fn.repeat(fn.serial(fn.conv(3, 3), fn.tanh()), 2)
    x = jnp.asarray(RNG.normal(size=(2, 4, 5, 3)))
    params, state = model.init(KEY, x)
    y, _, residuals = model.fwd(params, state, x, None)
    own = lambda x, dy: jax.grad(lambda params: jnp.vdot(model.apply(params, state, x[None])[0], dy))(params)
    each = jax.vmap(own)(x, y)["conv"]["kernel"]
    wanted = {
        "total": each.sum(0),
        "per_example": each,
        "squared_norm": jnp.sum(jnp.square(each.reshape(2, -1)), axis=1),
    }[contract.name]
    answer = model.bwd(params, residuals, y, contract)[0]["conv"]["kernel"]
    np.testing.assert_allclose(answer, wanted, rtol=1e-10, atol=1e-11)
    kept = model.bwd(params, residuals, y, fn.keep)[0]["conv"]["kernel"]
    np.testing.assert_allclose(contract(kept, params["conv"]["kernel"]), wanted, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("groups", [1, 2])
def test_half_precision_gradients_are_summed_in_float32(dtype, groups):
    """4096 ones: float16 counts to 2048 by ones, bfloat16 to 256."""
    ones = jnp.ones((4, 1024, 2), dtype)
    layer = fn.conv(2, 1, groups=groups)
    params = jax.tree.map(jnp.ones_like, layer.init(KEY, ones)[0])
    dparams, dx = layer.bwd(params, ones, ones)
    assert {leaf.dtype for leaf in jax.tree.leaves((dparams, dx))} == {jnp.dtype(dtype)}
    assert (dparams["kernel"] == 4096).all()
    assert (dparams["bias"] == 4096).all()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_init_reads_shapes_off_the_input_and_keeps_the_variance(dtype):
    like = jax.ShapeDtypeStruct((1, 8, 8, 32), dtype)
    params, state = fn.conv(64, (3, 5), groups=2).init(KEY, like)
    assert (params["kernel"].shape, params["bias"].shape, state) == ((3, 5, 16, 64), (64,), ())
    assert {leaf.dtype for leaf in params.values()} == {jnp.dtype(dtype)}
    np.testing.assert_allclose(params["kernel"].astype(jnp.float32).std(), (3 * 5 * 16) ** -0.5, rtol=0.03)
    assert not params["bias"].any()
    assert set(fn.conv(4, 3, use_bias=False).init(KEY, like)[0]) == {"kernel"}


def test_nan_spoils_the_windows_that_see_it():
    layer = fn.conv(1, 3, padding="VALID")
    x = jnp.ones((1, 6, 1)).at[0, 1].set(jnp.nan)
    y = layer.apply(layer.init(KEY, x)[0], (), x)
    np.testing.assert_array_equal(np.isnan(y).reshape(-1), [True, True, False, False])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((0, 3), "features as a positive"),
        ((3, 0), "window as a positive"),
        ((3, 3, 0), "strides as a positive"),
        ((3, 3, 1, "FULL"), "SAME"),
        ((3, 3, 1, "SAME", 0), "dilation as a positive"),
        ((3, 3, 1, "SAME", 1, 0), "groups as a positive"),
        ((3, 3, 1, "SAME", 1, 2), "features that 2 groups divide"),
        ((3, (3, 3), (1,)), "window for 2, strides for 1"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(fn.InputError, match=message):
        fn.conv(*options[:4], **dict(zip(("dilation", "groups"), options[4:], strict=False)))


PARAMS = {"kernel": jnp.ones((3, 3, 2, 4)), "bias": jnp.ones(4)}


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (jnp.ones((2, 5, 5, 3)), r"kernel: float32\[3, 3, 3, 4\]"),
        (jnp.ones((2, 5, 2)), r"kernel: float32\[3, 2, 4\]"),
        (jnp.ones((2, 5)), "at least 3 axes"),
        (jnp.ones((2, 5, 5, 2), jnp.int32), "floating"),
        (jnp.ones((2, 5, 5, 2), jnp.bfloat16), "kernel: bfloat16"),
        (jnp.ones((0, 5, 5, 2)), "not empty"),
        (jnp.ones((2, 2, 5, 2)), r"a window over \[3, 3\] fits in"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(x, message):
    with pytest.raises(fn.InputError, match=message) as caught:
        fn.conv(4, 3, padding="VALID").apply(PARAMS, (), x)
    assert str(caught.value).startswith("conv")


def test_groups_that_do_not_divide_the_channels_and_wrong_cotangents_are_refused():
    with pytest.raises(fn.InputError, match="channels that 2 groups divide"):
        fn.conv(4, 3, groups=2).init(KEY, jnp.ones((1, 5, 5, 3)))
    with pytest.raises(fn.InputError, match=r"float32\[2, 5, 5, 4\]"):
        fn.conv(4, 3).bwd(PARAMS, jnp.ones((2, 5, 5, 2)), jnp.ones((2, 5, 4, 4)))


@pytest.mark.parametrize("strides", [1, 2])
def test_depthwise_conv_is_conv_with_a_group_for_each_channel(strides, x64):
    x = jnp.asarray(RNG.normal(size=(2, 5, 4, 3)))
    layer, grouped = fn.depthwise_conv(3, strides, multiplier=2), fn.conv(6, 3, strides, groups=3)
    params = layer.init(KEY, x)[0]
    assert jax.tree.map(jnp.shape, params) == {"kernel": (3, 3, 1, 6), "bias": (6,)}
    y, _, residuals = layer.fwd(params, (), x, None)
    np.testing.assert_array_equal(y, grouped.apply(params, (), x))
    for contract in (fn.total, fn.squared_norm):
        got, wanted = (each.bwd(params, residuals, y, contract) for each in (layer, grouped))
        jax.tree.map(np.testing.assert_array_equal, got, wanted)
    with pytest.raises(fn.InputError, match="window as a positive"):
        fn.depthwise_conv(0)
    with pytest.raises(fn.InputError, match="multiplier"):
        fn.depthwise_conv(3, multiplier=0)
