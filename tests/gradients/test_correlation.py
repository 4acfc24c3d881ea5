"""The gradient of a kernel that slides, by each of its formulas, against a loop over windows in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from funcnet._internal.windows import sliding
from funcnet.gradients.correlation import correlation, correlation_by_taps

# input shape, window, features, groups, and options
CASES = {
    "one axis": ((2, 7, 3), (3,), 4, 1, {}),
    "strides, dilation and uneven pads": (
        (2, 6, 7, 2),
        (3, 2),
        3,
        1,
        {"strides": (2, 3), "padding": ((1, 2), (0, 3)), "dilation": (1, 2)},
    ),
    "strides that leave entries unseen": ((2, 8, 2), (2,), 3, 1, {"strides": 3}),
    "pads beyond the window": ((1, 2, 2), (2,), 2, 1, {"padding": ((3, 4),)}),
    "one entry": ((2, 5, 4, 3), (1, 1), 2, 1, {"strides": 2}),
    "groups": ((2, 6, 4), (3,), 6, 2, {"padding": 1}),
    "depthwise": ((2, 5, 6, 3), (3, 2), 3, 3, {"padding": 1, "strides": (1, 2)}),
    "depthwise, rows left over": ((2, 19, 3), (3,), 3, 3, {"strides": 2, "padding": ((2, 0),)}),
    "depthwise, one output": ((2, 3, 2), (3,), 2, 2, {}),
    "depthwise, more features": ((2, 5, 3), (2,), 6, 3, {}),
    "one channel": ((2, 5, 1), (2,), 1, 1, {}),
}


def setting(case, dtype=np.float64):
    shape, window, features, groups, options = CASES[case]
    rng = np.random.default_rng(0)
    windows = sliding(window, **{"strides": 1, "padding": 0} | options)(jax.ShapeDtypeStruct(shape, dtype))
    x = rng.normal(size=shape).astype(dtype)
    dy = rng.normal(size=(shape[0], *windows.outputs, features)).astype(dtype)
    return x, dy, windows, jnp.zeros((*window, shape[-1] // groups, features), dtype)


def by_loop(x, dy, windows, kernel):
    """Every offset of every window, group by group."""
    padded = np.pad(x, [(0, 0), *windows.padding, (0, 0)])
    channels, groups = kernel.shape[-2], x.shape[-1] // kernel.shape[-2]
    features = dy.shape[-1] // groups
    wanted = np.zeros(kernel.shape)
    for *offset, g in np.ndindex(*windows.window, groups):
        seen, made = slice(g * channels, (g + 1) * channels), slice(g * features, (g + 1) * features)
        for position in np.ndindex(*windows.outputs):
            each = zip(position, windows.strides, offset, windows.dilation, strict=True)
            at = tuple(p * s + o * d for p, s, o, d in each)
            wanted[(*offset, slice(None), made)] += (
                padded[(slice(None), *at, seen)].T @ dy[(slice(None), *position, made)]
            )
    return wanted


@pytest.mark.parametrize("case", CASES)
def test_every_formula_gives_what_a_loop_gives(case, x64):
    x, dy, windows, kernel = setting(case)
    wanted = by_loop(x, dy, windows, kernel)
    two = CASES[case][3] == 1 and max(windows.window) > 1  # else the one calls the other
    for formula in (correlation, correlation_by_taps)[: 1 + two]:
        got = jax.jit(formula, static_argnums=2)(x, dy, windows, kernel)
        assert got.shape == kernel.shape
        np.testing.assert_allclose(got, wanted, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_half_precision_is_summed_and_returned_in_float32(dtype, groups):
    """Sums of ones over 4,101 places, a number of 13 bits."""
    x = np.ones((1, 4102, 4), dtype)
    windows, kernel = sliding(2, 1, 0)(x), jnp.zeros((2, 4 // groups, 4), dtype)
    for formula in (correlation, correlation_by_taps)[groups > 1 :]:
        got = jax.jit(formula, static_argnums=2)(x, x[:, 1:], windows, kernel)
        assert got.dtype == jnp.float32
        np.testing.assert_array_equal(got, np.full(kernel.shape, 4101))


def test_the_formula_is_chosen_by_shape():
    """One convolution where it is the fastest, else one product a tap, and never a grouped convolution."""
    for case, convolution in {"one axis": True, "one entry": False, "groups": False, "depthwise": False}.items():
        x, dy, windows, kernel = setting(case, np.float32)
        text = str(jax.make_jaxpr(correlation, static_argnums=2)(x, dy, windows, kernel))
        assert text.count("conv_general_dilated[") == convolution, case
        assert text.count("dot_general[") == (0 if convolution else int(np.prod(windows.window))), case
