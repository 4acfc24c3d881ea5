"""A convolution, as networks call it: a correlation of each window with a kernel, in any number of spatial axes.

With offsets o in the window, stride s and dilation d, on one axis, channels i and features j:

    y[b, t, j] = sum_oi x[b, s t + d o, i] kernel[o, i, j] + bias[j]

Backward:

    dx[b, p, i]         = sum_otj [p = s t + d o] dy[b, t, j] kernel[o, i, j]
    dkernel[o, i, j]    = sum_bt x[b, s t + d o, i] dy[b, t, j]                 the factor Window(x, dy, geometry)
    dbias[j]            = sum_bt dy[b, t, j]                                    the factor Shift(dy)

so dx is dy, dilated by the stride, correlated with the flipped kernel whose channels and features are exchanged. With
groups, features of group g see the channels of group g alone.

Where a kernel without strides and groups is larger than x and dy together, dx is a sum of matrix products, one for each
entry of the window, for which the kernel need not be flipped.

A depthwise convolution (a group for each channel, a feature for each group) is a sum of shifted products, one for each
entry of the window, forward and backward: XLA's CPU backend is slow at it otherwise.

Residuals: x [B, *spatial, C].  The kernel is not among them: `bwd` is handed the parameters.
Numerics: sums run in float32 for half-precision inputs, and are rounded before the bias is added.
Source: LeCun et al. 1989, "Backpropagation applied to handwritten zip code recognition"; Dumoulin and Visin 2016,
arXiv:1603.07285 (strides); Yu and Koltun 2016, arXiv:1511.07122 (dilation).
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from funcnet._internal import expect
from funcnet._internal.defaults import LECUN_NORMAL, ZEROS, Initializer
from funcnet._internal.errors import InputError, describe
from funcnet._internal.numerics import entries_of, flat, in_front, product, sum_dtype
from funcnet._internal.windows import Padding, Sizes, Windows, entries, sliding
from funcnet.gradients.common_factors import Shift, Window
from funcnet.layer import Layer, stateless
from funcnet.layers.dense import drawn
from funcnet.structure import constructor


@constructor
def conv(
    features: int,
    kernel_size: Sizes,
    strides: Sizes = 1,
    padding: Padding = "SAME",
    *,
    dilation: Sizes = 1,
    groups: int = 1,
    use_bias: bool = True,
    kernel_init: Initializer = LECUN_NORMAL,
    bias_init: Initializer = ZEROS,
) -> Layer[dict[str, Array], tuple[()], Array]:
    """[B, *spatial, C] -> [B, *outputs, F]; params kernel [*window, C / groups, F], Flax's order, and bias [F].

    Args:
        features: F, the size of the output's last axis.
        kernel_size: the window's size, one for all spatial axes (1, 2, 3 or more) or one for each.
        strides: the step from one window to the next.
        padding: zeros around x: "SAME", "VALID", a number for both ends of every axis or a pair (low, high) for each.
        dilation: the step from one entry of a window to the next.
        groups: how many groups channels and features are split into; one per channel is a depthwise convolution.
        use_bias: whether to add a bias.
        kernel_init, bias_init: as in `jax.nn.initializers`, `(key, shape, dtype) -> array`. LeCun's normal keeps the
            variance of its input.

    Raises:
        InputError: if x is not floating, has another number of axes or channels, its dtype is not the
            parameters', no window fits in, or the groups do not divide channels and features.
    """
    features, groups = expect.count(features, "features"), expect.count(groups, "groups")
    expect.flags(use_bias=use_bias)
    over = sliding(kernel_size, strides, padding, dilation)
    if features % groups:
        raise InputError(f"features that {groups} groups divide", f"features={features}", "ask for a multiple of them")

    def geometry(x: Any) -> tuple[Windows, dict[str, tuple[int, ...]]]:
        """The windows on x, and the shapes of the parameters."""
        windows = over(x)
        if x.shape[-1] % groups:
            remedy = "for a depthwise convolution give as many groups as channels"
            raise InputError(f"channels that {groups} groups divide", describe(x), remedy)
        shapes = {"kernel": (*windows.window, x.shape[-1] // groups, features), "bias": (features,)}
        return windows, shapes if use_bias else {"kernel": shapes["kernel"]}

    def init(key: Array, x: Any) -> dict[str, Array]:
        return drawn(key, {"kernel": kernel_init, "bias": bias_init}, geometry(x)[1], expect.dtype(x))

    def fwd(params: dict[str, Array], x: Array) -> tuple[Array, Array]:
        windows, shapes = geometry(x)
        expect.fields(params, x.dtype, shapes)
        y = (_depthwise if groups == x.shape[-1] == features else correlate)(x, params["kernel"], windows)
        y = y.astype(x.dtype)
        return (y + in_front(params["bias"], y.ndim) if use_bias else y), x

    def bwd(params, x, dy, contract):
        windows, shapes = geometry(x)
        expect.fields(params, x.dtype, shapes)
        dy = expect.cotangent(dy, (x.shape[0], *windows.outputs, features), x.dtype)
        pull = _pull_depthwise if groups == x.shape[-1] == features else _pull
        dx = pull(dy, params["kernel"], windows, groups).astype(x.dtype)
        dparams = {"kernel": contract(Window(x, dy, windows), params["kernel"])}
        if use_bias:
            dparams["bias"] = contract(Shift(dy), params["bias"])
        return dparams, dx

    return stateless("conv", init, fwd, bwd)


@constructor
def depthwise_conv(
    kernel_size: Sizes,
    strides: Sizes = 1,
    padding: Padding = "SAME",
    *,
    dilation: Sizes = 1,
    multiplier: int = 1,
    use_bias: bool = True,
    kernel_init: Initializer = LECUN_NORMAL,
    bias_init: Initializer = ZEROS,
) -> Layer[dict[str, Array], tuple[()], Array]:
    """Each channel of x [B, *spatial, C] by itself, to [B, *outputs, multiplier C]: `conv` with C groups.

    Params kernel [*window, 1, multiplier C] and bias [multiplier C]; the features of channel i are adjacent.

    Args:
        multiplier: how many features are made from each channel.
        kernel_size, strides, padding, dilation, use_bias, kernel_init, bias_init: as for `conv`.

    Raises:
        InputError: as `conv`.
    """
    multiplier = expect.count(multiplier, "multiplier")
    expect.flags(use_bias=use_bias)

    def of(x: Any) -> Layer:
        expect.float_array(x, rank=3)
        features, groups = multiplier * x.shape[-1], x.shape[-1]
        inits = {"kernel_init": kernel_init, "bias_init": bias_init}
        return conv(
            features, kernel_size, strides, padding, dilation=dilation, groups=groups, use_bias=use_bias, **inits
        )

    def init(key: Array, x: Any) -> dict[str, Array]:
        return of(x).init(key, x)[0]

    def fwd(params: dict[str, Array], x: Array) -> tuple[Array, Array]:
        y, _, x = of(x).fwd(params, (), x, None)
        return y, x

    def bwd(params, x, dy, contract):
        return of(x).bwd(params, x, dy, contract)

    sliding(kernel_size, strides, padding, dilation)  # refuses bad options at once
    return stateless("depthwise_conv", init, fwd, bwd)


def correlate(x: Array, kernel: Array, windows: Windows) -> Array:
    """y, in the accumulation dtype."""
    return lax.conv_general_dilated(
        _high(x),
        _high(kernel),
        windows.strides,
        windows.padding,
        rhs_dilation=windows.dilation,
        dimension_numbers=_channels_last(x.ndim - 2),
        feature_group_count=x.shape[-1] // kernel.shape[-2],
    )


def _pull(dy: Array, kernel: Array, windows: Windows, groups: int) -> Array:
    """dx: dy, dilated by the strides, correlated with the flipped kernel."""
    if groups == max(windows.strides) == 1:
        inputs = dy.shape[0], *windows.inputs, kernel.shape[-2]
        if kernel.size > entries_of(inputs) + entries_of(dy.shape):
            return _pull_by_taps(dy, kernel, windows)
    return spread(dy, flipped(kernel, groups), windows, groups)


def _pull_by_taps(dy: Array, kernel: Array, windows: Windows) -> Array:
    """The same for stride 1, as a product for each entry of the window, which reads the kernel in its own layout."""
    channels, features = kernel.shape[-2:]
    taps = kernel.reshape(-1, channels, features)[::-1]
    dx = jnp.zeros((), sum_dtype(dy.dtype))
    for entry, tap in zip(entries(_back(windows), dy), taps, strict=True):
        dx = dx + product(flat(entry), tap, (1, 1), flat(dy))
    return dx.reshape(dy.shape[0], *windows.inputs, channels)


def spread(dy: Array, kernel: Array, windows: Windows, groups: int) -> Array:
    """dy, dilated by the strides, correlated with the kernel so that the result has the sizes `windows.inputs`."""
    n = dy.ndim - 2
    return lax.conv_general_dilated(
        _high(dy),
        _high(kernel),
        (1,) * n,
        _back(windows).padding,
        lhs_dilation=windows.strides,
        rhs_dilation=windows.dilation,
        dimension_numbers=_channels_last(n),
        feature_group_count=groups,
    )


def _back(windows: Windows) -> Windows:
    """The windows on dy, dilated by the strides, one for each entry of x; negative padding crops."""
    each = zip(windows.inputs, windows.outputs, windows.window, windows.strides, windows.dilation, strict=True)
    # how much padding the dilated dy needs so that as many windows fit in as x has entries
    room = [i - (o - 1) * s - 1 + (k - 1) * d for i, o, k, s, d in each]
    lows = [(k - 1) * d - low for (low, _), k, d in zip(windows.padding, windows.window, windows.dilation, strict=True)]
    padding = tuple((low, r - low) for low, r in zip(lows, room, strict=True))
    ones = (1,) * len(lows)
    return Windows(windows.outputs, windows.inputs, windows.window, ones, padding, windows.dilation)


def flipped(kernel: Array, groups: int) -> Array:
    """[*window, C / groups, F], reversed along the window, as [*window, F / groups, C], group by group."""
    *window, channels, features = kernel.shape
    split = lax.rev(kernel, range(len(window))).reshape(*window, channels, groups, features // groups)
    return jnp.swapaxes(split, -1, -3).reshape(*window, features // groups, groups * channels)


def _depthwise(x: Array, kernel: Array, windows: Windows) -> Array:
    """y for one channel per group, in the accumulation dtype."""
    taps = _high(kernel).reshape(-1, kernel.shape[-1])
    y = jnp.zeros((), taps.dtype)
    for entry, tap in zip(entries(windows, x), taps, strict=True):
        y = y + _high(entry) * in_front(tap, x.ndim)
    return y


def _pull_depthwise(dy: Array, kernel: Array, windows: Windows, groups: int) -> Array:
    """dx for one channel per group, in the accumulation dtype: dy times each tap, added where the tap read x."""
    if max(windows.strides) == 1:
        return _depthwise(dy, lax.rev(kernel, range(dy.ndim - 2)), _back(windows))
    taps = _high(kernel).reshape(-1, groups)
    dy, dx = _high(dy), jnp.zeros((), taps.dtype)
    each = list(zip(windows.inputs, windows.outputs, windows.strides, windows.dilation, windows.padding, strict=True))
    for offset, tap in zip(np.ndindex(*windows.window), taps, strict=True):
        starts = [o * d - low for o, (_, _, _, d, (low, _)) in zip(offset, each, strict=True)]
        pads = [(a, i - a - (n - 1) * s - 1, s - 1) for a, (i, n, s, _, _) in zip(starts, each, strict=True)]
        placed = lax.pad(dy * in_front(tap, dy.ndim), np.zeros((), dy.dtype), [(0, 0, 0), *pads, (0, 0, 0)])
        dx = dx + placed
    return dx


def _channels_last(n: int) -> lax.ConvDimensionNumbers:
    """B first and C last for x and y, C and F last for the kernel; the n spatial axes lie between or before them."""
    data = (0, n + 1, *range(1, n + 1))
    return lax.ConvDimensionNumbers(data, (n + 1, n, *range(n)), data)


def _high(a: Array) -> Array:
    return a.astype(sum_dtype(a.dtype))
