"""An order of computation that the compiler has to keep."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from funcnet._internal.expect import is_floating

Tree = Any


def after(done: Tree, x: Tree) -> Tree:
    """x, bit for bit, but made to depend on `done`, so that what is computed from x is computed after it.

    Only subnormal numbers, which compilers may flush to 0, can change.

    An optimization barrier is meant for this, but XLA's CPU compiler drops it before it merges equal computations
    (jaxlib 0.10.2). No compiler may drop 0 * d for an unknown d, which could be infinite; the guard keeps an infinite d
    from becoming NaN. Where `done` has no floating array, or x holds booleans or keys, nothing is ordered.
    """
    numbers = [_number(jnp.asarray(leaf)) for leaf in jax.tree.leaves(done) if is_floating(leaf) and leaf.size]
    if not numbers:
        return x
    d = sum(numbers)
    zero = 0 * jnp.where(jnp.isfinite(d), d, 0.0)

    def tied(leaf):
        if is_floating(leaf):
            return leaf * (1 + zero).astype(leaf.dtype)
        return leaf + zero.astype(leaf.dtype) if jnp.issubdtype(leaf.dtype, jnp.integer) else leaf

    return jax.tree.map(tied, x)


def _number(leaf: Array) -> Array:
    """A float32 that depends on leaf: its first entry, or its sum if it is sharded over explicit axes of a mesh."""
    cut = any(axis is not None for axis in jax.typeof(leaf).sharding.spec)
    return (jnp.sum(leaf) if cut else leaf.reshape(-1)[0]).astype(jnp.float32)
