"""Arithmetic that all rules share: sums in float32 or wider, and operands of equal rank."""

from functools import reduce
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax


def sum_dtype(dtype: Any) -> Any:
    """The dtype to accumulate in: float32 for half precision, else the dtype itself."""
    return jnp.dtype(jnp.float32) if jnp.finfo(dtype).bits < 32 else jnp.dtype(dtype)


def wider(dtype: Any, than: Any) -> bool:
    """Whether one floating dtype has more bits than another."""
    return jnp.finfo(dtype).bits > jnp.finfo(than).bits


def added(*arrays: Array) -> Array:
    """Their sum, formed in the accumulation dtype and rounded once."""
    return reduce(jnp.add, [a.astype(sum_dtype(a.dtype)) for a in arrays]).astype(arrays[0].dtype)


def flat(x: Array) -> Array:
    """x [.., D] as a matrix [N, D]: XLA then needs no transposes around a contraction over the leading axes."""
    return x.reshape(-1, x.shape[-1])


def product(a: Array, b: Array, axes: tuple[int, int], like: Array) -> Array:
    """Axis `axes[0]` of `a` contracted with `axes[1]` of `b`, in the accumulation dtype and the sharding of `like`.

    Under a mesh with explicit axes a contraction over a sharded batch must state the sharding of its result.
    """
    dimensions = (((axes[0],), (axes[1],)), ((), ()))
    sharding = jax.typeof(like).sharding
    return lax.dot_general(a, b, dimensions, preferred_element_type=sum_dtype(a.dtype), out_sharding=sharding)


def contract_last(x: Array, kernel: Array, axis: int, like: Array | None = None) -> Array:
    """The last axis of x [.., D] with an axis of the kernel, as one matrix product, summed in the accumulation dtype.

    The result has the sharding of `like`, which has its shape, or else that of x, whose last axis is then not sharded.
    A sharded axis is not merged with one in front of it.
    """
    if any(jax.typeof(x).sharding.spec[1:-1]):
        return product(x, kernel, (x.ndim - 1, axis), x if like is None else like)
    y = product(flat(x), kernel, (1, axis), flat(x if like is None else like))
    return y.reshape(*x.shape[:-1], y.shape[-1])


def entries_of(shape: tuple[Any, ...]) -> int:
    """How many entries an array of this shape has, for a choice between alternatives that are all right.

    A symbolic size, which `jax.export` leaves open, counts as 32.
    """
    return prod(size if isinstance(size, int) else 32 for size in shape)


def in_front(v: Array, rank: int) -> Array:
    """v with leading axes of size one up to `rank`, since ranks are never promoted silently."""
    return v.reshape((1,) * (rank - v.ndim) + v.shape)


def whole(ids: Array) -> Array:
    """Integers of at least 32 bits, which can be compared with any size."""
    return ids if jnp.iinfo(ids.dtype).bits >= 32 else ids.astype(jnp.int32)


def pick(rows: Array, index: Array) -> Array:
    """rows [B, N, ..] at index [B, ..]: in the place of each index the row of the same example, zeros where it is N."""
    one = lambda rows, index: rows.at[index].get(mode="fill", fill_value=0, wrap_negative_indices=False)
    return jax.vmap(one)(rows, index)
