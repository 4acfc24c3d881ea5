"""A dense layer and its cross-entropy in one: the logits over a large vocabulary are never formed whole.

With z = x @ kernel + bias [N, V] for features x [N, D], weights w of the classes, y the label, top = max_v z_v,
total = sum_v exp(z_v - top), lse = top + log total and q_v = w_v ((1 - s) [v = y] + s / V):

    l = sum_v q_v (log total - (z_v - top)) + c w_y lse^2

Backward, with g = dy of that position and softmax_v = exp(z_v - top) / total:

    dz      = g (softmax (sum_v q_v + 2 c w_y lse) - q)
    dx      = dz @ kernel^T
    dkernel = x^T dz            the factor Outer(x, dz)
    dbias   = sum_n dz          the factor Shift(dz)

`fwd` loops over blocks of the vocabulary and keeps a running maximum and sum of exponentials; `bwd` loops over them
again and recomputes the logits. That takes four products of N D V, instead of three if the logits were kept, but only
one block of the arrays [N, V] exists at a time. Contractions, too, receive one block at a time.

Where g is known before the values are, as the weights of a mean are, three products suffice (`Loss.ahead`). The loop is
then over chunks of positions: all logits of a chunk are formed once, and from them its values, its dx and, block by
block, its share of dkernel and dbias, which is added up in place.

Residuals: x [.., D], top [..], total [..], label [..].
Numerics: logits, sums and accumulated gradients in float32 for half precision; dz is rounded to x's dtype before its
products, as the cotangent of a `dense` layer is. For logits of size A, lse is rounded by A / 2^24: so top and total are
kept apart, and only the z-loss has that rounding error. The features of an ignored label have no influence, and a value
of weight g = 0 has a gradient of 0 even where it is infinite or NaN.
Source: Milakov and Gimelshein 2018, arXiv:1805.02867 (running sum); Wijmans et al. 2024, arXiv:2411.09009, and Hsu et
al. 2024, arXiv:2410.10989 (logits in chunks); Chowdhery et al. 2022, arXiv:2204.02311, section 5 (z-loss).
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from funcnet._internal import expect
from funcnet._internal.defaults import LECUN_NORMAL, ZEROS, Initializer
from funcnet._internal.errors import InputError, describe
from funcnet._internal.numerics import entries_of, flat, product, sum_dtype, whole
from funcnet._internal.sharding import lasting, placed, scan, shards
from funcnet.gradients.blocked import add_block, block, blocks, fresh
from funcnet.gradients.common_factors import Outer, Shift
from funcnet.gradients.contraction import Contraction
from funcnet.gradients.factor import Blocks
from funcnet.layer import stateless
from funcnet.layers.dense import dense
from funcnet.losses.cross_entropy import counts, ignored, integer_labels, label_mass
from funcnet.losses.logits import LogitsLoss, even, weighed
from funcnet.losses.loss import Ahead, Loss, a_pair, as_loss, silenced
from funcnet.structure import constructor

Tree = Any
COLUMNS = 2048  # of dz that are formed at a time from all logits of a chunk: as many as stay in a cache


class HeadResiduals(NamedTuple):
    """Residuals of `linear_cross_entropy`: features [.., D]; the logits' top, sum of exp(z - top), label, all [..]."""

    x: Array
    top: Array
    total: Array
    label: Array


@constructor
def linear_cross_entropy(
    vocab: int,
    *,
    label_smoothing: float = 0.0,
    ignore_index: int | None = None,
    z_loss: float = 0.0,
    use_bias: bool = True,
    class_weights: Sequence[float] | np.ndarray | Array | None = None,
    chunk: int = 2**24,
    kernel_init: Initializer = LECUN_NORMAL,
    bias_init: Initializer = ZEROS,
) -> Loss:
    """`cross_entropy` of `dense(vocab)` of the features [.., D], in one layer: a value for each entry of [..].

    Its params are those of the head, `dense`: kernel [D, V] and bias [V]. For inference

        logits = fn.dense(vocab).apply(head_params, (), features)

    As the loss of an objective it is the last layer too: the model ends with the features, and the params are
    {"model": .., "loss": head_params}. `value_and_grad` and `train_step` know the weights of the mean beforehand and
    run both passes in one, in three products of N D V, with `chunk` logits at a time.

    Args:
        vocab: V.
        label_smoothing: s, 0 <= s < 1. A positive s gives every class a probability in the target.
        ignore_index: labels of this value have loss 0 and do not count in a mean.
        z_loss: c, the weight of lse^2, which keeps the logits near zero; not negative, mostly about 1e-4.
        use_bias: whether the head has a bias.
        class_weights: w [V], finite and not negative; None for ones. As in PyTorch's `CrossEntropyLoss(weight=w)`, the
            mean over labels y is divided by the sum of their w_y. The z-loss is weighted by w_y.
        chunk: about how many logits are in memory at a time, of 4 bytes each (8 for float64).
        kernel_init, bias_init: of the head, as in `dense`.

    Target: integers [..] in [0, V). Others are refused where they can be read; under `jit` they give NaN. It has no
    metrics: accuracy would need the logits once more.

    Contractions: `fn.keep` keeps `Blocks`, which hold the kernel and form dz when they are contracted.

    Raises:
        InputError: for features or labels that do not fit the head, and for options out of range.
    """
    vocab, chunk = expect.count(vocab, "vocab"), expect.count(chunk, "chunk")
    label_smoothing = expect.fraction(label_smoothing, "label_smoothing", "use 0 for plain labels")
    ignore_index = ignored(ignore_index)
    z_loss = expect.not_negative(z_loss, "z_loss", "use 0 for none, or 1e-4")
    class_weights = None if class_weights is None else expect.weights(class_weights, "class_weights")
    if class_weights is not None and len(class_weights) != vocab:
        raise InputError(f"class_weights [{vocab}]", f"[{len(class_weights)}]", "give a weight for each class")
    uniform = label_smoothing * (1.0 if class_weights is None else float(np.mean(class_weights)))
    head = dense(vocab, use_bias=use_bias, kernel_init=kernel_init, bias_init=bias_init)
    names = ("kernel", "bias") if use_bias else ("kernel",)
    rule = LogitsLoss(vocab, names, label_smoothing, uniform, ignore_index, z_loss, class_weights)

    def check(x: Any, label: Any) -> None:
        expect.float_array(x)
        integer_labels(label, x.shape[:-1], vocab, f"{vocab} classes and features {describe(x)}", ignore_index)

    def fits(params: Tree, x: Any) -> None:
        if not params:
            remedy = 'make them with objective.init or fn.init_train_state: params are {"model": .., "loss": ..}'
            raise InputError(f"the head's parameters {', '.join(names)}", "none", remedy)
        expect.float_array(x, features=expect.size(params, "kernel"))
        shapes = {"kernel": (x.shape[-1], vocab), "bias": (vocab,)}
        expect.fields(params, x.dtype, {name: shapes[name] for name in names})

    def entered(params: Tree, pair: Tree) -> tuple[Array, Array]:
        """Features [.., D] and labels [..] of a pair, which is checked first."""
        a_pair(pair)
        check(*pair)
        fits(params, pair[0])
        return pair

    def init(key, pair):
        a_pair(pair)
        return head.init(key, pair[0])[0]

    def fwd(params, pair):
        return _forward(rule, params, *entered(params, pair), chunk)

    def bwd(params, residuals, dy, contract):
        fits(params, residuals.x)
        return _backward(rule, params, residuals, dy, contract, chunk)

    def both(params, pair, dy):
        return _at_once(rule, params, *entered(params, jax.tree.map(jnp.asarray, pair)), dy, chunk)

    loss = as_loss(stateless("linear_cross_entropy", init, fwd, bwd))
    mass, ahead = label_mass(class_weights, ignore_index), Ahead(both, loss.fwd, loss.bwd)
    return replace(loss, counted=lambda t: counts(t, ignore_index), mass=mass, check=check, ahead=ahead)


def _forward(rule: LogitsLoss, params: Tree, x: Array, label: Array, chunk: int) -> tuple[Array, HeadResiduals]:
    """The values, by one loop over the blocks of the vocabulary."""
    rows, labels = _rows(rule, x, label)
    size = even(rule.vocab, chunk // entries_of(label.shape))
    zero = jnp.zeros_like(labels, sum_dtype(x.dtype))

    def body(sums, i):
        top, total, own, everything, past = sums
        v, new = fresh(i, size, rule.vocab)
        z = rule.logits(rule.columns(params, i, size), rows)
        seen = jnp.where(new[None], z, -jnp.inf)
        higher = lax.stop_gradient(jnp.maximum(top, jnp.max(seen, axis=1)))
        shift = jnp.where(jnp.isneginf(higher), 0.0, higher)
        total = total * jnp.exp(top - shift) + jnp.sum(jnp.exp(seen - shift[:, None]), axis=1)
        hit = new[None] & (labels[:, None] == v.astype(labels.dtype)[None])
        own = own + jnp.sum(jnp.where(hit, z, 0.0), axis=1)
        w = jnp.where(new, rule.weights(i, size, z.dtype), 0.0)
        risen = jnp.where(jnp.isneginf(top), 0.0, shift - top)
        everything = everything - past * risen + weighed(w, z, shift)
        return (higher, total, own, everything, past + jnp.sum(w)), None

    sums = jnp.full_like(zero, -jnp.inf), zero, zero, zero, jnp.zeros((), zero.dtype)
    (top, total, own, everything, _), _ = scan(body, sums, blocks(params["kernel"], size))
    loss = rule.values(top, total, own - top, everything, labels)
    return loss.reshape(label.shape), HeadResiduals(x, top.reshape(label.shape), total.reshape(label.shape), label)


def _backward(
    rule: LogitsLoss, params: Tree, residuals: HeadResiduals, dy: Any, contract: Contraction, chunk: int
) -> tuple[dict[str, Any], tuple[Array, None]]:
    """dparams and dx, by one loop over the blocks of the vocabulary."""
    x, top, total, label = residuals
    g = rule.heard(expect.cotangent(dy, label.shape, top.dtype), label)
    size = even(rule.vocab, chunk // entries_of(label.shape))
    saved = params, rule.seen(x, label), top, total, whole(label), g
    in_sum = silenced(g[..., None], x)

    def body(dx, i):
        head, dz = rule.dz_of(saved, i, size)
        dx = dx + product(flat(dz), head["kernel"], (1, 1), flat(x))
        if contract.joined is None:
            return dx, None
        factors = {"kernel": Outer(in_sum, dz), "bias": Shift(dz)}
        return dx, {name: contract(factors[name], head[name]) for name in rule.names}

    answers: Any
    dx, answers = scan(body, jnp.zeros_like(flat(x), top.dtype), blocks(params["kernel"], size))
    if contract.joined is None:
        factors = {"kernel": Blocks(saved, rule.outer, size), "bias": Blocks(saved, rule.shift, size)}
        dparams = {name: contract(factors[name], params[name]) for name in rule.names}
    else:
        dparams = {name: contract.joined(answers[name], params[name]) for name in rule.names}
    return dparams, (dx.astype(x.dtype).reshape(x.shape), None)


def _at_once(rule: LogitsLoss, params: Tree, x: Array, label: Array, dy: Any, chunk: int) -> tuple[Array, tuple]:
    """Values, dparams and dx for a dy that is known beforehand, by one loop over chunks of positions."""
    rows, labels = _rows(rule, x, label)
    high, names = sum_dtype(x.dtype), rule.names
    g = rule.heard(expect.cotangent(dy, label.shape, dy.dtype).astype(high).reshape(-1), labels)
    cut = shards(rows)
    size = cut * even(entries_of(label.shape) // cut, chunk // rule.vocab // cut)
    count = -(-rows.shape[0] // size)

    def chunks(a):
        """[N, ..] as [chunks, size, ..], padded at the end with positions of weight 0.

        A chunk has every n-th position, n the number of chunks, so that a batch that is sharded over a mesh stays so,
        and a chunk has equally many positions of each shard.
        """
        padded = jnp.pad(a, [(0, size * count - a.shape[0])] + [(0, 0)] * (a.ndim - 1))
        return jnp.moveaxis(padded.reshape(size, count, *a.shape[1:]), 1, 0)

    def joined(a):
        return jnp.moveaxis(a, 0, 1).reshape(-1, *a.shape[2:])[: rows.shape[0]]

    zeros = {name: placed(jnp.zeros(params[name].shape, high), params[name]) for name in names}
    body = partial(_chunk, rule, params)
    grads, (loss, dx) = scan(body, zeros, (chunks(rows), chunks(labels), chunks(g)))
    dparams = {name: grads[name].astype(params[name].dtype) for name in names}
    return joined(loss).reshape(label.shape), (dparams, (joined(dx).reshape(x.shape), None))


def _chunk(rule: LogitsLoss, params: Tree, grads: dict[str, Array], each: tuple) -> tuple[dict, tuple[Array, Array]]:
    """`grads` with the share of a chunk of positions added, all of whose logits are formed; its values and its dx."""
    x, label, g = each
    high, vocab, width = sum_dtype(x.dtype), rule.vocab, even(rule.vocab, COLUMNS)
    z = rule.logits(params, x)
    top = lax.stop_gradient(jnp.max(z, axis=1))
    total = jnp.sum(jnp.exp(z - top[:, None]), axis=1)
    own = jnp.sum(jnp.where(label[:, None] == jnp.arange(vocab, dtype=label.dtype)[None], z, 0.0), axis=1)
    in_sum, steps = silenced(g[:, None], x), len(blocks(params["kernel"], width))

    def body(i, carry):
        dx, grads = carry
        head = rule.columns(params, i, width)
        dz = rule.slope(block(z, i, width), top, total, label, g, i, width).astype(x.dtype)
        share = {"kernel": product(in_sum, dz, (0, 0), head["kernel"]), "bias": jnp.sum(dz, axis=0, dtype=high)}
        dx = dx + product(dz, head["kernel"], (1, 1), x)
        return dx, {name: add_block(grads[name], share[name], i, width) for name in rule.names}

    dx, grads = lax.fori_loop(0, steps, body, lasting(partial(body, 0), (jnp.zeros_like(x, high), grads)))
    everything = weighed(rule.weights(jnp.zeros((), jnp.int32), vocab, high), z, top)
    return grads, (rule.values(top, total, own - top, everything, label), dx.astype(x.dtype))


def _rows(rule: LogitsLoss, x: Array, label: Array) -> tuple[Array, Array]:
    """Features [N, D], 0 for an ignored label, and labels [N]."""
    return flat(rule.seen(x, label)), whole(label).reshape(-1)
