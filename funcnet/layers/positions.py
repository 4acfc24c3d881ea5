"""Encodings of positions.

    position_embedding     y[b, t] = x[b, t] + table[t]
    sinusoidal_positions   y[b, t] = x[b, t] + (sin a[t], cos a[t])            a[t, i] = t / base^(2 i / D)
    rotary                 (y_1, y_2) = (x_1 cos a - x_2 sin a, x_2 cos a + x_1 sin a), x_1 and x_2 the halves of x

Backward:

    position_embedding     dtable[t] = sum_b dy[b, t]          the factor Shift(dy)         dx = dy
    sinusoidal_positions                                                                    dx = dy
    rotary                 a rotation, so its transpose is its inverse:                     dx = rotary(dy, -positions)

With a side input `segments` [B, T], positions are counted from where a number begins, and are 0 where it is 0, for what
pads a row; the table is looked up by them, with the factor Gather.

Residuals: none but the segments.
Numerics: gradients are summed in float32 for half precision. Angles are computed in float32, or float64 for float64
inputs, so that in float32 the angle of position t is off by up to 6e-8 t.
Source: Gehring et al. 2017, arXiv:1705.03122 (learned); Vaswani et al. 2017, arXiv:1706.03762, section 3.5 (sines);
Su et al. 2021, arXiv:2104.09864 (rotary).
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.nn import initializers

from funcnet._internal import expect
from funcnet._internal.defaults import Default, Initializer
from funcnet._internal.errors import InputError, describe
from funcnet._internal.numerics import in_front, sum_dtype
from funcnet.gradients.common_factors import Gather, Shift
from funcnet.layer import Layer, no_params, stateless
from funcnet.layers.embedding import rows_of
from funcnet.structure import constructor


@constructor
def position_embedding(
    length: int, *, embedding_init: Initializer = Default(initializers.normal(0.02), "normal(0.02)")
) -> Layer[dict[str, Array], tuple[()], tuple[()]]:
    """x [.., T, D] plus a learned row for each position, T <= length; params embedding [length, D].

    The input may be a dict of x [B, T, D] and `segments`, integers [B, T] (`fn.packed`): positions are then counted
    from where a number begins, and no segment may be longer than length. Under `jit`, where that cannot be read,
    the row of a position that is too large is NaN.

    Args:
        length: the largest number of positions.
        embedding_init: as in `jax.nn.initializers`.

    Raises:
        InputError: if x is not floating, T > length, D is not the parameters', or its dtype is not theirs.
    """
    length = expect.count(length, "length")

    def check(x: Any, segments: Any = None) -> None:
        expect.float_array(x, rank=2)
        steps = x.shape[-2]
        if segments is not None and expect.is_concrete(segments):
            with jax.ensure_compile_time_eval():
                steps = 1 + int(np.max(np.asarray(positions_in(segments, steps)), initial=-1))
        if steps > length and (segments is None or expect.is_concrete(segments)):
            remedy = "ask for a greater length, or cut the input"
            raise InputError(
                f"at most {length} positions on the last axis but one", f"{steps} in {describe(x)}", remedy
            )

    def init(key: Array, inputs: Any) -> dict[str, Array]:
        x, segments = _segmented(inputs)
        check(x, segments)
        return {"embedding": embedding_init(expect.key(key), (length, x.shape[-1]), expect.dtype(x))}

    def fwd(params: dict[str, Array], inputs: Any) -> tuple[Array, Any]:
        x, segments = _segmented(inputs)
        check(x, segments)
        expect.fields(params, x.dtype, {"embedding": (length, x.shape[-1])})
        if segments is None:
            return x + in_front(params["embedding"][: x.shape[-2]], x.ndim), None
        return x + rows_of(params["embedding"], positions_in(segments, x.shape[-2])), segments

    def bwd(params, segments, dy, contract):
        table = params["embedding"]
        dy = jnp.asarray(dy)
        check(dy, segments)
        expect.fields(params, dy.dtype, {"embedding": (length, dy.shape[-1])})
        if segments is not None:
            factor = Gather(positions_in(segments, dy.shape[-2]), dy, length)
            return {"embedding": contract(factor, table)}, {"x": dy, "segments": None}
        unused = [(0, 0)] * (dy.ndim - 2) + [(0, length - dy.shape[-2]), (0, 0)]
        return {"embedding": contract(Shift(jnp.pad(dy, unused)), table)}, dy

    return stateless("position_embedding", init, fwd, bwd, reads=("segments",))


@constructor
def sinusoidal_positions(base: float = 1e4) -> Layer[dict, tuple[()], tuple[()]]:
    """x [.., T, D] plus the fixed waves of each position: D / 2 sines, then the D / 2 cosines of the same angles.

    Sines and cosines fill one half each, as in `rotary`; in the paper they alternate, the same features reordered.
    Where the input is a dict of x and `segments`, integers [B, T], positions are counted from 0 in each segment.

    Args:
        base: the longest wave spans 2 pi * base^((D - 2) / D) positions.

    Raises:
        InputError: if x is not floating, or D is odd.
    """
    base = a_base(base)

    def fwd(params: dict, inputs: Any) -> tuple[Array, Any]:
        x, segments = _segmented(inputs)
        expect.float_array(x, rank=2)
        positions = positions_in(segments, x.shape[-2])
        angles = _angles(positions[0] if segments is None else positions, x, base)
        waves = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1).astype(x.dtype)
        return x + in_front(waves, x.ndim), None if segments is None else jnp.zeros((0,), segments.dtype)

    def bwd(params, empty, dy, contract):
        expect.float_array(dy, rank=2)
        return {}, jnp.asarray(dy) if empty is None else {"x": jnp.asarray(dy), "segments": None}

    return stateless("sinusoidal_positions", no_params, fwd, bwd, reads=("segments",))


def rotary(x: Array, positions: Array, base: float = 1e4) -> Array:
    """Turn the pairs (x[.., i], x[.., i + D/2]) of x [.., D] by the angles position / base^(2 i / D).

    The inner product of two rows turned like this depends only on the difference of their positions. The VJP in x is
    the inverse rotation, `rotary(dy, -positions, base)`.

    Args:
        x: floating, D even.
        positions: of a signed dtype, with the axes of x but the last, of x's sizes or 1: [1, T, 1] for [B, T, H, D].
        base: the slowest pair turns by an angle of base^((2 - D) / D) per position.

    Raises:
        InputError: if x or positions are not as described.
    """
    expect.float_array(x)
    base = a_base(base)
    signed = expect.is_array(positions) and not jnp.issubdtype(positions.dtype, jnp.unsignedinteger)
    if not signed or not _broadcasts(positions.shape, x.shape[:-1]):
        wanted = f"signed positions with {x.ndim - 1} axes, of the sizes {list(x.shape[:-1])} or 1"
        raise InputError(wanted, describe(positions), "add axes of size 1, as in positions[None, :, None]")
    x = jnp.asarray(x)
    angles = _angles(jnp.asarray(positions), x, base)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = jnp.split(x.astype(angles.dtype), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def positions_in(segments: Array | None, steps: int) -> Array:
    """Positions counted from where a number of the segments [B, T] begins, 0 where it is 0: int32 [B, T].

    [1, T] without segments.
    """
    each = jnp.arange(steps, dtype=jnp.int32)[None]
    if segments is None:
        return each
    begins = jnp.concatenate([jnp.ones_like(segments[:, :1], bool), segments[:, 1:] != segments[:, :-1]], axis=1)
    return jnp.where(segments == 0, 0, each - lax.cummax(jnp.where(begins, each, 0), axis=1))


def _segmented(inputs: Any) -> tuple[Any, Any]:
    """x and its segments, None where there are none."""
    if not isinstance(inputs, dict):
        return inputs, None
    if inputs.keys() != {"x", "segments"}:
        raise InputError("an array, or a dict of x and segments", describe(inputs), "leave out the others")
    expect.sequences(inputs["x"])
    expect.segments(inputs["segments"], *inputs["x"].shape[:2])
    return inputs["x"], inputs["segments"]


def _angles(positions: Array, x: Array, base: float) -> Array:
    """position / base^(2 i / D) for the D / 2 pairs of x's features: positions [..] to [.., D / 2]."""
    features, dtype = x.shape[-1], sum_dtype(x.dtype)
    if features % 2:
        raise InputError("an even number of features on the last axis", describe(x), "they are taken in pairs")
    speed = jnp.asarray(base ** -(np.arange(0, features, 2) / features), dtype)
    return positions.astype(dtype)[..., None] * in_front(speed, positions.ndim + 1)


def _broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    return len(shape) == len(to) and all(a in (1, b) for a, b in zip(shape, to, strict=True))


def a_base(base: float, what: str = "base") -> float:
    base = expect.number(base, what)
    if not base > 1:
        raise InputError(f"a {what} greater than 1", f"{what}={base}", "use the default, 1e4")
    return base
