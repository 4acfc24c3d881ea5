"""Several arrays joined into one, as after `branch` or `parallel`.

    concat     y = [x_1, .., x_n] along an axis        dx_i = the part of dy where x_i lies
    add        y = x_1 + .. + x_n                      dx_i = dy

Residuals: the shapes of the x_i, carried as zero-size arrays [*x_i.shape, 0], static under `jit` and without bytes.
Numerics: sums in float32 for half precision.
"""

from itertools import accumulate, pairwise
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from funcnet._internal import expect
from funcnet._internal.errors import InputError, describe
from funcnet._internal.numerics import added
from funcnet.layer import Layer, no_params, stateless
from funcnet.structure import constructor


@constructor
def concat(axis: int = -1) -> Layer[dict, tuple[()], tuple[Array, ...]]:
    """(x_1, .., x_n) -> one array, along an axis other than the batch axis; the other sizes and the dtype are equal.

    Args:
        axis: counted from the front or, negative, from the back.

    Raises:
        InputError: if x is no tuple of such arrays, or the axis is the batch axis or none of theirs.
    """
    if not expect.is_whole(axis) or int(axis) == 0:
        raise InputError("an axis as a whole number, not that of the batch", repr(axis), "use -1 for the features")
    axis = int(axis)

    def place(xs: Any) -> int:
        """The axis, counted from the front."""
        first = _arrays(xs)
        at = axis % first.ndim if -first.ndim <= axis < first.ndim else 0
        if at == 0:
            raise InputError(
                f"arrays with an axis {axis} behind that of the batch", describe(xs), "choose one they have"
            )
        rest = {x.shape[:at] + x.shape[at + 1 :] for x in xs}
        if len(rest) > 1:
            raise InputError(f"sizes that differ along axis {axis} alone", describe(xs), "bring the others to one size")
        return at

    def fwd(params: dict, xs: tuple[Array, ...]) -> tuple[Array, tuple[Array, ...]]:
        at = place(xs)
        return jnp.concatenate(xs, axis=at), _empty(xs)

    def bwd(params, empty, dy, contract):
        shapes = [each.shape[:-1] for each in empty]
        at = axis % len(shapes[0])
        ends = list(accumulate((shape[at] for shape in shapes), initial=0))
        whole = (*shapes[0][:at], ends[-1], *shapes[0][at + 1 :])
        dy = expect.cotangent(dy, whole, empty[0].dtype)
        return {}, tuple(lax.slice_in_dim(dy, *both, axis=at) for both in pairwise(ends))

    return stateless("concat", no_params, fwd, bwd, positionwise=axis == -1)


@constructor
def add() -> Layer[dict, tuple[()], tuple[Array, ...]]:
    """(x_1, .., x_n) -> their sum; all of one shape and dtype.

    Raises:
        InputError: if x is no tuple of such arrays.
    """

    def fwd(params: dict, xs: tuple[Array, ...]) -> tuple[Array, tuple[Array, ...]]:
        first = _arrays(xs)
        if any(x.shape != first.shape for x in xs):
            raise InputError("arrays of one shape", describe(xs), "bring them to one shape; nothing is broadcast")
        return added(*xs), _empty(xs)

    def bwd(params, empty, dy, contract):
        return {}, (expect.cotangent(dy, empty[0].shape[:-1], empty[0].dtype),) * len(empty)

    return stateless("add", no_params, fwd, bwd, positionwise=True)


def _empty(xs: tuple[Array, ...]) -> tuple[Array, ...]:
    return tuple(jnp.zeros((*x.shape, 0), x.dtype) for x in xs)


def _arrays(xs: Any) -> Any:
    """The first of the arrays; refuses what is no tuple of floating arrays of one rank and dtype."""
    if not isinstance(xs, tuple) or not xs:
        raise InputError("a tuple of arrays", describe(xs), "put it after branch(..) or parallel(..), or write (a, b)")
    for x in xs:
        expect.float_array(x)
    if len({(x.ndim, x.dtype) for x in xs}) > 1:
        raise InputError("arrays of one rank and one dtype", describe(xs), "convert them; nothing is cast or broadcast")
    return xs[0]
