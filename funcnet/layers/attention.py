"""Attention: every query takes an average of values, weighted by how well its key fits.

With T queries and S keys of each head, d features a head, and b an additive bias, 0 by default:

    s = q k^T / sqrt(d) + b        p = softmax(s) over what may be seen, 0 elsewhere        o = (p * m) v

m is 1, or in training with dropout on the weights a random mask of 0 and 1 / (1 - rate). q is dense in x, k and v in x
or in a context, y in o with all heads side by side; several heads of queries may share one of keys and values.

Backward, with do the cotangent of o:

    dv = (p * m)^T do         dp = (do v^T) * m         ds = p * (dp - rowsum(dp * p))
    dq = ds k / sqrt(d)       dk = ds^T q / sqrt(d)     db = ds

That is done tile by tile, and never for a tile that causality or the window excludes as a whole. Where T x S is one
tile, these lines are all there is. Otherwise no matrix of T x S is formed: forward, the largest score `top` of a row,
the `mass` and the sum `acc` relative to it are carried from tile to tile,

    top' = max(top, max(s))    c = e^(top - top')    p = e^(s - top')    mass' = c mass + rowsum(p)
    acc' = c acc + (p * m) v                         in the end o = acc / mass

and backward p = e^(s - top - log(mass)), and delta = rowsum(do * o), which is rowsum(dp * p), are known at once, so
that each tile adds its own part to dq, dk and dv.

Residuals: the input as given; q, k, v, o, top and log(mass); with dropout the key.  Why these: they are linear in T and
S. p would be T S numbers a head, and takes one more product and exponential to form again; m is drawn again, tile by
tile. top and log(mass) are not added to one number, which has no digit left for log(mass) where top is -1e9. o is
kept in float32 for half precision: the rows of ds add up to 0, of a delta of rounded o only to its rounding, and dk
adds up many of them.
Numerics: scores, weights and all sums in float32 for half precision; what is multiplied is rounded to the input's
dtype. `top` begins with the lowest finite number, so that a row that sees nothing ends with mass 0, o = 0, p = 0 and no
gradient: -inf - -inf never occurs. A finite bias forbids nothing: where all that a row may see has the bias -1e9, which
in float32 leaves a score no digits, its weights are equal, forward and backward.
Source: Vaswani et al. 2017, arXiv:1706.03762; Rabe and Staats 2021, arXiv:2112.05682, and Dao et al. 2022,
arXiv:2205.14135 (tiles); Ainslie et al. 2023, arXiv:2305.13245 (shared keys); Beltagy et al. 2020, arXiv:2004.05150
(windows).
"""

from collections.abc import Callable, Iterator, Mapping
from functools import reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.nn import initializers

from funcnet import expect
from funcnet.arithmetic import added, entries_of, scan, wide
from funcnet.expect import InputError, describe
from funcnet.factors import total
from funcnet.layer import Layer, Made
from funcnet.layers import embedding
from funcnet.layers.dense import Initializer, dense

Tree = Any

# A tile has at least so many rows and columns, and about so many scores of all examples and heads: caches hold them.
EDGE, SCORES = 64, 1 << 21


class Attended(NamedTuple):
    """Residuals of attention, with H = K G heads of queries and K of keys and values.

    Attributes:
        inputs: the input as given.
        q: [B, K, G, T, d], turned if rotary.
        k, v: [B, K, S, d], k turned if rotary.
        out: [B, T, H d], o of all heads side by side, in float32 for half precision.
        top: [B, K, G, T, 1], the largest score; the lowest finite number for a row that sees nothing.
        log_mass: [B, K, G, T, 1], log(rowsum(e^(s - top))); 0 for a row that sees nothing.
        key: None where nothing is dropped.
    """

    inputs: Tree
    q: Array
    k: Array
    v: Array
    out: Array
    top: Array
    log_mass: Array
    key: Array | None


def attention(
    heads: int,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    causal: bool = False,
    rotary: bool = False,
    window: int | None = None,
    *,
    features: int | None = None,
    rate: float = 0.0,
    use_bias: bool = True,
    rotary_base: float = 1e4,
    block: int | None = None,
    kernel_init: Initializer = initializers.lecun_normal(),
    bias_init: Initializer = initializers.zeros,
) -> Layer[dict, tuple[()], Attended]:
    """Multi-head attention [B, T, D] -> [B, T, F]; params query, key, value, out, each that of a dense.

    The kernels are [D, H d], [C, K d], [C, K d] and [H d, F], with heads side by side, so that their gradients are the
    factor Outer. The input is x [B, T, D] alone, or a dict of `x` and, where wanted,

        context   [B, S, C], of which keys and values are made (cross attention); x itself by default
        mask      booleans [B, T, S], or [B, H, T, S] for each head its own: True where a query may see a key
        bias      added to the scores, [B, T, S] or [B, H, T, S]; -inf forbids as well; it has a gradient
        lengths   integers [B], 0 to S: how many keys an example has; what pads it must be finite, for 0 * NaN is NaN

    with context and bias in x's dtype. A query sees what all of them allow. Where that is nothing, o is 0, and y the
    bias of `out`. Positions are indices, of queries and keys alike.

    Args:
        heads: H, of queries.
        kv_heads: K, of keys and values, each for H / K neighbouring heads of queries; H by default.
        head_dim: d, the size of a head; D / H by default.
        causal: a query sees keys up to its own position.
        rotary: turn queries and keys by their positions, as `fn.rotary` does.
        window: a query sees keys less than `window` positions away.
        features: F; D by default.
        rate: the share of the weights that `fwd` drops, 0 <= rate < 1; `apply` drops none.
        use_bias: whether the four dense maps add biases.
        rotary_base: of `fn.rotary`.
        block: the largest edge of a tile; by default the shapes decide. It changes nothing but rounding, and what a key
            drops, since every tile draws its own part of the mask.
        kernel_init, bias_init: as in `jax.nn.initializers`. LeCun's normal keeps the variance of q, k and v.

    Raises:
        expect.InputError: for options out of range; for an input other than above, or one whose D is no multiple of H
            where head_dim is not given; if weights are to be dropped and `fwd` gets no key.
    """
    heads = expect.count(heads, "heads")
    kv_heads = heads if kv_heads is None else expect.count(kv_heads, "kv_heads")
    if heads % kv_heads:
        raise InputError(f"heads that {kv_heads} kv_heads divide", f"heads={heads}", "ask for a multiple of them")
    rate = expect.fraction(rate, "rate", "rate is the share dropped")
    rotary_base = embedding.a_base(rotary_base, "rotary_base")
    head_dim, window, features, block = (
        value if value is None else expect.count(value, name)
        for name, value in {"head_dim": head_dim, "window": window, "features": features, "block": block}.items()
    )

    def width(x: Any) -> int:
        """d."""
        if head_dim is None and x.shape[-1] % heads:
            raise InputError(f"features that {heads} heads divide", describe(x), "give head_dim, or other heads")
        return head_dim or x.shape[-1] // heads

    def projections(x: Any) -> dict[str, Layer]:
        d = width(x)
        sizes = {"query": heads * d, "key": kv_heads * d, "value": kv_heads * d, "out": features or x.shape[-1]}
        return {name: dense(n, use_bias, kernel_init=kernel_init, bias_init=bias_init) for name, n in sizes.items()}

    def turned(a: Array, sign: int = 1) -> Array:
        """a [B, heads, T, d] turned by its positions, or back."""
        positions = sign * jnp.arange(a.shape[2], dtype=jnp.int32)
        return embedding.rotary(a, positions[None, None], rotary_base) if rotary else a

    def rule(parts: Mapping[str, Array], key: Array | None) -> Scores:
        groups = {3: (1, 1), 4: (kv_heads, heads // kv_heads)}
        mask, bias = (
            a if a is None else a.reshape(a.shape[0], *groups[a.ndim], *a.shape[-2:])
            for a in (parts.get("mask"), parts.get("bias"))
        )
        sizes = parts["x"].shape[1], parts["context"].shape[1]
        return Scores(causal, window, rate, block, *sizes, mask, bias, parts.get("lengths"), key)

    @expect.by("attention")
    def init(key, inputs):
        parts = _parts(inputs, heads)
        x, context, params = parts["x"], parts["context"], {}
        out = jax.ShapeDtypeStruct((1, heads * width(x)), expect.dtype(x))
        sources = {"query": x, "key": context, "value": context, "out": out}
        for k, (name, layer) in zip(jax.random.split(expect.key(key), 4), projections(x).items(), strict=True):
            params[name], _ = layer.init(k, sources[name])
        return params, ()

    def run(params: dict, inputs: Tree, key: Array | None) -> tuple[Array, Attended]:
        parts = _parts(inputs, heads)
        layers = projections(parts["x"])
        expect.named(params, layers, "params")
        inputs, parts = jax.tree.map(jnp.asarray, (inputs, parts))

        def project(name: str, a: Array) -> Array:
            with expect.at(name):
                return layers[name].apply(params[name], (), a)

        q = turned(_by_head(project("query", parts["x"]), heads))
        k = turned(_by_head(project("key", parts["context"]), kv_heads))
        v = _by_head(project("value", parts["context"]), kv_heads)
        q = q.reshape(q.shape[0], kv_heads, -1, *q.shape[2:])
        o, top, log_mass = _attend(q, k, v, rule(parts, key))
        out = _side_by_side(o.reshape(q.shape[0], heads, *q.shape[3:]))
        return project("out", out.astype(q.dtype)), Attended(inputs, q, k, v, out, top, log_mass, key)

    @expect.by("attention")
    def apply(params, state, inputs):
        return run(params, inputs, None)[0]

    @expect.by("attention")
    def fwd(params, state, inputs, key):
        y, residuals = run(params, inputs, expect.key(key) if rate else None)
        return y, state, residuals

    @expect.by("attention")
    def bwd(params, residuals, dy, contract=total):
        inputs, q, k, v, out, top, log_mass, key = residuals
        parts = _parts(inputs, heads)
        x, context, layers = parts["x"], parts["context"], projections(parts["x"])
        expect.named(params, layers, "params")
        dparams = {}

        def pull(name: str, a: Array, dy: Array) -> Array:
            with expect.at(name):
                dparams[name], da = layers[name].bwd(params[name], a, dy, contract)
            return da

        o, do = (_by_head(a, heads).reshape(q.shape) for a in (out, pull("out", out.astype(q.dtype), dy)))
        dq, dk, dv, dbias = _pull(q, k, v, o, top, log_mass, do, rule(parts, key))
        dx = pull("query", x, _side_by_side(turned(dq.reshape(q.shape[0], heads, *q.shape[3:]), -1)))
        of_context = pull("key", context, _side_by_side(turned(dk, -1))), pull("value", context, _side_by_side(dv))
        if not isinstance(inputs, Mapping):
            return dparams, added(dx, *of_context)
        dinputs: dict[str, Any] = dict.fromkeys(inputs) | {"x": dx if "context" in inputs else added(dx, *of_context)}
        if "context" in inputs:
            dinputs["context"] = added(*of_context)
        if dbias is not None:
            dinputs["bias"] = dbias.reshape(inputs["bias"].shape)
        return dparams, dinputs

    return Layer("attention", init, apply, fwd, bwd, made=Made("attention", fwd, bwd, options={"rotary": rotary}))


class Tile(NamedTuple):
    """A part of the scores: its number, its first query and key, all three traced in a loop, and how many of each.

    Where tiles do not divide the scores, the last ones are moved back to end with them (slices do that by themselves);
    what they then share with tiles before counts there.
    """

    number: Any
    row: Any
    column: Any
    rows: int
    columns: int


class Scores(NamedTuple):
    """What scores and weights depend on beside q, k and v: the layer's options, sizes, and arrays or None.

    Attributes:
        causal, window, rate, block: as for `attention`.
        queries, keys: T and S.
        mask, bias: [B, 1 or K, 1 or G, T, S].
        lengths: [B].
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
    key: Array | None

    def tiles(self, heads: int) -> list[Tile]:
        """Those in which something may be seen for its position; `heads` counts those of all examples."""
        edge = self.block or max(EDGE, (1 << int((SCORES / heads) ** 0.5).bit_length()) >> 1)
        rows, columns = (-(-n // -(-n // edge)) for n in (self.queries, self.keys))
        reach = self.queries + self.keys if self.window is None else self.window - 1
        starts = []
        for row in range(0, self.queries, rows):
            low, end = max(0, row - reach), min(self.keys, row + rows + (0 if self.causal else reach))
            starts += [(row, column) for column in range(low // columns * columns, end, columns)]
        return [Tile(n, row, column, rows, columns) for n, (row, column) in enumerate(starts)]

    def of(self, q: Array, k: Array, tile: Tile) -> Array:
        """s of a tile, [B, K, G, rows, columns], -inf where nothing may be seen."""
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
        if self.mask is not None:
            yield _rows(_columns(self.mask, tile, -1), tile)

    def kept(self, p: Array, tile: Tile) -> Array:
        """p * m."""
        if self.key is None:
            return p
        m = jax.random.bernoulli(jax.random.fold_in(self.key, tile.number), 1 - self.rate, p.shape)
        return jnp.where(m, p / (1 - self.rate), 0.0)


def _attend(q: Array, k: Array, v: Array, scores: Scores) -> tuple[Array, Array, Array]:
    """o [B, K, G, T, d], top and log(mass) [B, K, G, T, 1], all wide."""

    def body(carry: tuple[Array, ...], tile: Tile) -> tuple[Array, ...]:
        top, mass, acc = (_rows(a, tile) for a in carry)
        s = scores.of(q, k, tile)
        new = jnp.maximum(top, lax.stop_gradient(jnp.max(s, axis=-1, keepdims=True)))
        c, p = jnp.exp(top - new), jnp.exp(s - new)
        mass = c * mass + jnp.sum(p, axis=-1, keepdims=True)
        acc = c * acc + _product("bkgts,bksd->bkgtd", scores.kept(p, tile), _columns(v, tile))
        return tuple(_put(a, b, tile.row) for a, b in zip(carry, (new, mass, acc), strict=True))

    acc = jnp.zeros_like(q, wide(q.dtype))
    mass = acc[..., :1]
    top, mass, acc = _sweep(body, (jnp.full_like(mass, jnp.finfo(mass.dtype).min), mass, acc), scores)
    mass = jnp.where(mass == 0, 1.0, mass)
    return acc / mass, top, jnp.log(mass)


def _pull(
    q: Array, k: Array, v: Array, o: Array, top: Array, log_mass: Array, do: Array, scores: Scores
) -> tuple[Array, Array, Array, Array | None]:
    """dq, dk, dv, and db, None without a bias. dk and dv are summed as [B, K, d, S]: no tile is transposed for them."""
    high, scale = wide(q.dtype), q.shape[-1] ** -0.5
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
    """carry = body(carry, tile), tile after tile: the rule written once for a single tile, a loop over many."""
    tiles = scores.tiles(entries_of(carry[0].shape[:-2]))
    if len(tiles) < 2:
        return reduce(body, tiles, carry)
    starts = np.array([tile[:3] for tile in tiles], np.int32)

    def step(carry, start):
        return body(carry, tiles[0]._replace(number=start[0], row=start[1], column=start[2])), None

    return scan(step, carry, starts)[0]


def _product(axes: str, a: Array, b: Array) -> Array:
    """`jnp.einsum` in the narrower of both dtypes, summed wide."""
    dtype = min(a.dtype, b.dtype, key=lambda dtype: dtype.itemsize)
    return jnp.einsum(axes, a.astype(dtype), b.astype(dtype), preferred_element_type=wide(dtype))


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


def _by_head(a: Array, heads: int) -> Array:
    """[B, T, heads d] as [B, heads, T, d]."""
    return jnp.swapaxes(a.reshape(*a.shape[:2], heads, -1), 1, 2)


def _side_by_side(a: Array) -> Array:
    """[B, heads, T, d] as [B, T, heads d]."""
    return jnp.swapaxes(a, 1, 2).reshape(a.shape[0], a.shape[2], -1)


def _parts(inputs: Tree, heads: int) -> dict[str, Any]:
    """An input as a dict with a context, x itself if it has none; refused where its parts do not fit together."""
    parts = dict(inputs) if isinstance(inputs, Mapping) else {"x": inputs}
    if "x" not in parts or parts.keys() - {"x", "context", "mask", "bias", "lengths"}:
        wanted = "an array [B, T, D], or a dict of it as x with, where wanted, context, mask, bias and lengths"
        raise InputError(wanted, describe(inputs), 'write {"x": x, "context": context}, for instance')
    parts = {"context": parts["x"]} | parts
    x, context = parts["x"], parts["context"]
    for name in ("x", "context"):
        expect.sequences(parts[name], what=name)
    if context.shape[0] != x.shape[0] or expect.dtype(context) != expect.dtype(x):
        wanted = f"a context with {x.shape[0]} examples of {expect.dtype(x)}, as x has"
        raise InputError(wanted, describe(context), "give one for each example, in the dtype of x")
    examples, queries, keys = *x.shape[:2], context.shape[1]
    for name, kind in (("mask", "booleans"), ("bias", str(expect.dtype(x)))):
        fits = [(examples, queries, keys), (examples, heads, queries, keys)]
        if name in parts and not _is(parts[name], fits, bool if name == "mask" else expect.dtype(x)):
            wanted = f"a {name} of {kind}, {list(fits[0])} or {list(fits[1])}"
            raise InputError(
                wanted, describe(parts[name]), "broadcast and convert it, for instance with jnp.broadcast_to"
            )
    if "lengths" in parts:
        expect.lengths(parts["lengths"], examples, keys)
    return parts


def _is(a: Any, shapes: list[tuple[int, ...]], dtype: Any) -> bool:
    return expect.is_array(a) and a.shape in shapes and jax.dtypes.canonicalize_dtype(a.dtype) == dtype
