"""Arithmetic as all rules do it: sums in float32 or wider, ranks that are equal, results that lie where they belong.

Inside `jax.shard_map` the axes of the mesh that an array varies over are a part of its type. A replicated parameter
varies over none, and its gradient there is the device's own share, which varies as the batch does: the sum over the
devices is for the caller to make, with `jax.lax.psum`. `fn.differentiable` makes it, as `jax.grad` does.
"""

import operator
from collections.abc import Callable
from functools import reduce
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import NamedSharding


def wide(dtype: Any) -> Any:
    """The dtype to accumulate in: float32 for half precision, else the dtype itself."""
    return jnp.dtype(jnp.float32) if jnp.finfo(dtype).bits < 32 else jnp.dtype(dtype)


def wider(dtype: Any, than: Any) -> bool:
    """Whether one floating dtype has more bits than another."""
    return jnp.finfo(dtype).bits > jnp.finfo(than).bits


def added(*arrays: Array) -> Array:
    """Their sum, made wide and rounded once."""
    return reduce(jnp.add, [a.astype(wide(a.dtype)) for a in arrays]).astype(arrays[0].dtype)


def flat(x: Array) -> Array:
    """x [.., D] as a matrix [N, D]: XLA then needs no transposes around a contraction over the leading axes."""
    return x.reshape(-1, x.shape[-1])


def product(a: Array, b: Array, axes: tuple[int, int], like: Array) -> Array:
    """Contract axis `axes[0]` of `a` with `axes[1]` of `b`, summed wide, in the sharding of `like`.

    Under a mesh with explicit axes a contraction over a sharded batch must say how its result lies.
    """
    dimensions = (((axes[0],), (axes[1],)), ((), ()))
    sharding = jax.typeof(like).sharding
    return lax.dot_general(a, b, dimensions, preferred_element_type=wide(a.dtype), out_sharding=sharding)


def contract_last(x: Array, kernel: Array, axis: int, like: Array | None = None) -> Array:
    """The last axis of x [.., D] with an axis of the kernel, as one matrix product, summed wide.

    The result lies as `like` does, which has its shape; or as x, whose last axis is then not cut. An axis that is cut
    is not merged with one in front of it.
    """
    if any(jax.typeof(x).sharding.spec[1:-1]):
        return product(x, kernel, (x.ndim - 1, axis), x if like is None else like)
    y = product(flat(x), kernel, (1, axis), flat(x if like is None else like))
    return y.reshape(*x.shape[:-1], y.shape[-1])


def cut_as(x: Array, axes: int) -> NamedSharding:
    """How an array lies on the mesh of x whose first `axes` axes are cut as those of x are, and no others."""
    sharding = jax.typeof(x).sharding
    return NamedSharding(sharding.mesh, jax.P(*sharding.spec[:axes]))


def regrouped(x: Array, shape: tuple[int, ...]) -> Array:
    """x [B, ..] in another shape [B, ..] or [B T, ..], cut along its first axis alone, as x is."""
    return x.reshape(shape, out_sharding=cut_as(x, 1))


def pieces(x: Array) -> int:
    """Into how many pieces explicit axes of a mesh cut the first axis."""
    sharding = jax.typeof(x).sharding
    axes = sharding.spec[0] or ()
    return prod(sharding.mesh.shape[axis] for axis in (axes if isinstance(axes, tuple) else (axes,)))


def placed(a: Array, like: Array) -> Array:
    """`a` in the sharding of `like`; under a mesh without explicit axes, `a` itself."""
    sharding = jax.typeof(like).sharding
    return a if jax.typeof(a).sharding == sharding else jax.sharding.reshard(a, sharding)


def entries_of(shape: tuple[Any, ...]) -> int:
    """How many entries such an array has, as a number to choose by where any choice is right.

    A symbolic size, which `jax.export` leaves open, counts as 32.
    """
    return prod(size if isinstance(size, int) else 32 for size in shape)


def varies(*trees: Any) -> tuple[Any, ...]:
    """The axes of a mesh that anything in these trees varies over, in the mesh's order; none outside `shard_map`."""
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.manual_axes:
        return ()
    axes = {axis for leaf in jax.tree.leaves(trees) for axis in jax.typeof(leaf).manual_axis_type.varying}
    return tuple(axis for axis in mesh.axis_names if axis in axes)


def varying(tree: Any, axes: tuple[Any, ...]) -> Any:
    """The same values, which vary over these axes too."""

    def one(leaf: Any) -> Any:
        more = tuple(axis for axis in axes if axis not in varies(leaf))
        return lax.pcast(leaf, more, to="varying") if more else leaf

    return jax.tree.map(one, tree)


def lasting(step: Callable[[Any], Any], carry: Any) -> Any:
    """The carry that a loop starts with, in the type that it keeps: varying over what a step makes it vary over.

    A carry that starts as a constant varies over no axis of a mesh, and after a step as the input does.
    """
    if not jax.sharding.get_abstract_mesh().manual_axes:
        return carry
    grown = jax.tree.map(lambda leaf, after: varying(leaf, varies(after)), carry, jax.eval_shape(step, carry))
    unchanged = map(operator.is_, jax.tree.leaves(grown), jax.tree.leaves(carry))
    return carry if all(unchanged) else lasting(step, grown)


def scan(body: Callable[[Any, Any], tuple[Any, Any]], carry: Any, each: Any, **options: Any) -> tuple[Any, Any]:
    """`lax.scan`, whose carry may start as a constant inside `jax.shard_map` too."""
    first = lambda carry: body(carry, jax.tree.map(lambda a: a[0], each))[0]
    return lax.scan(body, lasting(first, carry), each, **options)


def in_front(v: Array, rank: int) -> Array:
    """v with leading axes of size one up to `rank`, since ranks are never promoted silently."""
    return v.reshape((1,) * (rank - v.ndim) + v.shape)


def whole(ids: Array) -> Array:
    """Integers of at least 32 bits, which can be compared with any size."""
    return ids if jnp.iinfo(ids.dtype).bits >= 32 else ids.astype(jnp.int32)
