"""Layers that only rearrange: their VJP is the inverse rearrangement.

    y = reshape(x, [B, *shape])        dx = reshape(dy, x.shape)

Residuals: x's shape, carried as a zero-size array [*x.shape, 0]: it is static under `jit` and takes no bytes.
"""

from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from funcnet._internal import expect
from funcnet._internal.errors import InputError, describe
from funcnet.layer import Layer, no_params, stateless
from funcnet.structure import constructor


@constructor
def reshape(*shape: int) -> Layer[dict, tuple[()], Array]:
    """[B, ..] -> [B, *shape]; the batch axis stays. One size may be -1. Integer inputs have the cotangent None.

    Raises:
        InputError: if an example has not as many entries as `shape`.
    """
    if not all(map(expect.is_whole, shape)):
        raise InputError("sizes as whole numbers", f"{shape}", "write reshape(2, 3)")
    shape = tuple(map(int, shape))
    if shape.count(-1) > 1 or any(size < -1 or size == 0 for size in shape):
        raise InputError("positive sizes, at most one of them -1", f"{shape}", "leave at most one size open")
    return _rearrange("reshape", shape)


@constructor
def flatten() -> Layer[dict, tuple[()], Array]:
    """[B, ..] -> [B, D], D the number of entries of an example. Integer inputs have the cotangent None."""
    return _rearrange("flatten", (-1,))


def _rearrange(name: str, shape: tuple[int, ...]) -> Layer:
    known = prod(size for size in shape if size != -1)

    def target(x: Any) -> tuple[int, ...]:
        if not expect.is_array(x):
            raise InputError("an array", describe(x), "convert it first, for instance with jnp.asarray")
        entries = prod(x.shape[1:])
        sizes = tuple(entries // known if size == -1 else size for size in shape)
        if x.ndim == 0 or x.size == 0 or prod(sizes) != entries:
            wanted = f"a batch of examples that fill the shape {list(shape)}"
            raise InputError(wanted, describe(x), "put the batch axis first and ask for as many entries")
        return (x.shape[0], *sizes)

    def fwd(params: dict, x: Any):
        shape = target(x)
        return x.reshape(shape), jnp.zeros((*x.shape, 0), x.dtype)

    def bwd(params, empty, dy, contract):
        if not expect.is_floating(empty):
            return {}, None
        x = jax.ShapeDtypeStruct(empty.shape[:-1], empty.dtype)
        return {}, expect.cotangent(dy, target(x), x.dtype).reshape(x.shape)

    return stateless(name, no_params, fwd, bwd)
