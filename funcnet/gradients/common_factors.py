"""The factors of the usual uses of a parameter in layers, each with its formula.

With b over examples and t over positions (every axis between the first and the parameter's own):

    Outer(x, dy)       dL/dkernel[i, j] = sum_bt x[b, t, i] dy[b, t, j]
    Shift(dy)          dL/dbias[j]      = sum_bt dy[b, t, j]
    Scale(x_hat, dy)   dL/dscale[j]     = sum_bt x_hat[b, t, j] dy[b, t, j]
    Gather(ids, dy)    dL/dtable[v, j]  = sum_bt [ids[b, t] = v] dy[b, t, j]
    Window(x, dy)      dL/dkernel[o, i, j] = sum_bt x[b, s t + o, i] dy[b, t, j]        s the stride; also transposed
    Sum(factors)       the sum of their gradients, for a parameter that is used several times

Sums run in float32 for half-precision inputs.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from funcnet._internal.numerics import entries_of, flat, product, sum_dtype, whole
from funcnet._internal.sharding import placed, sharded_as
from funcnet._internal.windows import Windows
from funcnet.gradients.correlation import correlation, correlation_by_taps
from funcnet.gradients.factor import Factor, wide_examples
from funcnet.gradients.gram import squared_norms


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Outer(Factor):
    """x [B, .., D] and dy [B, .., F] of a kernel [D, F]."""

    x: Array
    dy: Array

    def total(self, param: Array) -> Array:
        return product(flat(self.x), flat(self.dy), (0, 0), param)

    def per_example(self, param: Array) -> Array:
        return jnp.einsum("bti,btj->bij", *self.examples())

    def squared_norm(self, param: Array) -> Array:
        return Sum((self,)).squared_norm(param)

    def examples(self) -> tuple[Array, Array]:
        """x [B, T, D] and dy [B, T, F], in the accumulation dtype."""
        return wide_examples(self.x), wide_examples(self.dy)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Shift(Factor):
    """dy [B, .., *param] of a bias, mostly [F]."""

    dy: Array

    def total(self, param: Array) -> Array:
        return placed(jnp.sum(self.dy.reshape(-1, *param.shape), axis=0, dtype=sum_dtype(self.dy.dtype)), param)

    def per_example(self, param: Array) -> Array:
        return jnp.sum(wide_examples(self.dy, param.ndim), axis=1)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Scale(Factor):
    """x_hat and dy [B, .., F] of a scale [F]; x_hat can be wider than dy."""

    x_hat: Array
    dy: Array

    def total(self, param: Array) -> Array:
        high = sum_dtype(self.dy.dtype)
        return placed(jnp.sum(flat(self.x_hat).astype(high) * flat(self.dy).astype(high), axis=0), param)

    def per_example(self, param: Array) -> Array:
        return jnp.sum(wide_examples(self.x_hat) * wide_examples(self.dy), axis=1)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Gather(Factor):
    """ids [B, ..] and dy [B, .., D] of a table [size, D]; an id out of range adds nothing."""

    ids: Array
    dy: Array
    size: int = field(metadata={"static": True})

    def total(self, param: Array) -> Array:
        ids, dy = self.in_table()
        return placed(_table(ids.reshape(-1), flat(dy), self.size), param)

    def per_example(self, param: Array) -> Array:
        return jax.vmap(partial(_table, size=self.size))(*self.examples())

    def squared_norm(self, param: Array) -> Array:
        return Sum((self,)).squared_norm(param)

    def in_table(self) -> tuple[Array, Array]:
        """ids and dy; an id out of range becomes the table's size, which is no row, and its dy becomes zero."""
        ids = whole(self.ids)
        inside = (ids >= 0) & (ids < self.size)
        return jnp.where(inside, ids, self.size), jnp.where(inside[..., None], self.dy, jnp.zeros_like(self.dy))

    def examples(self) -> tuple[Array, Array]:
        """ids [B, T] and dy [B, T, D], in the accumulation dtype."""
        ids, dy = self.in_table()
        dy = wide_examples(dy)
        return ids.reshape(dy.shape[:2]), dy


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Window(Factor):
    """x [B, *spatial, C] and dy [B, *outputs, F] of a kernel [*window, C / groups, F].

    `transposed` is for a transposed convolution: its windows lie on dy, one for each entry of x, and its kernel
    [*window, C, F] is that of the convolution from dy's shape to x's, flipped, with features and channels exchanged.
    """

    x: Array
    dy: Array
    geometry: Windows = field(metadata={"static": True})
    transposed: bool = field(default=False, metadata={"static": True})

    def total(self, param: Array) -> Array:
        return placed(self._by(correlation, param), param)

    def per_example(self, param: Array) -> Array:
        one = lambda x, dy: replace(self, x=x[None], dy=dy[None])
        return jax.vmap(lambda x, dy: one(x, dy)._by(correlation_by_taps, param))(self.x, self.dy)

    def _by(self, correlation: Callable[..., Array], param: Array) -> Array:
        """The gradient of the kernel by `correlation(x, dy, geometry, kernel)`."""
        if not self.transposed:
            return correlation(self.x, self.dy, self.geometry, param)
        answer = correlation(self.dy, self.x, self.geometry, jnp.swapaxes(param, -1, -2))
        return lax.rev(jnp.swapaxes(answer, -1, -2), range(param.ndim - 2))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sum(Factor):
    """The factors of one parameter, one for each of its uses."""

    factors: tuple[Any, ...]

    def total(self, param: Array) -> Array:
        return reduce(jnp.add, [each.total(param) for each in self.factors])

    def per_example(self, param: Array) -> Array:
        return reduce(jnp.add, [each.per_example(param) for each in self.factors])

    def squared_norm(self, param: Array) -> Array:
        """From the touched rows, if all uses are lookups; if some are products, by Gram matrices where those are small.

        The positions of all uses are taken together, which includes the cross terms between the uses.
        """
        if all(isinstance(each, Gather) for each in self.factors):
            ids, dy = (jnp.concatenate(parts, axis=1) for parts in zip(*self._examples(), strict=True))
            sums = jax.vmap(partial(touched, size=param.shape[0]))(ids, dy)[1]
            return jnp.sum(jnp.square(sums), axis=(1, 2))
        if all(isinstance(each, (Outer, Gather)) for each in self.factors):
            uses = self._examples()
            positions = sum(entries_of(dy.shape[1:2]) for _, dy in uses)
            if positions and 2 * positions**2 <= math.prod(param.shape):
                return squared_norms(uses, param.shape[0])
        return super().squared_norm(param)

    def _examples(self) -> list[tuple[Array, Array]]:
        """x or ids, and dy, of each use, in the accumulation dtype; ids stand for rows x of the identity."""
        return [each.examples() for each in self.factors]


def touched(ids: Array, dy: Array, size: int) -> tuple[Array, Array]:
    """The sums of dy [N, D] over equal ids: each id once, then `size`, which is no row, [N]; and its sum, [N, D]."""
    unique, place = jnp.unique(ids, return_inverse=True, size=ids.size, fill_value=size)
    return unique, _table(place, dy, ids.size)


def _table(ids: Array, dy: Array, size: int) -> Array:
    """The table [size, D] whose row v is the sum of dy [N, D] where ids [N] are v, in the accumulation dtype."""
    zeros = jnp.zeros((size, dy.shape[-1]), sum_dtype(dy.dtype))
    # A scatter of a sharded batch must state the sharding of its result: replicated.
    return zeros.at[ids].add(dy.astype(zeros.dtype), mode="drop", out_sharding=sharded_as(dy, 0))
