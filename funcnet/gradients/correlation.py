"""The gradient of a convolution's kernel: windows of x correlated with dy, by the formula fastest for its shape.

    dkernel[o, i, j] = sum_bt x[b, s t + d o, i] dy[b, t, j]        offsets o in the window, stride s, dilation d

Sums run in float32 or wider.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from funcnet._internal.numerics import flat, product, sum_dtype
from funcnet._internal.sharding import regrouped, sharded_as
from funcnet._internal.windows import Windows, entries


def correlation(x: Array, dy: Array, windows: Windows, kernel: Array) -> Array:
    """The gradient of a kernel [*window, C / groups, F]: x correlated with dy, which is dilated by the strides.

    With groups, which XLA's CPU backend computes in a slow loop, and for windows of one entry, a GEMM a tap is faster.
    """
    if x.shape[-1] != kernel.shape[-2] or max(windows.window) == 1:
        return correlation_by_taps(x, dy, windows, kernel)
    n = len(windows.window)
    spatial = tuple(range(1, n + 1))
    # The batch takes the place of the channels, which a convolution sums over; C and F those of batch and features.
    axes = lax.ConvDimensionNumbers((n + 1, 0, *spatial), (n + 1, 0, *spatial), (n, n + 1, *range(n)))
    each = zip(windows.inputs, windows.outputs, windows.window, windows.strides, windows.dilation, strict=True)
    seen = [(k - 1) * d + (o - 1) * s + 1 - i for i, o, k, s, d in each]
    pads = [(low, m - low) for (low, _), m in zip(windows.padding, seen, strict=True)]
    return lax.conv_general_dilated(
        x.astype(sum_dtype(x.dtype)),
        dy.astype(sum_dtype(dy.dtype)),
        window_strides=windows.dilation,
        padding=pads,
        rhs_dilation=windows.strides,
        dimension_numbers=axes,
        out_sharding=jax.typeof(kernel).sharding,
    )


def correlation_by_taps(x: Array, dy: Array, windows: Windows, kernel: Array) -> Array:
    """The same as one product for each entry of the window."""
    groups, high = x.shape[-1] // kernel.shape[-2], sum_dtype(x.dtype)
    split = lambda a: regrouped(a, (-1, groups, a.shape[-1] // groups)).astype(high)
    if groups == x.shape[-1] == dy.shape[-1]:
        return _by_channels(x, dy, windows, kernel)
    if groups == 1:
        tap = lambda entry: product(flat(entry), flat(dy), (0, 0), kernel[(0,) * len(windows.window)])
    else:
        tap = lambda entry: jnp.einsum("ngi,ngj->igj", split(entry), split(dy), out_sharding=sharded_as(dy, 0))
    return jnp.stack([tap(entry) for entry in entries(windows, x)]).reshape(kernel.shape)


def _by_channels(x: Array, dy: Array, windows: Windows, kernel: Array) -> Array:
    """The same for a depthwise convolution: x times dy, channel by channel, summed for each entry of the window.

    XLA's CPU backend computes a sum that is fused with slices in slow loops, and stores every product that it does not
    fuse. So the first axis is divided into blocks, whose products are added elementwise in one vectorised loop; the
    result, an eighth of the size, is summed by a product with ones, which is never fused.
    """
    count = min(8, windows.outputs[0])
    rows = -(-windows.outputs[0] // count)
    missing = rows * count - windows.outputs[0]
    (low, high), *others = windows.padding
    longer = ((low, high + missing * windows.strides[0]), *others)
    cut = windows._replace(outputs=(rows * count, *windows.outputs[1:]), padding=longer)
    dy = lax.pad(dy, np.zeros((), dy.dtype), [(0, missing * (axis == 1), 0) for axis in range(dy.ndim)])
    blocks = [slice(n * rows, (n + 1) * rows) for n in range(count)]
    parts = lambda a: [a[:, block].astype(sum_dtype(a.dtype)) for block in blocks]

    def tap(entry: Array) -> Array:
        products = (a * b for a, b in zip(parts(entry), parts(dy), strict=True))
        sums = flat(sum(products, jnp.zeros((), sum_dtype(dy.dtype))))
        return product(jnp.ones((sums.shape[0], 1), sums.dtype), sums, (0, 0), kernel[(0,) * len(windows.window)])

    return jnp.stack([tap(entry) for entry in entries(cut, x)]).reshape(kernel.shape)
