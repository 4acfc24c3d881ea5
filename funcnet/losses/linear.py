"""A dense layer and its cross-entropy in one: logits over a large vocabulary, never whole.

With z = x @ kernel + bias [N, V] for features x [N, D], q = (1 - s) onehot(label) + s / V, lse = log sum_v exp z_v:

    l = lse - sum_v q_v z_v + c lse^2

Backward, with g = dy of that position and softmax_v = exp(z_v - lse):

    dz      = g (softmax (1 + 2 c lse) - q)
    dx      = dz @ kernel^T
    dkernel = x^T dz            the factor Outer(x, dz)
    dbias   = sum_n dz          the factor Shift(dz)

`fwd` walks through blocks of the vocabulary and keeps a running maximum and sum of exponentials; `bwd` walks through
them again and forms the logits anew: four products of N D V instead of the three of logits that are kept, but of the
arrays [N, V] there is one block at a time. Contractions see a block at a time, too.

Where g is known before the values are, as the weights of a mean, three products suffice (`Loss.ahead`): then it is the
positions that are walked through in chunks, for each chunk all logits are formed once, and what follows from them at
once: values, dx, and this chunk's share of dkernel and dbias, block by block, added up in place.

Residuals: x [.., D], lse [..], label [..].
Numerics: logits, sums and accumulated gradients in float32 for half precision; dz is rounded to x's dtype before its
products, as the cotangent of a `dense` layer is.
Source: Milakov and Gimelshein 2018, arXiv:1805.02867 (running sum); Wijmans et al. 2024, arXiv:2411.09009, and Hsu et
al. 2024, arXiv:2410.10989 (logits in chunks); Chowdhery et al. 2022, arXiv:2204.02311, section 5 (z-loss).
"""

from dataclasses import replace
from functools import partial
from math import ceil
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax, nn
from jax.nn import initializers

from funcnet import expect
from funcnet.arithmetic import entries_of, flat, lasting, pieces, placed, product, scan, whole, wide
from funcnet.columns import add_block, block, blocks, fresh
from funcnet.expect import InputError, describe
from funcnet.factors import Blocks, Outer, Shift
from funcnet.layer import stateless
from funcnet.layers.dense import Initializer, dense
from funcnet.losses.cross_entropy import counts, ignored, integer_labels
from funcnet.losses.loss import Ahead, Loss, a_pair, as_loss

COLUMNS = 2048  # of dz at a time where all logits of a chunk are there: as many as stay in a cache


class Head(NamedTuple):
    """Residuals of `linear_cross_entropy`: features [.., D], log of the sum of exponentials [..], label [..]."""

    x: Array
    lse: Array
    label: Array


def linear_cross_entropy(
    vocab: int,
    label_smoothing: float = 0.0,
    ignore_index: int | None = None,
    z_loss: float = 0.0,
    use_bias: bool = True,
    *,
    chunk: int = 2**24,
    kernel_init: Initializer = initializers.lecun_normal(),
    bias_init: Initializer = initializers.zeros,
) -> Loss:
    """`cross_entropy` of `dense(vocab)` of the features [.., D], in one layer: a value for each entry of [..].

    Its params are those of the head, `dense`: kernel [D, V] and bias [V]. For inference

        logits = fn.dense(vocab).apply(head_params, (), features)

    As the loss of an objective it is the last layer too: the model ends with the features, and the params are
    {"model": .., "loss": head_params}. `value_and_grad` and `train_step` know the weights beforehand and make both
    passes in one, three products of N D V, with `chunk` logits at a time.

    Args:
        vocab: V.
        label_smoothing: s, 0 <= s < 1. A positive one asks for a share of every class.
        ignore_index: labels of this value have loss 0 and do not count in a mean.
        z_loss: c, the weight of lse^2, which keeps the logits near zero; not negative, mostly about 1e-4.
        use_bias: whether the head has a bias.
        chunk: about how many logits there are at a time; in memory, times 4 bytes (8 for float64).
        kernel_init, bias_init: of the head, as in `dense`.

    Target: integers [..] in [0, V). Others are refused where they can be read; under `jit` they give NaN. It has no
    metrics: accuracy would take the logits once more.

    Contractions: `fn.keep` keeps `Blocks`, which hold the kernel and form dz when they are contracted.

    Raises:
        InputError: for features or labels that do not fit the head, and for options out of range.
    """
    vocab, chunk = expect.count(vocab, "vocab"), expect.count(chunk, "chunk")
    label_smoothing = expect.fraction(label_smoothing, "label_smoothing", "use 0 for plain labels")
    ignore_index = ignored(ignore_index)
    if not 0 <= z_loss < float("inf"):
        raise InputError("a z_loss that is not negative", f"{z_loss}", "use 0 for none, or 1e-4")
    head = dense(vocab, use_bias, kernel_init=kernel_init, bias_init=bias_init)
    names = ("kernel", "bias") if use_bias else ("kernel",)

    def check(x: Any, label: Any) -> None:
        expect.float_array(x)
        integer_labels(label, x.shape[:-1], vocab, f"{vocab} classes and features {describe(x)}", ignore_index)

    def fits(params, x):
        if not params:
            remedy = 'make them with objective.init or fn.init_train_state: params are {"model": .., "loss": ..}'
            raise InputError(f"the head's parameters {', '.join(names)}", "none", remedy)
        expect.float_array(x, features=expect.size(params, "kernel"))
        shapes = {"kernel": (x.shape[-1], vocab), "bias": (vocab,)}
        expect.fields(params, x.dtype, {name: shapes[name] for name in names})

    def entered(params, pair):
        """Features [.., D] and labels [..] of a pair that fits, both also with their leading axes as one, N."""
        a_pair(pair)
        check(*pair)
        fits(params, pair[0])
        x, label = pair
        return x, label, flat(x), whole(label).reshape(-1)

    def columns(params, i, size):
        """Block i of the head."""
        return {name: block(params[name], i, size) for name in names}

    def logits(params, x):
        z = product(x, params["kernel"], (1, 0), x)
        return z + params["bias"].astype(z.dtype)[None] if use_bias else z

    def inside(label):
        return (label >= 0) & (label < vocab)

    def values(lse, own, everything, label):
        """l [N], from lse and the sums over v of [v = label] z_v and of z_v."""
        loss = lse - (1 - label_smoothing) * own + z_loss * jnp.square(lse)
        if label_smoothing:
            loss = loss - label_smoothing / vocab * everything
        return jnp.where(counts(label, ignore_index), jnp.where(inside(label), loss, jnp.nan), 0.0)

    def slope(z, lse, label, g, i, size):
        """dz of block i, from its logits [N, size], and lse, label and g [N]; 0 for what an earlier block has too."""
        v, new = fresh(i, size, vocab)
        softmax = jnp.exp(z - lse[:, None])
        q = (1 - label_smoothing) * (label[:, None] == v.astype(label.dtype)[None]).astype(z.dtype)
        dz = g[:, None] * (softmax * (1 + 2 * z_loss * lse[:, None]) - (q + label_smoothing / vocab))
        dz = jnp.where(inside(label)[:, None], dz, jnp.nan)
        return jnp.where(new[None] & counts(label, ignore_index)[:, None], dz, 0.0)

    def init(key, pair):
        a_pair(pair)
        return head.init(key, pair[0])[0]

    def fwd(params, pair):
        x, label, rows, labels = entered(params, pair)
        size = even(vocab, chunk // entries_of(label.shape))
        zero = jnp.zeros_like(labels, wide(x.dtype))

        def body(sums, i):
            top, total, own, everything = sums
            v, new = fresh(i, size, vocab)
            z = logits(columns(params, i, size), rows)
            seen = jnp.where(new[None], z, -jnp.inf)
            higher = lax.stop_gradient(jnp.maximum(top, jnp.max(seen, axis=1)))
            shift = jnp.where(jnp.isneginf(higher), 0.0, higher)
            total = total * jnp.exp(top - shift) + jnp.sum(jnp.exp(seen - shift[:, None]), axis=1)
            hit = new[None] & (labels[:, None] == v.astype(labels.dtype)[None])
            own = own + jnp.sum(jnp.where(hit, z, 0.0), axis=1)
            everything = everything + jnp.sum(jnp.where(new[None], z, 0.0), axis=1)
            return (higher, total, own, everything), None

        sums = jnp.full_like(zero, -jnp.inf), zero, zero, zero
        (top, total, own, everything), _ = scan(body, sums, blocks(params["kernel"], size))
        lse = jnp.log(total) + top
        return values(lse, own, everything, labels).reshape(label.shape), Head(x, lse.reshape(label.shape), label)

    def bwd(params, residuals, dy, contract):
        x, lse, label = residuals
        fits(params, x)
        g = expect.cotangent(dy, label.shape, lse.dtype)
        saved, size = (params, x, lse, whole(label), g), even(vocab, chunk // entries_of(label.shape))

        def body(dx, i):
            head, dz = dz_of(saved, i, size)
            dx = dx + product(flat(dz), head["kernel"], (1, 1), flat(x))
            if contract.joined is None:
                return dx, None
            factors = {"kernel": Outer(x, dz), "bias": Shift(dz)}
            return dx, {name: contract(factors[name], head[name]) for name in names}

        answers: Any
        dx, answers = scan(body, jnp.zeros_like(flat(x), lse.dtype), blocks(params["kernel"], size))
        if contract.joined is None:
            factors = {"kernel": Blocks(saved, outer, size), "bias": Blocks(saved, shift, size)}
            dparams = {name: contract(factors[name], params[name]) for name in names}
        else:
            dparams = {name: contract.joined(answers[name], params[name]) for name in names}
        return dparams, (dx.astype(x.dtype).reshape(x.shape), None)

    def dz_of(saved, i, size):
        """Block i of the head, and of dz [.., size]."""
        params, x, lse, label, g = saved
        head = columns(params, i, size)
        dz = slope(logits(head, flat(x)), lse.reshape(-1), label.reshape(-1), g.reshape(-1), i, size)
        return head, dz.astype(x.dtype).reshape(*label.shape, size)

    def outer(saved, i, size):
        return Outer(saved[1], dz_of(saved, i, size)[1])

    def shift(saved, i, size):
        return Shift(dz_of(saved, i, size)[1])

    def both(params, pair, weights):
        x, label, rows, labels = entered(params, jax.tree.map(jnp.asarray, pair))
        high, width = wide(x.dtype), even(vocab, COLUMNS)
        g = expect.cotangent(weights, label.shape, weights.dtype).astype(high).reshape(-1)
        cut = pieces(rows)
        size = cut * even(entries_of(label.shape) // cut, chunk // vocab // cut)
        count = -(-rows.shape[0] // size)

        def chunks(a):
            """[N, ..] as [chunks, size, ..], what is added at the end with weight 0.

            A chunk has every n-th position, n the number of chunks, so that a batch that is cut along a mesh stays so,
            and as many positions of each piece.
            """
            padded = jnp.pad(a, [(0, size * count - a.shape[0])] + [(0, 0)] * (a.ndim - 1))
            return jnp.moveaxis(padded.reshape(size, count, *a.shape[1:]), 1, 0)

        def joined(a):
            return jnp.moveaxis(a, 0, 1).reshape(-1, *a.shape[2:])[: rows.shape[0]]

        def chunk_of(grads, each):
            x, label, g = each
            z = logits(params, x)
            lse = nn.logsumexp(z, axis=1)
            own = jnp.sum(jnp.where(label[:, None] == jnp.arange(vocab, dtype=label.dtype)[None], z, 0.0), axis=1)

            def body(i, carry):
                dx, grads = carry
                head = columns(params, i, width)
                dz = slope(block(z, i, width), lse, label, g, i, width).astype(x.dtype)
                share = {"kernel": product(x, dz, (0, 0), head["kernel"]), "bias": jnp.sum(dz, axis=0, dtype=high)}
                dx = dx + product(dz, head["kernel"], (1, 1), x)
                return dx, {name: add_block(grads[name], share[name], i, width) for name in names}

            steps = len(blocks(params["kernel"], width))
            dx, grads = lax.fori_loop(0, steps, body, lasting(partial(body, 0), (jnp.zeros_like(x, high), grads)))
            return grads, (values(lse, own, jnp.sum(z, axis=1), label), dx.astype(x.dtype))

        zeros = {name: placed(jnp.zeros(params[name].shape, high), params[name]) for name in names}
        grads, (loss, dx) = scan(chunk_of, zeros, (chunks(rows), chunks(labels), chunks(g)))
        dparams = {name: grads[name].astype(params[name].dtype) for name in names}
        return joined(loss).reshape(label.shape), (dparams, (joined(dx).reshape(x.shape), None))

    loss = as_loss(stateless("linear_cross_entropy", init, fwd, bwd))
    return replace(loss, counted=lambda t: counts(t, ignore_index), check=check, ahead=Ahead(both, loss.fwd, loss.bwd))


def even(length: int, largest: int) -> int:
    """The size of blocks of `length` entries, all about alike, none above `largest`, but at least one entry."""
    return ceil(length / ceil(length / max(1, min(largest, length))))
