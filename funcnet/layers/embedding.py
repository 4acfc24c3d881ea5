"""Embeddings: rows of a table looked up by ids, and encodings of positions.

    embedding              y[b, t] = table[ids[b, t]]
    position_embedding     y[b, t] = x[b, t] + table[t]
    sinusoidal_positions   y[b, t] = x[b, t] + (sin a[t], cos a[t])            a[t, i] = t / base^(2 i / D)
    rotary                 (y_1, y_2) = (x_1 cos a - x_2 sin a, x_2 cos a + x_1 sin a), x_1 and x_2 the halves of x

Backward:

    embedding              dtable[v] = sum_bt [ids[b, t] = v] dy[b, t]         the factor Gather(ids, dy); dids is None
                           0 for a padding row, which is looked up as a constant
    position_embedding     dtable[t] = sum_b dy[b, t]                          the factor Shift(dy);       dx = dy
    sinusoidal_positions                                                                                   dx = dy
    rotary                 a rotation, so its transpose is its inverse:        dx = rotary(dy, -positions)

Residuals: ids for `embedding`, none for the others.
Numerics: gradients are summed in float32 for half precision. Angles are computed in float32, or float64 for float64
inputs, so that in float32 the angle of position t is off by up to 6e-8 t.
Source: Gehring et al. 2017, arXiv:1705.03122 (learned); Vaswani et al. 2017, arXiv:1706.03762, section 3.5 (sines);
Su et al. 2021, arXiv:2104.09864 (rotary).
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.nn import initializers

from funcnet._internal import expect
from funcnet._internal.defaults import Default, Initializer
from funcnet._internal.expect import InputError, describe
from funcnet._internal.numerics import in_front, sum_dtype, whole
from funcnet._internal.sharding import sharded_as
from funcnet.gradients.common_factors import Gather, Shift
from funcnet.layer import Layer, no_params, stateless
from funcnet.structure import constructor

_UNIT_ROWS = Default(
    initializers.variance_scaling(1.0, "fan_in", "normal", out_axis=0),
    'variance_scaling(1.0, "fan_in", "normal", out_axis=0)',
)


@constructor
def embedding(
    vocab: int,
    features: int,
    *,
    embedding_init: Initializer = _UNIT_ROWS,
    dtype: Any = jnp.float32,
    padding_id: int | None = None,
) -> Layer[dict[str, Array], tuple[()], Array]:
    """The rows [.., D] of a table for integer ids [..], any rank and any integer dtype; params embedding [V, D].

    With `fn.rows` as the contraction the gradient is its touched rows alone (`fn.Rows`).

    Args:
        vocab: V, the number of rows.
        features: D, the size of a row.
        embedding_init: as in `jax.nn.initializers`. The default draws rows of length 1 or so: std = sqrt(1 / D).
        dtype: of the table; it cannot be read from the ids.
        padding_id: an id whose row starts as zeros and, being a constant here, has no gradient, as PyTorch's
            `padding_idx`. Where the table is a head's kernel too (`fn.tied`), its row has the head's gradient.

    Raises:
        expect.InputError: if padding_id is no id, x is not of integers, or one of them is not in [0, V). Under `jit`,
            where they cannot be read, the row of an id out of range is NaN, and its cotangent is dropped.
    """
    shape = expect.count(vocab, "vocab"), expect.count(features, "features")
    pads = _padding(padding_id, shape[0])

    def init(key: Array, x: Any) -> dict[str, Array]:
        _ids(x, shape[0])
        table = embedding_init(expect.key(key), shape, dtype)
        return {"embedding": table if pads is None else table.at[pads].set(0)}

    def fwd(params: dict[str, Array], x: Array) -> tuple[Array, Array]:
        _ids(x, shape[0])
        _table(params, shape)
        ids = whole(x)
        y = _rows(params["embedding"], ids)
        return y if pads is None else jnp.where((ids == pads)[..., None], lax.stop_gradient(y), y), ids

    def bwd(params, ids, dy, contract):
        table = _table(params, shape)
        dy = expect.cotangent(dy, (*ids.shape, shape[1]), table.dtype)
        learning = ids if pads is None else jnp.where(ids == pads, shape[0], ids)  # an id out of range adds nothing
        return {"embedding": contract(Gather(learning, dy, shape[0]), table)}, None

    return stateless("embedding", init, fwd, bwd)


@constructor
def position_embedding(
    length: int, *, embedding_init: Initializer = Default(initializers.normal(0.02), "normal(0.02)")
) -> Layer[dict[str, Array], tuple[()], tuple[()]]:
    """x [.., T, D] plus a learned row for each position, T <= length; params embedding [length, D].

    Args:
        length: the largest number of positions.
        embedding_init: as in `jax.nn.initializers`.

    Raises:
        expect.InputError: if x is not floating, T > length, D is not the parameters', or its dtype is not theirs.
    """
    length = expect.count(length, "length")

    def check(x: Any) -> None:
        expect.float_array(x, rank=2)
        if x.shape[-2] > length:
            remedy = "ask for a greater length, or cut the input"
            raise InputError(f"at most {length} positions on the last axis but one", describe(x), remedy)

    def init(key: Array, x: Any) -> dict[str, Array]:
        check(x)
        return {"embedding": embedding_init(expect.key(key), (length, x.shape[-1]), expect.dtype(x))}

    def fwd(params: dict[str, Array], x: Array) -> tuple[Array, tuple[()]]:
        check(x)
        expect.fields(params, x.dtype, {"embedding": (length, x.shape[-1])})
        return x + in_front(params["embedding"][: x.shape[-2]], x.ndim), ()

    def bwd(params, residuals, dy, contract):
        table = params["embedding"]
        dy = jnp.asarray(dy)
        check(dy)
        expect.fields(params, dy.dtype, {"embedding": (length, dy.shape[-1])})
        unused = [(0, 0)] * (dy.ndim - 2) + [(0, length - dy.shape[-2]), (0, 0)]
        return {"embedding": contract(Shift(jnp.pad(dy, unused)), table)}, dy

    return stateless("position_embedding", init, fwd, bwd)


@constructor
def sinusoidal_positions(base: float = 1e4) -> Layer[dict, tuple[()], tuple[()]]:
    """x [.., T, D] plus the fixed waves of each position: D / 2 sines, then the D / 2 cosines of the same angles.

    Sines and cosines fill one half each, as in `rotary`; in the paper they alternate, the same features reordered.

    Args:
        base: the longest wave spans 2 pi * base^((D - 2) / D) positions.

    Raises:
        expect.InputError: if x is not floating, or D is odd.
    """
    base = a_base(base)

    def fwd(params: dict, x: Array) -> tuple[Array, tuple[()]]:
        expect.float_array(x, rank=2)
        angles = _angles(jnp.arange(x.shape[-2]), x, base)
        waves = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1).astype(x.dtype)
        return x + in_front(waves, x.ndim), ()

    def bwd(params, residuals, dy, contract):
        expect.float_array(dy, rank=2)
        return {}, jnp.asarray(dy)

    return stateless("sinusoidal_positions", no_params, fwd, bwd)


def rotary(x: Array, positions: Array, base: float = 1e4) -> Array:
    """Turn the pairs (x[.., i], x[.., i + D/2]) of x [.., D] by the angles position / base^(2 i / D).

    The inner product of two rows turned like this depends only on the difference of their positions. The VJP in x is
    the inverse rotation, `rotary(dy, -positions, base)`.

    Args:
        x: floating, D even.
        positions: of a signed dtype, with the axes of x but the last, of x's sizes or 1: [1, T, 1] for [B, T, H, D].
        base: the slowest pair turns by an angle of base^((2 - D) / D) per position.

    Raises:
        expect.InputError: if x or positions are not as described.
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


def _angles(positions: Array, x: Array, base: float) -> Array:
    """position / base^(2 i / D) for the D / 2 pairs of x's features: positions [..] to [.., D / 2]."""
    features, dtype = x.shape[-1], sum_dtype(x.dtype)
    if features % 2:
        raise InputError("an even number of features on the last axis", describe(x), "they are taken in pairs")
    speed = jnp.asarray(base ** -(np.arange(0, features, 2) / features), dtype)
    return positions.astype(dtype)[..., None] * in_front(speed, positions.ndim + 1)


def _rows(table: Array, ids: Array) -> Array:
    """table[ids], NaN for an id out of range; a lookup by sharded ids must name the result's sharding: that of ids."""
    return (
        jnp.asarray(table)
        .at[ids]
        .get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False, out_sharding=sharded_as(ids, ids.ndim))
    )


def _ids(x: Any, vocab: int) -> None:
    """Refuse what is not integers and, where they can be read, an id out of range."""
    if not expect.is_array(x) or not jnp.issubdtype(x.dtype, jnp.integer):
        raise InputError("integer ids", describe(x), "convert them, for instance with jnp.asarray(x, jnp.int32)")
    if not expect.is_concrete(x):
        return
    ids = np.asarray(x)
    if (bad := (ids < 0) | (ids >= vocab)).any():
        remedy = "correct the ids, or ask for a larger vocab"
        raise InputError(f"ids from 0 to {vocab - 1}", expect.first_of("id", bad, ids), remedy)


def _padding(padding_id: Any, vocab: int) -> int | None:
    """`padding_id` if it is an id, or None."""
    if padding_id is None:
        return None
    if not expect.is_whole(padding_id) or not 0 <= int(padding_id) < vocab:
        remedy = "give the id that pads; counted from the end, as PyTorch takes it, -1 is vocab - 1"
        raise InputError(f"a padding_id from 0 to {vocab - 1}, or None", repr(padding_id), remedy)
    return int(padding_id)


def _table(params: Any, shape: tuple[int, int]) -> Array:
    """The table among the parameters, of any floating dtype."""
    given: Any = params.get("embedding") if isinstance(params, dict) else None
    expect.fields(params, given.dtype if expect.is_floating(given) else jnp.dtype(jnp.float32), {"embedding": shape})
    return params["embedding"]


def _broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    return len(shape) == len(to) and all(a in (1, b) for a, b in zip(shape, to, strict=True))


def a_base(base: float, what: str = "base") -> float:
    base = expect.number(base, what)
    if not base > 1:
        raise InputError(f"a {what} greater than 1", f"{what}={base}", "use the default, 1e4")
    return base
