"""A transposed convolution: the pullback of a convolution from y's shape to x's, as a layer, in any number of axes.

It spreads each entry of x over a window of y. That is again a correlation, of xs: x dilated by the stride s, xs[s t] =
x[t] and 0 between, and padded. With offsets o in the window and dilation d, on one axis, channels i and features j:

    y[b, p, j]          = sum_oi xs[b, p + d o, i] kernel[o, i, j] + bias[j]

Backward:

    dx[b, t, i]         = sum_oj dy[b, s t - d o, j] kernel[o, i, j]        a convolution with the flipped kernel
    dkernel[o, i, j]    = sum_bt x[b, t, i] dy[b, s t - d o, j]             Window(x, dy, geometry, transposed)
    dbias[j]            = sum_bp dy[b, p, j]                                Shift(dy)

Residuals: x [B, *spatial, C].  The kernel is not among them: `bwd` is handed the parameters.
Numerics: sums run in float32 for half-precision inputs, and are rounded before the bias is added.
Source: Zeiler et al. 2010, "Deconvolutional networks"; Dumoulin and Visin 2016, arXiv:1603.07285, section 4.
"""

from typing import Any

from jax import Array

from funcnet._internal import expect
from funcnet._internal.defaults import LECUN_NORMAL, ZEROS, Initializer
from funcnet._internal.numerics import in_front
from funcnet._internal.windows import Padding, Sizes, Windows, spreading
from funcnet.gradients.common_factors import Shift, Window
from funcnet.layer import Layer, stateless
from funcnet.layers.conv import correlate, flipped, spread
from funcnet.layers.dense import drawn
from funcnet.structure import constructor


@constructor
def conv_transpose(
    features: int,
    kernel_size: Sizes,
    strides: Sizes = 1,
    padding: Padding = "SAME",
    *,
    dilation: Sizes = 1,
    use_bias: bool = True,
    kernel_init: Initializer = LECUN_NORMAL,
    bias_init: Initializer = ZEROS,
) -> Layer[dict[str, Array], tuple[()], Array]:
    """[B, *spatial, C] -> [B, *outputs, F], upsampled by the strides; params kernel [*window, C, F] and bias [F].

    Sizes, padding and the order of the kernel are those of Flax's `ConvTranspose` and of `lax.conv_transpose`, with the
    kernel not flipped (`transpose_kernel=False`): with span = (window - 1) * dilation + 1 on an axis,

        "SAME"          outputs = spatial * stride
        "VALID"         outputs = spatial * stride + max(span - stride, 0)
        (low, high)     outputs = (spatial - 1) * stride + 1 + low + high - (span - 1)

    PyTorch's `ConvTranspose` with `padding=p, output_padding=q` and the weight w [C, F, *window] is this layer with the
    padding (span - 1 - p, span - 1 - p + q) and kernel[o, i, j] = w[i, j, window - 1 - o].

    Args:
        features: F, the size of the output's last axis.
        kernel_size: the window's size, one for all spatial axes (1, 2, 3 or more) or one for each.
        strides: the step from one entry of x to the next in the dilated x.
        padding: zeros around x after strides - 1 zeros were put between its entries: "SAME", "VALID", a number for both
            ends of every axis or a pair (low, high) for each.
        dilation: the step from one entry of a window to the next.
        use_bias: whether to add a bias.
        kernel_init, bias_init: as in `jax.nn.initializers`, `(key, shape, dtype) -> array`; LeCun's normal counts the
            whole window as inputs, as in Flax: with a stride, each output has fewer inputs than that.

    Raises:
        InputError: if x is not floating, has another number of axes or channels, its dtype is not the
            parameters', or no output is left.
    """
    features = expect.count(features, "features")
    expect.flags(use_bias=use_bias)
    under = spreading(kernel_size, strides, padding, dilation)

    def geometry(x: Any) -> tuple[Windows, dict[str, tuple[int, ...]]]:
        """The windows on y, and the shapes of the parameters."""
        windows = under(x)
        shapes = {"kernel": (*windows.window, x.shape[-1], features), "bias": (features,)}
        return windows, shapes if use_bias else {"kernel": shapes["kernel"]}

    def init(key: Array, x: Any) -> dict[str, Array]:
        return drawn(key, {"kernel": kernel_init, "bias": bias_init}, geometry(x)[1], expect.dtype(x))

    def fwd(params: dict[str, Array], x: Array) -> tuple[Array, Array]:
        windows, shapes = geometry(x)
        expect.fields(params, x.dtype, shapes)
        y = spread(x, params["kernel"], windows, 1).astype(x.dtype)
        return (y + in_front(params["bias"], y.ndim) if use_bias else y), x

    def bwd(params, x, dy, contract):
        windows, shapes = geometry(x)
        expect.fields(params, x.dtype, shapes)
        dy = expect.cotangent(dy, (x.shape[0], *windows.inputs, features), x.dtype)
        dx = correlate(dy, flipped(params["kernel"], 1), windows).astype(x.dtype)
        dparams = {"kernel": contract(Window(x, dy, windows, transposed=True), params["kernel"])}
        if use_bias:
            dparams["bias"] = contract(Shift(dy), params["bias"])
        return dparams, dx

    return stateless("conv_transpose", init, fwd, bwd)
