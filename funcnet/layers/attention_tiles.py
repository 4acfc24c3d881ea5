"""Attention tile by tile: which tiles there are, what may be seen in them, and both passes over them.

The formulas, and their letters, are those of `funcnet.layers.attention`.
"""

from collections.abc import Callable, Iterator
from functools import reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from funcnet._internal.numerics import entries_of, sum_dtype
from funcnet._internal.sharding import scan

Tree = Any

# By default a tile's largest edge is EDGE or more, chosen so that it has about SCORES scores over all examples and
# heads: caches hold so many.
EDGE, SCORES = 64, 1 << 21


class Tile(NamedTuple):
    """A part of the scores: its number, its first query and key (all three traced in a loop), and how many of each.

    Where tiles do not divide the scores evenly, the last ones are moved back to end where the scores end, as a dynamic
    slice does by itself; scores that then lie in two tiles count in the first.
    """

    number: Any
    row: Any
    column: Any
    rows: int
    columns: int


class Scores(NamedTuple):
    """What scores and weights depend on besides q, k and v: the layer's options, sizes, and arrays or None.

    Attributes:
        causal, window, rate, block: as for `attention`.
        queries, keys: T and S.
        mask, bias: [B, 1 or K, 1 or G, T, S].
        lengths: [B].
        segments: [B, T], T the number of keys too.
        key: None to drop nothing.
    """

    causal: bool
    window: int | None
    rate: float
    block: int | None
    queries: int
    keys: int
    mask: Array | None
    bias: Array | None
    lengths: Array | None
    segments: Array | None
    key: Array | None

    def tiles(self, heads: int) -> list[Tile]:
        """The tiles in which some query may see a key by its position; `heads` counts the heads of all examples."""
        edge = self.block or max(EDGE, (1 << int((SCORES / heads) ** 0.5).bit_length()) >> 1)
        rows, columns = (-(-n // -(-n // edge)) for n in (self.queries, self.keys))
        reach = self.queries + self.keys if self.window is None else self.window - 1
        starts = []
        for row in range(0, self.queries, rows):
            low, end = max(0, row - reach), min(self.keys, row + rows + (0 if self.causal else reach))
            starts += [(row, column) for column in range(low // columns * columns, end, columns)]
        return [Tile(n, row, column, rows, columns) for n, (row, column) in enumerate(starts)]

    def of(self, q: Array, k: Array, tile: Tile) -> Array:
        """s of a tile, [B, K, G, rows, columns], -inf where the query may not see the key."""
        s = _product("bkgtd,bksd->bkgts", _rows(q, tile), _columns(k, tile)) * q.shape[-1] ** -0.5
        if self.bias is not None:
            s = s + _rows(_columns(self.bias, tile, -1), tile).astype(s.dtype)
        seen = list(self._seen(tile))
        return jnp.where(reduce(jnp.logical_and, seen), s, -jnp.inf) if seen else s

    def _seen(self, tile: Tile) -> Iterator[Array]:
        """Conditions, of the rank of s, under which a query may see a key."""
        t = jnp.minimum(tile.row, self.queries - tile.rows) + jnp.arange(tile.rows, dtype=jnp.int32)
        s = jnp.minimum(tile.column, self.keys - tile.columns) + jnp.arange(tile.columns, dtype=jnp.int32)
        t, s = t[None, None, None, :, None], s[None, None, None, None]
        if self.queries % tile.rows:
            yield tile.row <= t
        if self.keys % tile.columns:
            yield tile.column <= s
        if self.causal:
            yield s <= t
        if self.window is not None:
            yield t - s < self.window
            if not self.causal:
                yield s - t < self.window
        if self.lengths is not None:
            yield s < self.lengths.astype(jnp.int32)[:, None, None, None, None]
        if self.segments is not None:
            one, other = self.segments[:, None, None, :, None], self.segments[:, None, None, None]
            yield _rows(one, tile) == _columns(other, tile, -1)
        if self.mask is not None:
            yield _rows(_columns(self.mask, tile, -1), tile)

    def kept(self, p: Array, tile: Tile) -> Array:
        """p * m."""
        if self.key is None:
            return p
        m = jax.random.bernoulli(jax.random.fold_in(self.key, tile.number), 1 - self.rate, p.shape)
        return jnp.where(m, p / (1 - self.rate), 0.0)


def attend(q: Array, k: Array, v: Array, scores: Scores) -> tuple[Array, Array, Array]:
    """o [B, K, G, T, d], top and log(mass) [B, K, G, T, 1], all in the accumulation dtype."""

    def body(carry: tuple[Array, ...], tile: Tile) -> tuple[Array, ...]:
        top, mass, acc = (_rows(a, tile) for a in carry)
        s = scores.of(q, k, tile)
        new = jnp.maximum(top, lax.stop_gradient(jnp.max(s, axis=-1, keepdims=True)))
        c, p = jnp.exp(top - new), jnp.exp(s - new)
        mass = c * mass + jnp.sum(p, axis=-1, keepdims=True)
        acc = c * acc + _product("bkgts,bksd->bkgtd", scores.kept(p, tile), _columns(v, tile))
        return tuple(_put(a, b, tile.row) for a, b in zip(carry, (new, mass, acc), strict=True))

    acc = jnp.zeros_like(q, sum_dtype(q.dtype))
    mass = acc[..., :1]
    top, mass, acc = _sweep(body, (jnp.full_like(mass, jnp.finfo(mass.dtype).min), mass, acc), scores)
    mass = jnp.where(mass == 0, 1.0, mass)
    return acc / mass, top, jnp.log(mass)


def pull_back(
    q: Array, k: Array, v: Array, o: Array, top: Array, log_mass: Array, do: Array, scores: Scores
) -> tuple[Array, Array, Array, Array | None]:
    """dq, dk, dv, and db, None without a bias. dk and dv are summed as [B, K, d, S]: no tile is transposed for them."""
    high, scale = sum_dtype(q.dtype), q.shape[-1] ** -0.5
    delta = jnp.sum(do.astype(high) * o, axis=-1, keepdims=True)

    def body(carry: tuple[Any, ...], tile: Tile) -> tuple[Any, ...]:
        dq, dk, dv, db = carry
        p = jnp.exp(scores.of(q, k, tile) - _rows(top, tile) - _rows(log_mass, tile))
        dp = scores.kept(_product("bkgtd,bksd->bkgts", _rows(do, tile), _columns(v, tile)), tile)
        ds = p * (dp - _rows(delta, tile))
        dq = _add(dq, _product("bkgts,bksd->bkgtd", ds, _columns(k, tile)), tile.row, -2)
        dk = _add(dk, _product("bkgtd,bkgts->bkds", _rows(q, tile), ds), tile.column, -1)
        dv = _add(dv, _product("bkgtd,bkgts->bkds", _rows(do, tile), scores.kept(p, tile)), tile.column, -1)
        if db is not None:
            heads = tuple(axis for axis in (1, 2) if db.shape[axis] == 1)
            row = _add(_rows(db, tile), jnp.sum(ds, heads, keepdims=True), tile.column, -1)
            db = _put(db, row, tile.row)
        return dq, dk, dv, db

    start = jax.tree.map(lambda a: jnp.zeros_like(a, high), (q, k.mT, v.mT, scores.bias))
    dq, dk, dv, db = _sweep(body, start, scores)
    return jax.tree.map(lambda a: a.astype(q.dtype), (dq * scale, dk.mT * scale, dv.mT, db))


def _sweep(body: Callable[[Tree, Tile], Tree], carry: Tree, scores: Scores) -> Tree:
    """carry = body(carry, tile), tile after tile: a single call for one tile, a scan over many."""
    tiles = scores.tiles(entries_of(carry[0].shape[:-2]))
    if len(tiles) < 2:
        return reduce(body, tiles, carry)
    starts = np.array([tile[:3] for tile in tiles], np.int32)

    def step(carry, start):
        return body(carry, tiles[0]._replace(number=start[0], row=start[1], column=start[2])), None

    return scan(step, carry, starts)[0]


def _product(axes: str, a: Array, b: Array) -> Array:
    """`jnp.einsum` in the narrower of the two dtypes, summed in the accumulation dtype."""
    dtype = min(a.dtype, b.dtype, key=lambda dtype: dtype.itemsize)
    return jnp.einsum(axes, a.astype(dtype), b.astype(dtype), preferred_element_type=sum_dtype(dtype))


def _rows(a: Array, tile: Tile) -> Array:
    """The tile's queries of a [.., T, n]."""
    return lax.dynamic_slice_in_dim(a, tile.row, tile.rows, axis=-2)


def _columns(a: Array, tile: Tile, axis: int = -2) -> Array:
    """The tile's keys along that axis of a."""
    return lax.dynamic_slice_in_dim(a, tile.column, tile.columns, axis=axis)


def _put(a: Array, b: Array, start: Any, axis: int = -2) -> Array:
    """a with b in place of a part of that axis."""
    return lax.dynamic_update_slice_in_dim(a, b, start, axis)


def _add(a: Array, b: Array, start: Any, axis: int) -> Array:
    """a with b added to a part of that axis."""
    return _put(a, lax.dynamic_slice_in_dim(a, start, b.shape[axis], axis) + b, start, axis)
