"""How arrays are sharded over a mesh, and what they vary over inside `jax.shard_map`.

Inside `jax.shard_map` the axes of the mesh that an array varies over are a part of its type. A replicated parameter
varies over none, and its gradient there is the device's own share, which varies as the batch does: the caller sums it
over the devices, with `jax.lax.psum`. `fn.differentiable` takes this sum itself, as `jax.grad` does.
"""

import operator
from collections.abc import Callable
from math import prod
from typing import Any

import jax
from jax import Array, lax
from jax.sharding import NamedSharding


def sharded_as(x: Array, axes: int) -> NamedSharding:
    """A sharding on the mesh of x: the first `axes` axes are sharded as those of x are, and no others."""
    sharding = jax.typeof(x).sharding
    return NamedSharding(sharding.mesh, jax.P(*sharding.spec[:axes]))


def regrouped(x: Array, shape: tuple[int, ...]) -> Array:
    """x [B, ..] in another shape [B, ..] or [B T, ..], of which only the first axis is sharded, as that of x is."""
    return x.reshape(shape, out_sharding=sharded_as(x, 1))


def shards(x: Array) -> int:
    """The number of shards of the first axis over explicit axes of a mesh."""
    sharding = jax.typeof(x).sharding
    axes = sharding.spec[0] or ()
    return prod(sharding.mesh.shape[axis] for axis in (axes if isinstance(axes, tuple) else (axes,)))


def placed(a: Array, like: Array) -> Array:
    """`a` in the sharding of `like`; under a mesh without explicit axes, `a` itself."""
    sharding = jax.typeof(like).sharding
    return a if jax.typeof(a).sharding == sharding else jax.sharding.reshard(a, sharding)


def varies(*trees: Any) -> tuple[Any, ...]:
    """The axes of a mesh that anything in these trees varies over, in the mesh's order; none outside `shard_map`."""
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.manual_axes:
        return ()
    axes = {axis for leaf in jax.tree.leaves(trees) for axis in jax.typeof(leaf).manual_axis_type.varying}
    return tuple(axis for axis in mesh.axis_names if axis in axes)


def varying(tree: Any, axes: tuple[Any, ...]) -> Any:
    """The tree with the same values, typed as varying over these axes too."""

    def one(leaf: Any) -> Any:
        more = tuple(axis for axis in axes if axis not in varies(leaf))
        return lax.pcast(leaf, more, to="varying") if more else leaf

    return jax.tree.map(one, tree)


def lasting(step: Callable[[Any], Any], carry: Any) -> Any:
    """A loop's initial carry, in the type that it keeps: varying over the axes that a step makes it vary over.

    A carry that starts as a constant varies over no axis of a mesh, but after a step it varies as the input does.
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
