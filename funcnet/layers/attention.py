"""Attention: every query takes an average of the values, weighted by how well their keys match it.

With T queries and S keys for each head, d features per head, and b an additive bias, 0 by default:

    s = q k^T / sqrt(d) + b        p = softmax(s) over what may be seen, 0 elsewhere        o = (p * m) v

m is 1, or in training with dropout on the weights a random mask of 0 and 1 / (1 - rate). q is a dense map of x, k and v
are dense maps of x or of a context, and y is one of o with all heads side by side; several heads of queries may share
one head of keys and values.

Backward, with do the cotangent of o:

    dv = (p * m)^T do         dp = (do v^T) * m         ds = p * (dp - rowsum(dp * p))
    dq = ds k / sqrt(d)       dk = ds^T q / sqrt(d)     db = ds

This is computed tile by tile, without the tiles that causality or the window excludes as a whole. Where T x S is one
tile, there is no loop. Otherwise no T x S matrix is formed, but for db where there is a bias: forward, the largest
score `top` of each row, and relative to it the `mass` and the sum `acc`, are carried from tile to tile,

    top' = max(top, max(s))    c = e^(top - top')    p = e^(s - top')    mass' = c mass + rowsum(p)
    acc' = c acc + (p * m) v                         in the end o = acc / mass

and backward p = e^(s - top - log(mass)), and delta = rowsum(do * o), which equals rowsum(dp * p), need no other tile,
so that each tile adds its own part to dq, dk and dv.

Residuals: the input as given; q, k, v, o, top and log(mass); with dropout the key.  Why these: their size is linear in
T and S. p would be T S numbers per head, and forming it again takes one more product and exponential; m is drawn again,
tile by tile. top and log(mass) are not added into one number, which would have no digit left for log(mass) where top is
-1e9. o is kept in float32 for half precision: each row of ds sums to 0, but with delta computed from a rounded o only
to within that rounding, and dk adds up many rows.
Numerics: scores, weights and all sums are in float32 for half precision; the operands of products are rounded to the
input's dtype. `top` starts at the lowest finite number, so that a row that sees no key ends with mass 0, o = 0, p = 0
and no gradient: -inf - -inf never occurs. A finite bias masks nothing: where all keys that a row may see have the bias
-1e9, which in float32 leaves a score no digits, its weights are equal, forward and backward.
Source: Vaswani et al. 2017, arXiv:1706.03762; Rabe and Staats 2021, arXiv:2112.05682, and Dao et al. 2022,
arXiv:2205.14135 (tiles); Ainslie et al. 2023, arXiv:2305.13245 (shared keys); Beltagy et al. 2020, arXiv:2004.05150
(windows).
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from funcnet._internal import expect
from funcnet._internal.defaults import LECUN_NORMAL, ZEROS, Initializer
from funcnet._internal.errors import InputError, at, by, describe
from funcnet._internal.numerics import added
from funcnet.gradients.contraction import total
from funcnet.layer import Layer
from funcnet.layers import positions
from funcnet.layers.attention_tiles import Scores, attend, pull_back
from funcnet.layers.dense import dense
from funcnet.structure import constructor

Tree = Any


class AttentionResiduals(NamedTuple):
    """Residuals of attention, with H = K G heads of queries and K of keys and values.

    Attributes:
        inputs: the input as given.
        q: [B, K, G, T, d], rotated if rotary.
        k, v: [B, K, S, d], k rotated if rotary.
        out: [B, T, H d], o of all heads side by side, in float32 for half precision.
        top: [B, K, G, T, 1], the largest score; the lowest finite number for a row that sees no key.
        log_mass: [B, K, G, T, 1], log(rowsum(e^(s - top))); 0 for a row that sees no key.
        key: of the dropped weights; None where nothing is dropped.
    """

    inputs: Tree
    q: Array
    k: Array
    v: Array
    out: Array
    top: Array
    log_mass: Array
    key: Array | None


@constructor
def attention(
    heads: int,
    *,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    causal: bool = False,
    rotary: bool = False,
    window: int | None = None,
    features: int | None = None,
    rate: float = 0.0,
    use_bias: bool = True,
    rotary_base: float = 1e4,
    block: int | None = None,
    kernel_init: Initializer = LECUN_NORMAL,
    bias_init: Initializer = ZEROS,
) -> Layer[dict, tuple[()], AttentionResiduals]:
    """Multi-head attention [B, T, D] -> [B, T, F]; params query, key, value, out, each that of a dense.

    The kernels are [D, H d], [C, K d], [C, K d] and [H d, F], with heads side by side, so that the gradient of each is
    the factor Outer. The input is x [B, T, D] alone, or a dict of `x` and, where wanted,

        context   [B, S, C], from which keys and values are made (cross attention); x itself by default
        mask      booleans [B, T, S], or [B, H, T, S] with one for each head: True where a query may see a key
        bias      added to the scores, [B, T, S] or [B, H, T, S]; -inf masks as well; it has a gradient
        lengths   integers [B], 0 to S: how many keys an example has; its padding must be finite, for 0 * NaN is NaN
        segments  integers [B, T], without a context: a query sees the keys of its own number, and positions are counted
                  from where a number begins (`fn.packed`); the whole row must be finite

    with context and bias in x's dtype. A query sees the keys that all of these allow. Where there is none, o is 0, and
    y is the bias of `out`. The positions of queries and keys are their indices.

    Args:
        heads: H, the number of heads of queries.
        kv_heads: K, that of keys and values, each shared by H / K neighbouring heads of queries; H by default.
        head_dim: d, the size of a head; D / H by default.
        causal: a query sees keys up to its own position.
        rotary: rotate queries and keys by their positions, as `fn.rotary` does.
        window: a query sees keys less than `window` positions away.
        features: F; D by default.
        rate: the share of the weights that `fwd` drops, 0 <= rate < 1; `apply` drops none.
        use_bias: whether the four dense maps add biases.
        rotary_base: the base of `fn.rotary`.
        block: the largest edge of a tile; by default it depends on the shapes. It changes nothing but rounding, and
            which weights a random key drops, since every tile draws its own part of the mask.
        kernel_init, bias_init: as in `jax.nn.initializers`. LeCun's normal gives q, k and v their input's variance.

    Raises:
        InputError: for options out of range; for an input other than these, or one whose D is no multiple of H
            where head_dim is not given; if weights are to be dropped and `fwd` gets no key.
    """
    heads = expect.count(heads, "heads")
    kv_heads = heads if kv_heads is None else expect.count(kv_heads, "kv_heads")
    if heads % kv_heads:
        raise InputError(f"heads that {kv_heads} kv_heads divide", f"heads={heads}", "ask for a multiple of them")
    expect.flags(causal=causal, rotary=rotary, use_bias=use_bias)
    rate = expect.fraction(rate, "rate", "rate is the share dropped")
    rotary_base = positions.a_base(rotary_base, "rotary_base")
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
        return {
            name: dense(n, use_bias=use_bias, kernel_init=kernel_init, bias_init=bias_init) for name, n in sizes.items()
        }

    def turned(a: Array, parts: Mapping[str, Array], sign: int = 1) -> Array:
        """a [B, heads, T, d] rotated by its positions, or with sign -1 back."""
        if not rotary:
            return a
        places = positions.positions_in(parts.get("segments"), a.shape[2])
        return positions.rotary(a, sign * places[:, None], rotary_base)

    def rule(parts: Mapping[str, Array], key: Array | None) -> Scores:
        groups = {3: (1, 1), 4: (kv_heads, heads // kv_heads)}
        mask, bias = (
            a if a is None else a.reshape(a.shape[0], *groups[a.ndim], *a.shape[-2:])
            for a in (parts.get("mask"), parts.get("bias"))
        )
        sizes = parts["x"].shape[1], parts["context"].shape[1]
        return Scores(causal, window, rate, block, *sizes, mask, bias, parts.get("lengths"), parts.get("segments"), key)

    @by("attention")
    def init(key, inputs):
        parts = _parts(inputs, heads)
        x, context, params = parts["x"], parts["context"], {}
        out = jax.ShapeDtypeStruct((1, heads * width(x)), expect.dtype(x))
        sources = {"query": x, "key": context, "value": context, "out": out}
        for k, (name, layer) in zip(jax.random.split(expect.key(key), 4), projections(x).items(), strict=True):
            params[name], _ = layer.init(k, sources[name])
        return params, ()

    def run(params: dict, inputs: Tree, key: Array | None) -> tuple[Array, AttentionResiduals]:
        parts = _parts(inputs, heads)
        layers = projections(parts["x"])
        expect.keys(params, layers, "params")
        inputs, parts = jax.tree.map(jnp.asarray, (inputs, parts))

        def project(name: str, a: Array) -> Array:
            with at(name):
                return layers[name].apply(params[name], (), a)

        q = turned(_by_head(project("query", parts["x"]), heads), parts)
        k = turned(_by_head(project("key", parts["context"]), kv_heads), parts)
        v = _by_head(project("value", parts["context"]), kv_heads)
        q = q.reshape(q.shape[0], kv_heads, -1, *q.shape[2:])
        o, top, log_mass = attend(q, k, v, rule(parts, key))
        out = _side_by_side(o.reshape(q.shape[0], heads, *q.shape[3:]))
        return project("out", out.astype(q.dtype)), AttentionResiduals(inputs, q, k, v, out, top, log_mass, key)

    @by("attention")
    def apply(params, state, inputs):
        return run(params, inputs, None)[0]

    @by("attention")
    def fwd(params, state, inputs, key):
        y, residuals = run(params, inputs, expect.key(key) if rate else None)
        return y, state, residuals

    @by("attention")
    def bwd(params, residuals, dy, contract=total):
        inputs, q, k, v, out, top, log_mass, key = residuals
        parts = _parts(inputs, heads)
        x, context, layers = parts["x"], parts["context"], projections(parts["x"])
        expect.keys(params, layers, "params")
        dparams = {}

        def pull(name: str, a: Array, dy: Array) -> Array:
            with at(name):
                dparams[name], da = layers[name].bwd(params[name], a, dy, contract)
            return da

        o, do = (_by_head(a, heads).reshape(q.shape) for a in (out, pull("out", out.astype(q.dtype), dy)))
        dq, dk, dv, dbias = pull_back(q, k, v, o, top, log_mass, do, rule(parts, key))
        dx = pull("query", x, _side_by_side(turned(dq.reshape(q.shape[0], heads, *q.shape[3:]), parts, -1)))
        of_context = (
            pull("key", context, _side_by_side(turned(dk, parts, -1))),
            pull("value", context, _side_by_side(dv)),
        )
        if not isinstance(inputs, Mapping):
            return dparams, added(dx, *of_context)
        dinputs: dict[str, Any] = dict.fromkeys(inputs) | {"x": dx if "context" in inputs else added(dx, *of_context)}
        if "context" in inputs:
            dinputs["context"] = added(*of_context)
        if dbias is not None:
            dinputs["bias"] = dbias.reshape(inputs["bias"].shape)
        return dparams, dinputs

    return Layer("attention", init, apply, fwd, bwd, reads=("context", "mask", "bias", "lengths", "segments"))


def _by_head(a: Array, heads: int) -> Array:
    """[B, T, heads d] as [B, heads, T, d]."""
    return jnp.swapaxes(a.reshape(*a.shape[:2], heads, -1), 1, 2)


def _side_by_side(a: Array) -> Array:
    """[B, heads, T, d] as [B, T, heads d]."""
    return jnp.swapaxes(a, 1, 2).reshape(a.shape[0], a.shape[2], -1)


def _parts(inputs: Tree, heads: int) -> dict[str, Any]:
    """An input as a dict with a context, x itself if none is given; refused where its parts do not fit together."""
    parts = dict(inputs) if isinstance(inputs, Mapping) else {"x": inputs}
    if "x" not in parts or parts.keys() - {"x", "context", "mask", "bias", "lengths", "segments"}:
        wanted = (
            "an array [B, T, D], or a dict of it as x with, where wanted, context, mask, bias, lengths and segments"
        )
        raise InputError(wanted, describe(inputs), 'write {"x": x, "context": context}, for instance')
    if {"context", "segments"} <= parts.keys():
        raise InputError("segments without a context", describe(inputs), "give a mask [B, T, S] of who sees whom")
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
    if "segments" in parts:
        expect.segments(parts["segments"], examples, keys)
    return parts


def _is(a: Any, shapes: list[tuple[int, ...]], dtype: Any) -> bool:
    return expect.is_array(a) and a.shape in shapes and jax.dtypes.canonicalize_dtype(a.dtype) == dtype
