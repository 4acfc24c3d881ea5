"""The last axis of a parameter in blocks of one size, for a parameter whose gradient is not to be formed whole.

The last block ends where the axis does, and so may begin inside the one before it; entries of both belong to that one.
"""

import jax.numpy as jnp
from jax import Array, lax


def blocks(param: Array, size: int) -> Array:
    """The indices of the blocks of the last axis."""
    return jnp.arange(-(-param.shape[-1] // size))


def block(param: Array, i: Array, size: int) -> Array:
    """Block i of the last axis; the last one ends where the axis does, and may begin inside the one before it."""
    return lax.dynamic_slice_in_dim(param, jnp.minimum(i * size, param.shape[-1] - size), size, -1)


def add_block(param: Array, a: Array, i: Array, size: int) -> Array:
    """`param` with `a` added to its block i."""
    start = jnp.minimum(i * size, param.shape[-1] - size)
    return lax.dynamic_update_slice_in_dim(param, block(param, i, size) + a, start, -1)


def fresh(i: Array, size: int, of: int) -> tuple[Array, Array]:
    """The entries of block i of an axis of length `of`, and whether each is in no block before it."""
    entries = jnp.minimum(i * size, of - size) + jnp.arange(size)
    return entries, entries >= i * size


def joined(answers: Array, param: Array) -> Array:
    """Blocks [n, .., size] as one array [.., V]; of the last block only the entries not in the one before it."""
    n, size = answers.shape[0], answers.shape[-1]
    first = jnp.moveaxis(answers[:-1], 0, -2).reshape(*answers.shape[1:-1], (n - 1) * size)
    return jnp.concatenate([first, answers[-1][..., n * size - param.shape[-1] :]], axis=-1)
