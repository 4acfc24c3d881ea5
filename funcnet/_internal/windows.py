"""Where windows lie on the axes between the batch and the channels: what pools and convolutions have in common.

    outputs = (low + inputs + high - span) // stride + 1        span = (size - 1) * dilation + 1

Padding is "VALID" (none), "SAME" (outputs = ceil(inputs / stride), with an odd pad at the end), a number for both ends
of every axis, or one pair (low, high) for each axis.

A transposed convolution exchanges the roles: its windows lie on its output, one for each entry of its input. Its
padding is as in Flax and `lax.conv_transpose`: zeros around the input, once stride - 1 zeros are between its entries:

    outputs = (inputs - 1) * stride + 1 + low + high - (span - 1)

"SAME" pads so that outputs = inputs * stride, "VALID" so that nothing is cut off: outputs = inputs * stride +
max(span - stride, 0).
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax import Array, lax

from funcnet._internal import expect
from funcnet._internal.errors import InputError, describe

Sizes = int | Sequence[int]
Padding = str | int | Sequence[tuple[int, int]]


class Windows(NamedTuple):
    """The windows on one input; every field has one entry for each spatial axis.

    Attributes:
        inputs, outputs: sizes of the input and of the output.
        window: entries of a window.
        strides: from one window to the next.
        padding: pairs (low, high).
        dilation: from one entry of a window to the next.
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    window: tuple[int, ...]
    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]


def sliding(window: Sizes, strides: Sizes, padding: Padding, dilation: Sizes = 1) -> Callable[[Any], Windows]:
    """A function that lays the windows over x [B, *spatial, C]; an option is one for all axes, or has one for each.

    Raises:
        InputError: at once for invalid options, later for an input that they do not fit.
    """
    return _laying(_laid_over, window, strides, padding, dilation)


def spreading(window: Sizes, strides: Sizes, padding: Padding, dilation: Sizes = 1) -> Callable[[Any], Windows]:
    """The same for a transposed convolution of x: the windows lie on its output, which takes the place of `inputs`."""
    return _laying(_laid_under, window, strides, padding, dilation)


def entries(windows: Windows, x: Any, fill: float = 0) -> Iterator[Array]:
    """For each offset in a window, row by row, the entries of all windows at that offset: [B, *outputs, C]."""
    x = lax.pad(x, np.asarray(fill, x.dtype), [(0, 0, 0), *((*pads, 0) for pads in windows.padding), (0, 0, 0)])
    for offset in np.ndindex(*windows.window):
        starts = [o * d for o, d in zip(offset, windows.dilation, strict=True)]
        ends = [a + (n - 1) * s + 1 for a, n, s in zip(starts, windows.outputs, windows.strides, strict=True)]
        yield lax.slice(x, (0, *starts, 0), (x.shape[0], *ends, x.shape[-1]), (1, *windows.strides, 1))


def _laying(
    lay: Callable, window: Sizes, strides: Sizes, padding: Padding, dilation: Sizes
) -> Callable[[Any], Windows]:
    options = {"window": window, "strides": strides, "dilation": dilation}
    options = {what: _sizes(value, what) for what, value in options.items()} | {"padding": _padding(padding)}
    axes = {what: len(value) for what, value in options.items() if isinstance(value, tuple)}
    if len(set(axes.values())) > 1:
        received = ", ".join(f"{what} for {n}" for what, n in axes.items())
        raise InputError("options for the same number of axes", received, "give a number for all axes, or one for each")

    def over(x: Any) -> Windows:
        expect.float_array(x, rank=3)
        n = x.ndim - 2
        if {n} != set(axes.values()) | {n}:
            wanted = f"an input [B, *spatial, C] of {next(iter(axes.values()))} spatial axes"
            raise InputError(wanted, describe(x), f"give {' and '.join(axes)} one entry for each axis between B and C")
        size, step, gap = (_each(options[what], n) for what in ("window", "strides", "dilation"))
        return lay(x, size, step, gap, options["padding"])

    return over


def _laid_over(x: Any, window: tuple, strides: tuple, dilation: tuple, padding: Any) -> Windows:
    inputs = tuple(x.shape[1:-1])
    span = [(k - 1) * d + 1 for k, d in zip(window, dilation, strict=True)]
    padding = _pads(padding, inputs, span, strides)
    room = [low + i + high - s for i, s, (low, high) in zip(inputs, span, padding, strict=True)]
    if min(room) < 0:
        wanted = f"an input that a window over {span} fits in"
        raise InputError(wanted, describe(x), 'take a smaller window, or padding="SAME"')
    outputs = tuple(r // s + 1 for r, s in zip(room, strides, strict=True))
    return Windows(inputs, outputs, window, strides, padding, dilation)


def _laid_under(x: Any, window: tuple, strides: tuple, dilation: tuple, padding: Any) -> Windows:
    """The windows on the output: a padding of p around the input is a padding of span - 1 - p around the output."""
    span = [(k - 1) * d + 1 for k, d in zip(window, dilation, strict=True)]
    if padding in ("SAME", "VALID"):
        missing = [k + s - 2 + (padding == "VALID") * max(k - s, 0) for k, s in zip(span, strides, strict=True)]
        whole = [padding == "VALID" or s > k - 1 for k, s in zip(span, strides, strict=True)]
        lows = [k - 1 if w else -(-m // 2) for k, m, w in zip(span, missing, whole, strict=True)]
        padding = tuple((low, m - low) for low, m in zip(lows, missing, strict=True))
    elif isinstance(padding, int):
        padding = ((padding, padding),) * len(span)
    inputs = tuple(x.shape[1:-1])
    each = zip(inputs, strides, span, padding, strict=True)
    outputs = tuple((i - 1) * s + 1 + low + high - (k - 1) for i, s, k, (low, high) in each)
    if min(outputs) < 1:
        wanted = f"an input that is larger than a window over {span}, with its padding"
        raise InputError(wanted, describe(x), 'pad more, or take padding="VALID", which keeps all of the output')
    pads = tuple((k - 1 - low, k - 1 - high) for k, (low, high) in zip(span, padding, strict=True))
    return Windows(outputs, inputs, window, strides, pads, dilation)


def _pads(padding: Any, inputs: tuple, span: Sequence[int], strides: tuple) -> tuple[tuple[int, int], ...]:
    if padding == "VALID":
        return ((0, 0),) * len(inputs)
    if padding == "SAME":
        missing = [max(0, (i - 1) // s * s + k - i) for i, k, s in zip(inputs, span, strides, strict=True)]
        return tuple((m // 2, m - m // 2) for m in missing)
    return ((padding, padding),) * len(inputs) if isinstance(padding, int) else padding


def _each(value: int | tuple[int, ...], n: int) -> tuple[int, ...]:
    return value if isinstance(value, tuple) else (value,) * n


def _sizes(value: Any, what: str) -> int | tuple[int, ...]:
    if not isinstance(value, (tuple, list)):
        return expect.count(value, what)
    if not value:
        raise InputError(f"{what} for at least one axis", repr(value), "give one number, or one for each axis")
    return tuple(expect.count(entry, what) for entry in value)


def _padding(value: Any) -> Any:
    """A name, a number, or a tuple of pairs."""
    if isinstance(value, str) and value.upper() in ("SAME", "VALID"):
        return value.upper()
    if _natural(value):
        return int(value)
    pairs = value if isinstance(value, (tuple, list)) else ()
    if pairs and all(isinstance(pair, (tuple, list)) and len(pair) == 2 and all(map(_natural, pair)) for pair in pairs):
        return tuple((int(low), int(high)) for low, high in pairs)
    wanted = 'padding "SAME", "VALID", a number of 0 or more, or one pair (low, high) of such for each axis'
    raise InputError(wanted, repr(value), "write padding=((1, 1), (0, 2)) for two axes")


def _natural(value: Any) -> bool:
    return expect.is_whole(value) and int(value) >= 0
