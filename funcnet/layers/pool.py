"""Pools: the maximum or the mean of each window, or of all of x, channel by channel, in any number of spatial axes.

With o over the offsets in a window and s the stride, on one axis:

    max_pool        y[j] = max_o x[s j + o]             dx[s j + o] += dy[j] where o is the winner of window j
    avg_pool        y[j] = mean_o x[s j + o]            dx[s j + o] += dy[j] / count[j]
    global_max_pool, global_avg_pool: one window over all spatial axes, which are dropped.

Backward, without a scatter: an input i = s q + p, in block q at phase p, lies in the windows j = q - m at the offset
o = p + s m, for m < ceil(window / s). So dx, seen as [blocks, s], is a sum over m of dy shifted by m and masked:

    dx[q, p] = sum_m dy[q - m] * (winner[q - m] == p + s m)

which is one comparison where windows do not overlap, and fuses into one pass.

Residuals: for max_pool the winner's offset [B, *outputs, C], one byte each for windows of up to 255 entries; for
global_max_pool its position [B, C], four bytes each; and x's shape, carried as a zero-size array [*x.shape, 0]. Neither
x nor y is kept.
Numerics: the first of equal maxima wins, row by row. A NaN wins over all else: y is NaN, and dy goes to the window's
first NaN. Padding never wins, not even over -inf, where JAX's own rule may lose dy. Means, and the sums of
overlapping cotangents, are in float32 for half precision.
Source: LeCun et al. 1998, "Gradient-based learning applied to document recognition"; Lin, Chen and Yan 2014,
arXiv:1312.4400, section 3.2 (global); ties as in XLA's SelectAndScatter.
"""

from collections.abc import Iterator
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from funcnet._internal import expect
from funcnet._internal.errors import InputError
from funcnet._internal.numerics import sum_dtype
from funcnet._internal.sharding import regrouped
from funcnet._internal.windows import Padding, Sizes, Windows, entries, sliding
from funcnet.layer import Layer, no_params, stateless
from funcnet.structure import constructor


class MaxPoolResiduals(NamedTuple):
    """Residuals of max_pool: offset [B, *outputs, C], counted in each window row by row, and like [*x.shape, 0].

    For global_max_pool offset is [B, C].
    """

    offset: Array
    like: Array


@constructor
def max_pool(
    window: Sizes, strides: Sizes | None = None, padding: Padding = "VALID"
) -> Layer[dict[str, Array], tuple[()], MaxPoolResiduals]:
    """The maximum of each window of x [B, *spatial, C], for 1, 2, 3 or more spatial axes.

    The loop over a window's entries is unrolled: for hundreds of them take `global_max_pool`, if it covers the input.

    Args:
        window: entries of a window, for all spatial axes or one for each.
        strides: from one window to the next; by default the window, so that windows tile (Flax's default is 1).
        padding: "VALID", "SAME", a number for both ends of every axis or a pair (low, high) for each, less than the
            window; padding is never the maximum.

    Raises:
        InputError: if x is not floating, has another number of axes, or no window fits in.
    """
    over = _windows(window, strides, padding)

    def fwd(params: dict[str, Array], x: Array) -> tuple[Array, MaxPoolResiduals]:
        windows = over(x)
        kind = np.min_scalar_type(prod(windows.window))
        first, *others = entries(windows, x, -jnp.inf)
        y, offset = first, jnp.broadcast_to(jnp.asarray(_first_inside(windows), kind), first.shape)
        for o, entry in enumerate(others, start=1):
            better = ~(entry <= y) & (y == y)  # true for a NaN unless one came before
            y, offset = jnp.where(better, entry, y), jnp.where(better, kind.type(o), offset)
        return y, MaxPoolResiduals(offset, _like(x))

    def bwd(params, residuals, dy, contract):
        windows = over(_template(residuals.like))
        return {}, _pull(windows, _cotangent(dy, windows, residuals.like), residuals.like, residuals.offset)

    return stateless("max_pool", no_params, fwd, bwd)


@constructor
def avg_pool(
    window: Sizes, strides: Sizes | None = None, padding: Padding = "VALID", *, count_include_pad: bool = True
) -> Layer[dict[str, Array], tuple[()], Array]:
    """The mean of each window of x [B, *spatial, C], for 1, 2, 3 or more spatial axes.

    Args:
        window: entries of a window, for all spatial axes or one for each.
        strides: from one window to the next; by default the window, so that windows tile (Flax's default is 1).
        padding: "VALID", "SAME", a number for both ends of every axis or a pair (low, high) for each, less than the
            window.
        count_include_pad: whether padding counts as zeros, the default as in Flax and PyTorch; else a mean is over the
            entries inside the input alone.

    Raises:
        InputError: if x is not floating, has another number of axes, or no window fits in.
    """
    expect.flags(count_include_pad=count_include_pad)
    over = _windows(window, strides, padding)

    def count(windows: Windows, dtype: Any) -> Array:
        if count_include_pad:
            return jnp.asarray(prod(windows.window), dtype)
        ones = np.ones((1, *windows.inputs, 1), dtype)
        return sum(entries(windows, ones), jnp.zeros((), dtype))

    def fwd(params: dict[str, Array], x: Array) -> tuple[Array, Array]:
        windows, high = over(x), x.astype(sum_dtype(x.dtype))
        y = sum(entries(windows, high), jnp.zeros((), high.dtype)) / count(windows, high.dtype)
        return y.astype(x.dtype), _like(x)

    def bwd(params, like, dy, contract):
        windows, high = over(_template(like)), sum_dtype(like.dtype)
        dy = _cotangent(dy, windows, like).astype(high)
        return {}, _pull(windows, dy / count(windows, high), like)

    return stateless("avg_pool", no_params, fwd, bwd)


@constructor
def global_max_pool() -> Layer[dict[str, Array], tuple[()], MaxPoolResiduals]:
    """[B, *spatial, C] -> [B, C]: the maximum over all spatial axes.

    Raises:
        InputError: if x is not floating or has no spatial axis.
    """

    def fwd(params: dict[str, Array], x: Array) -> tuple[Array, MaxPoolResiduals]:
        expect.float_array(x, rank=3)
        positions = x.reshape(x.shape[0], -1, x.shape[-1])
        offset = lax.argmax(positions, 1, jnp.int32)
        y = jnp.take_along_axis(positions, offset[:, None], axis=1)[:, 0]
        return y, MaxPoolResiduals(offset, _like(x))

    def bwd(params, residuals, dy, contract):
        shape, dtype = residuals.like.shape[:-1], residuals.like.dtype
        dy = expect.cotangent(dy, (shape[0], shape[-1]), dtype)
        position = jnp.arange(prod(shape[1:-1]), dtype=jnp.int32)[None, :, None]
        dx = jnp.where(position == residuals.offset[:, None], dy[:, None], jnp.zeros((), dtype))
        return {}, dx.reshape(shape)

    return stateless("global_max_pool", no_params, fwd, bwd)


@constructor
def global_avg_pool() -> Layer[dict[str, Array], tuple[()], Array]:
    """[B, *spatial, C] -> [B, C]: the mean over all spatial axes.

    Raises:
        InputError: if x is not floating or has no spatial axis.
    """

    def fwd(params: dict[str, Array], x: Array) -> tuple[Array, Array]:
        expect.float_array(x, rank=3)
        y = jnp.mean(x, axis=tuple(range(1, x.ndim - 1)), dtype=sum_dtype(x.dtype))
        return y.astype(x.dtype), _like(x)

    def bwd(params, like, dy, contract):
        shape = like.shape[:-1]
        dy = expect.cotangent(dy, (shape[0], shape[-1]), like.dtype)
        mean = (dy.astype(sum_dtype(dy.dtype)) / prod(shape[1:-1])).astype(dy.dtype)
        spread = mean.reshape(shape[0], *(1,) * (len(shape) - 2), shape[-1])
        return {}, jnp.broadcast_to(spread, shape)

    return stateless("global_avg_pool", no_params, fwd, bwd)


def _windows(window: Sizes, strides: Sizes | None, padding: Padding):
    """`sliding`, which refuses padding that could fill a whole window."""
    lay = sliding(window, window if strides is None else strides, padding)

    def over(x: Any) -> Windows:
        windows = lay(x)
        if any(max(pads) >= size for pads, size in zip(windows.padding, windows.window, strict=True)):
            received = f"padding {windows.padding} of windows {windows.window}"
            raise InputError("padding smaller than the window", received, "pad less, or pad the input itself")
        return windows

    return over


def _first_inside(windows: Windows) -> np.ndarray:
    """The offset of the first entry of each window that is not padding: [1, *outputs, 1]."""
    each = zip(windows.padding, windows.strides, windows.outputs, strict=True)
    first = [np.maximum(low - s * np.arange(n), 0) for (low, _), s, n in each]
    return np.ravel_multi_index(np.meshgrid(*first, indexing="ij"), windows.window)[None, ..., None]


def _pull(windows: Windows, dy: Array, like: Array, winner: Array | None = None) -> Array:
    """dx, where each window passes its dy to its winner, or without `winner` to all its entries."""
    padded = [low + i + high for i, (low, high) in zip(windows.inputs, windows.padding, strict=True)]
    blocks = [-(-p // s) for p, s in zip(padded, windows.strides, strict=True)]
    phase_axes = tuple(range(2, 2 * len(blocks) + 2, 2))
    dy = dy.astype(sum_dtype(dy.dtype))
    dx = jnp.zeros((), dy.dtype)

    def shifted(a: Array, shift: tuple[int, ...]) -> Array:
        """a[q - shift] for every block q, with axes of size one for the phases."""
        pads = [(m, q - n - m, 0) for m, q, n in zip(shift, blocks, windows.outputs, strict=True)]
        return jnp.expand_dims(lax.pad(a, np.zeros((), a.dtype), [(0, 0, 0), *pads, (0, 0, 0)]), phase_axes)

    for shift, offset in _shifts(windows):
        inside = offset < prod(windows.window)
        mask = jnp.asarray(inside) if winner is None else shifted(winner, shift) == jnp.asarray(offset, winner.dtype)
        dx = dx + jnp.where(mask, shifted(dy, shift), jnp.zeros((), dy.dtype))
    dx = dx.astype(like.dtype)
    joined = (q * s for q, s in zip(blocks, windows.strides, strict=True))
    dx = regrouped(dx, (dx.shape[0], *joined, dx.shape[-1]))
    starts = [low for low, _ in windows.padding]
    ends = [low + i for low, i in zip(starts, windows.inputs, strict=True)]
    return lax.slice(dx, (0, *starts, 0), (dx.shape[0], *ends, dx.shape[-1]))


def _shifts(windows: Windows) -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
    """Each shift m and the offsets p + s m of all phases p, [1, 1, s, 1, s, .., 1]; beyond the window, its size."""
    reach = [-(-k // s) for k, s in zip(windows.window, windows.strides, strict=True)]
    offsets = np.full([m * s for m, s in zip(reach, windows.strides, strict=True)], prod(windows.window))
    offsets[tuple(map(slice, windows.window))] = np.arange(prod(windows.window)).reshape(windows.window)
    phases = [size for s in windows.strides for size in (1, s)]
    for shift in np.ndindex(*reach):
        part = offsets[tuple(slice(m * s, m * s + s) for m, s in zip(shift, windows.strides, strict=True))]
        yield shift, part.reshape(1, *phases, 1)


def _like(x: Array) -> Array:
    """x's shape and dtype, without its values."""
    return jnp.zeros((*x.shape, 0), x.dtype)


def _template(like: Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(like.shape[:-1], like.dtype)


def _cotangent(dy: Any, windows: Windows, like: Array) -> Array:
    return expect.cotangent(dy, (like.shape[0], *windows.outputs, like.shape[-2]), like.dtype)
