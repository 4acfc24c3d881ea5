"""conv_transpose against lax and PyTorch, every contraction, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import funcnet as fn

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
# input shape, features, options, outputs
CASES = {
    "same": ((2, 3, 4, 3), 4, {"kernel_size": 3, "strides": 2}, (6, 8)),
    "same, stride beyond the window": ((2, 3, 2, 2), 3, {"kernel_size": 2, "strides": (3, 2)}, (9, 4)),
    "valid": ((2, 3, 4, 3), 2, {"kernel_size": (4, 2), "strides": (2, 3), "padding": "VALID"}, (8, 12)),
    "one number": ((2, 4, 3, 2), 3, {"kernel_size": 3, "strides": 2, "padding": 1}, (7, 5)),
    "pads": ((2, 3, 4, 2), 3, {"kernel_size": 3, "strides": (2, 1), "padding": ((0, 4), (3, 2))}, (7, 7)),
    "dilation": ((2, 3, 4, 2), 3, {"kernel_size": 3, "strides": (1, 2), "dilation": (2, 3), "padding": 3}, (5, 7)),
    "one entry": ((2, 3, 4, 3), 2, {"kernel_size": 1}, (3, 4)),
    "one axis": ((2, 5, 3), 4, {"kernel_size": 4, "strides": 2}, (10,)),
    "three axes": ((2, 2, 3, 2, 2), 3, {"kernel_size": (2, 1, 3), "strides": (1, 2, 2), "padding": "VALID"}, (3, 6, 5)),
}
EACH = pytest.mark.parametrize("case", CASES)


def setting(case, dtype=np.float64):
    """Layer, params, x, dy."""
    shape, features, options, outputs = CASES[case]
    layer = fn.conv_transpose(features, **options)
    draw = lambda shape: jnp.asarray(RNG.normal(size=shape).astype(dtype))
    params = jax.eval_shape(layer.init, KEY, jax.ShapeDtypeStruct(shape, dtype))[0]
    params = {name: draw(leaf.shape) for name, leaf in params.items()}
    return layer, params, draw(shape), draw((shape[0], *outputs, features))


def run(layer, params, x, dy):
    """(y, dx, dparams)."""

    @jax.jit
    def both(params, x, dy):
        y, _, residuals = layer.fwd(params, (), x, None)
        return y, *layer.bwd(params, residuals, dy)[::-1]

    return both(params, x, dy)


@EACH
def test_it_is_laxs_conv_transpose(case, x64):
    layer, params, x, dy = setting(case)
    options, n = CASES[case][2], x.ndim - 2
    each = lambda value: value if isinstance(value, tuple) else (value,) * n
    padding = options.get("padding", "SAME")
    padding = [(padding, padding)] * n if isinstance(padding, int) else padding
    axes = ("N" + "DHW"[3 - n :] + "C", "DHW"[3 - n :] + "IO", "N" + "DHW"[3 - n :] + "C")

    def there(params, x):
        strides, dilation = each(options.get("strides", 1)), each(options.get("dilation", 1))
        y = lax.conv_transpose(x, params["kernel"], strides, padding, dilation, axes)
        return y + params["bias"].reshape((1,) * (n + 1) + (-1,))

    y, pull = jax.vjp(there, params, x)
    dparams, dx = pull(dy)
    got = run(layer, params, x, dy)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves((y, dx, dparams)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(("axes", "dtype"), [(1, np.float64), (2, np.float64), (3, np.float64), (2, np.float32)])
def test_it_is_pytorchs_with_the_kernel_flipped(axes, dtype, x64):
    """By the docstring's rule for stride 2, padding 1, output padding 1, a window of 4 and dilation 2."""
    torch = pytest.importorskip("torch")
    window, pad, more = 4, 1, 1
    span = (window - 1) * 2 + 1
    layer = fn.conv_transpose(3, window, 2, ((span - 1 - pad, span - 1 - pad + more),) * axes, dilation=2)
    draw = lambda *shape: RNG.normal(size=shape).astype(dtype)
    x, weight, bias = draw(2, *(3,) * axes, 2), draw(2, 3, *(window,) * axes), draw(3)
    kernel = np.moveaxis(np.flip(weight, range(2, 2 + axes)), (0, 1), (-2, -1))

    first = lambda a: torch.tensor(np.array(np.moveaxis(a, -1, 1)), requires_grad=True)
    there, w, b = first(x), torch.tensor(weight, requires_grad=True), torch.tensor(bias, requires_grad=True)
    convolve = getattr(torch.nn.functional, f"conv_transpose{axes}d")
    out = convolve(there, w, b, stride=2, padding=pad, output_padding=more, dilation=2)
    dy = draw(*out.shape)
    out.backward(torch.tensor(dy))

    last = lambda a: np.moveaxis(a, 1, -1)
    params = {"kernel": jnp.asarray(kernel), "bias": jnp.asarray(bias)}
    y, dx, dparams = run(layer, params, jnp.asarray(x), jnp.asarray(last(dy)))
    dkernel = np.moveaxis(np.flip(w.grad.numpy(), range(2, 2 + axes)), (0, 1), (-2, -1))
    wanted = last(out.detach().numpy()), last(there.grad.numpy()), dkernel, b.grad.numpy()
    tolerance = 1e-5 if dtype == np.float32 else 1e-10
    for got, reference in zip((y, dx, dparams["kernel"], dparams["bias"]), wanted, strict=True):
        np.testing.assert_allclose(got, reference, rtol=tolerance, atol=tolerance * np.abs(reference).max())


def test_it_is_the_pullback_of_a_convolution(x64):
    x, dy = (jnp.asarray(RNG.normal(size=shape)) for shape in ((2, 7, 6, 3), (2, 4, 3, 5)))
    there, back = fn.conv(5, 3, 2, 1, use_bias=False), fn.conv_transpose(3, 3, 2, ((1, 1), (1, 2)), use_bias=False)
    kernel = jnp.asarray(RNG.normal(size=(3, 3, 3, 5)))
    wanted = there.bwd({"kernel": kernel}, x, dy)[1]
    flipped = jnp.swapaxes(kernel[::-1, ::-1], -1, -2)
    np.testing.assert_allclose(back.apply({"kernel": flipped}, (), dy), wanted, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("case", ["same", "dilation", "one axis"])
def test_every_contraction_is_that_of_one_examples_own_gradient(case, x64):
    layer, params, x, dy = setting(case)
    residuals = layer.fwd(params, (), x, None)[2]
    own = lambda x, dy: jax.grad(lambda params: jnp.vdot(layer.apply(params, (), x[None])[0], dy))(params)
    factors = layer.bwd(params, residuals, dy, fn.keep)[0]
    for name, each in jax.jit(jax.vmap(own))(x, dy).items():
        norms = jnp.sum(jnp.square(each.reshape(len(x), -1)), axis=1)
        for contract, answer in ((fn.total, each.sum(0)), (fn.per_example, each), (fn.squared_norm, norms)):
            np.testing.assert_allclose(contract(factors[name], params[name]), answer, rtol=1e-10, atol=1e-11)


def test_contractions_under_repeat(x64):
    model = fn.repeat(fn.serial(fn.conv_transpose(2, 3), fn.tanh()), 2)
    x = jnp.asarray(RNG.normal(size=(2, 4, 2)))
    params, state = model.init(KEY, x)
    y, _, residuals = model.fwd(params, state, x, None)
    kept = model.bwd(params, residuals, y, fn.keep)[0]["conv_transpose"]["kernel"]
    for contract in (fn.total, fn.per_example, fn.squared_norm):
        once = model.bwd(params, residuals, y, contract)[0]["conv_transpose"]["kernel"]
        np.testing.assert_allclose(contract(kept, params["conv_transpose"]["kernel"]), once, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((0, 3), "features as a positive"),
        ((3, 0), "window as a positive"),
        ((3, 3, 0), "strides as a positive"),
        ((3, 3, 1, "FULL"), "SAME"),
        ((3, (3, 3), (1,)), "window for 2, strides for 1"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(fn.InputError, match=message):
        fn.conv_transpose(*options)


PARAMS = {"kernel": jnp.ones((3, 3, 2, 4)), "bias": jnp.ones(4)}


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (jnp.ones((2, 5, 5, 3)), r"kernel: float32\[3, 3, 3, 4\]"),
        (jnp.ones((2, 5)), "at least 3 axes"),
        (jnp.ones((2, 5, 5, 2), jnp.int32), "floating"),
        (jnp.ones((2, 5, 5, 2), jnp.bfloat16), "kernel: bfloat16"),
        (jnp.ones((2, 2, 5, 2)), r"larger than a window over \[3, 3\]"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(x, message):
    with pytest.raises(fn.InputError, match=message) as caught:
        fn.conv_transpose(4, 3, padding=0).apply(PARAMS, (), x)
    assert str(caught.value).startswith("conv_transpose")


def test_wrong_cotangents_are_refused():
    with pytest.raises(fn.InputError, match=r"float32\[2, 5, 5, 4\]"):
        fn.conv_transpose(4, 3).bwd(PARAMS, jnp.ones((2, 5, 5, 2)), jnp.ones((2, 5, 4, 4)))


def test_init_has_the_shapes_and_dtype_of_flax():
    like = jax.ShapeDtypeStruct((1, 8, 8, 32), jnp.bfloat16)
    params, state = fn.conv_transpose(64, (3, 5)).init(KEY, like)
    assert (params["kernel"].shape, params["bias"].shape, state) == ((3, 5, 32, 64), (64,), ())
    assert {leaf.dtype for leaf in params.values()} == {jnp.dtype(jnp.bfloat16)}
    np.testing.assert_allclose(params["kernel"].astype(jnp.float32).std(), (3 * 5 * 32) ** -0.5, rtol=0.03)
    assert set(fn.conv_transpose(4, 3, use_bias=False).init(KEY, like)[0]) == {"kernel"}
