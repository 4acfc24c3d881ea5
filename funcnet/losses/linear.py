"""A dense layer and its cross-entropy in one: logits over a large vocabulary, never whole.

With z = x @ kernel + bias [N, V] for features x [N, D], weights w of the classes, y the label, top = max_v z_v,
total = sum_v exp(z_v - top), lse = top + log total and q_v = w_v ((1 - s) [v = y] + s / V):

    l = sum_v q_v (log total - (z_v - top)) + c w_y lse^2

Backward, with g = dy of that position and softmax_v = exp(z_v - top) / total:

    dz      = g (softmax (sum_v q_v + 2 c w_y lse) - q)
    dx      = dz @ kernel^T
    dkernel = x^T dz            the factor Outer(x, dz)
    dbias   = sum_n dz          the factor Shift(dz)

`fwd` walks through blocks of the vocabulary and keeps a running maximum and sum of exponentials; `bwd` walks through
them again and forms the logits anew: four products of N D V instead of the three of logits that are kept, but of the
arrays [N, V] there is one block at a time. Contractions see a block at a time, too.

Where g is known before the values are, as the weights of a mean, three products suffice (`Loss.ahead`): then it is the
positions that are walked through in chunks, for each chunk all logits are formed once, and what follows from them at
once: values, dx, and this chunk's share of dkernel and dbias, block by block, added up in place.

Residuals: x [.., D], top [..], total [..], label [..].
Numerics: logits, sums and accumulated gradients in float32 for half precision; dz is rounded to x's dtype before its
products, as the cotangent of a `dense` layer is. Beside logits of size A, lse is rounded by A / 2^24: top and total
stay apart, and only the z-loss has that rounding. The features of an ignored label are not looked at, and a value
without weight, g = 0, has a gradient of 0 also where it is infinite or NaN.
Source: Milakov and Gimelshein 2018, arXiv:1805.02867 (running sum); Wijmans et al. 2024, arXiv:2411.09009, and Hsu et
al. 2024, arXiv:2410.10989 (logits in chunks); Chowdhery et al. 2022, arXiv:2204.02311, section 5 (z-loss).
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from math import ceil
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.nn import initializers

from funcnet import expect
from funcnet.arithmetic import entries_of, flat, lasting, pieces, placed, product, scan, whole, wide
from funcnet.columns import add_block, block, blocks, fresh
from funcnet.expect import InputError, describe
from funcnet.factors import Blocks, Outer, Shift
from funcnet.layer import stateless
from funcnet.layers.dense import Initializer, dense
from funcnet.losses.cross_entropy import (
    counts,
    ignored,
    integer_labels,
    label_mass,
    label_weights,
    standing,
)
from funcnet.losses.loss import Ahead, Loss, a_pair, as_loss, silenced

COLUMNS = 2048  # of dz at a time where all logits of a chunk are there: as many as stay in a cache


class Head(NamedTuple):
    """Residuals of `linear_cross_entropy`: features [.., D]; the logits' top, sum of exp(z - top), label, all [..]."""

    x: Array
    top: Array
    total: Array
    label: Array


def linear_cross_entropy(
    vocab: int,
    label_smoothing: float = 0.0,
    ignore_index: int | None = None,
    z_loss: float = 0.0,
    use_bias: bool = True,
    *,
    class_weights: Sequence[float] | np.ndarray | Array | None = None,
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
        class_weights: w [V], finite and not negative; None for ones. As in PyTorch's `CrossEntropyLoss(weight=w)`, the
            mean over labels y is divided by the sum of their w_y. The z-loss is weighted by w_y.
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
    z_loss = expect.not_negative(z_loss, "z_loss", "use 0 for none, or 1e-4")
    class_weights = None if class_weights is None else expect.weights(class_weights, "class_weights")
    if class_weights is not None and len(class_weights) != vocab:
        raise InputError(f"class_weights [{vocab}]", f"[{len(class_weights)}]", "give a weight for each class")
    uniform = label_smoothing * (1.0 if class_weights is None else float(np.mean(class_weights)))
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
        """Features [.., D] and labels [..] of a pair that fits, both also with their leading axes as one, N.

        There the features of an ignored label are 0.
        """
        a_pair(pair)
        check(*pair)
        fits(params, pair[0])
        x, label = pair
        return x, label, flat(seen(x, label)), whole(label).reshape(-1)

    def seen(x, label):
        """The features, 0 for an ignored label."""
        return x if ignore_index is None else jnp.where(counts(label, ignore_index)[..., None], x, 0.0)

    def columns(params, i, size):
        """Block i of the head."""
        return {name: block(params[name], i, size) for name in names}

    def logits(params, x):
        z = product(x, params["kernel"], (1, 0), x)
        return z + params["bias"].astype(z.dtype)[None] if use_bias else z

    def weights(i, size, dtype):
        """w of block i."""
        return jnp.ones(size, dtype) if class_weights is None else block(jnp.asarray(class_weights, dtype), i, size)

    def own_weight(label, dtype):
        """w_y of each label."""
        return jnp.ones(label.shape, dtype) if class_weights is None else label_weights(class_weights, label, dtype)

    def weighed(w, z, top):
        """sum_v w_v (z_v - top); a class that weighs nothing may be at -inf."""
        shifted = z - lax.optimization_barrier(top)[:, None]  # another one than the exponential's, so that none is kept
        return jnp.sum(jnp.where((w == 0)[None], 0.0, w[None] * shifted), axis=1)

    def values(top, total, own, everything, label):
        """l [N], from z_y - top and the sum over v of w_v (z_v - top)."""
        w, log_total = own_weight(label, top.dtype), jnp.log(total)
        loss = (1 - label_smoothing) * w * (log_total - jnp.where(w == 0, 0.0, own))
        if label_smoothing:
            loss = loss + uniform * log_total - label_smoothing / vocab * everything
        if z_loss:
            loss = loss + z_loss * w * jnp.square(top + log_total)
        factor = standing(label, vocab, ignore_index).astype(loss.dtype)
        return jnp.where(factor == 0, 0.0, factor * loss)

    def heard(dy, label):
        """g: 0 for an ignored label, NaN for one out of range whose value has a weight."""
        factor = standing(label, vocab, ignore_index).astype(dy.dtype)
        return jnp.where(factor == 0, 0.0, dy * silenced(dy, factor))

    def slope(z, top, total, label, g, i, size):
        """dz of block i, from its logits [N, size], and top, total, label and g [N].

        It is 0 for what an earlier block has too.
        """
        v, new = fresh(i, size, vocab)
        w = own_weight(label, z.dtype)
        mass = (1 - label_smoothing) * w + uniform
        if z_loss:
            mass = mass + 2 * z_loss * w * (top + jnp.log(total))
        q = (1 - label_smoothing) * (label[:, None] == v.astype(label.dtype)[None]).astype(z.dtype)
        q = weights(i, size, z.dtype)[None] * (q + label_smoothing / vocab)
        scale = mass / total
        silent = (g == 0) & ~(jnp.isfinite(top) & jnp.isfinite(scale))  # where both are finite, all of dz is
        dz = g[:, None] * (jnp.exp(z - top[:, None]) * scale[:, None] - q)
        return jnp.where(new[None] & ~silent[:, None], dz, 0.0)

    def init(key, pair):
        a_pair(pair)
        return head.init(key, pair[0])[0]

    def fwd(params, pair):
        x, label, rows, labels = entered(params, pair)
        size = even(vocab, chunk // entries_of(label.shape))
        zero = jnp.zeros_like(labels, wide(x.dtype))

        def body(sums, i):
            top, total, own, everything, past = sums
            v, new = fresh(i, size, vocab)
            z = logits(columns(params, i, size), rows)
            seen = jnp.where(new[None], z, -jnp.inf)
            higher = lax.stop_gradient(jnp.maximum(top, jnp.max(seen, axis=1)))
            shift = jnp.where(jnp.isneginf(higher), 0.0, higher)
            total = total * jnp.exp(top - shift) + jnp.sum(jnp.exp(seen - shift[:, None]), axis=1)
            hit = new[None] & (labels[:, None] == v.astype(labels.dtype)[None])
            own = own + jnp.sum(jnp.where(hit, z, 0.0), axis=1)
            w = jnp.where(new, weights(i, size, z.dtype), 0.0)
            risen = jnp.where(jnp.isneginf(top), 0.0, shift - top)
            everything = everything - past * risen + weighed(w, z, shift)
            return (higher, total, own, everything, past + jnp.sum(w)), None

        sums = jnp.full_like(zero, -jnp.inf), zero, zero, zero, jnp.zeros((), zero.dtype)
        (top, total, own, everything, _), _ = scan(body, sums, blocks(params["kernel"], size))
        loss = values(top, total, own - top, everything, labels)
        return loss.reshape(label.shape), Head(x, top.reshape(label.shape), total.reshape(label.shape), label)

    def bwd(params, residuals, dy, contract):
        x, top, total, label = residuals
        fits(params, x)
        g = heard(expect.cotangent(dy, label.shape, top.dtype), label)
        size = even(vocab, chunk // entries_of(label.shape))
        saved = params, seen(x, label), top, total, whole(label), g
        in_sum = silenced(g[..., None], x)

        def body(dx, i):
            head, dz = dz_of(saved, i, size)
            dx = dx + product(flat(dz), head["kernel"], (1, 1), flat(x))
            if contract.joined is None:
                return dx, None
            factors = {"kernel": Outer(in_sum, dz), "bias": Shift(dz)}
            return dx, {name: contract(factors[name], head[name]) for name in names}

        answers: Any
        dx, answers = scan(body, jnp.zeros_like(flat(x), top.dtype), blocks(params["kernel"], size))
        if contract.joined is None:
            factors = {"kernel": Blocks(saved, outer, size), "bias": Blocks(saved, shift, size)}
            dparams = {name: contract(factors[name], params[name]) for name in names}
        else:
            dparams = {name: contract.joined(answers[name], params[name]) for name in names}
        return dparams, (dx.astype(x.dtype).reshape(x.shape), None)

    def dz_of(saved, i, size):
        """Block i of the head, and of dz [.., size]."""
        params, x, *each = saved
        head, each = columns(params, i, size), [a.reshape(-1) for a in each]
        dz = slope(logits(head, flat(x)), *each, i, size)
        return head, dz.astype(x.dtype).reshape(*x.shape[:-1], size)

    def outer(saved, i, size):
        _, x, *_, g = saved
        return Outer(silenced(g[..., None], x), dz_of(saved, i, size)[1])

    def shift(saved, i, size):
        return Shift(dz_of(saved, i, size)[1])

    def both(params, pair, dy):
        x, label, rows, labels = entered(params, jax.tree.map(jnp.asarray, pair))
        high, width = wide(x.dtype), even(vocab, COLUMNS)
        g = heard(expect.cotangent(dy, label.shape, dy.dtype).astype(high).reshape(-1), labels)
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
            top = lax.stop_gradient(jnp.max(z, axis=1))
            total = jnp.sum(jnp.exp(z - top[:, None]), axis=1)
            own = jnp.sum(jnp.where(label[:, None] == jnp.arange(vocab, dtype=label.dtype)[None], z, 0.0), axis=1)

            def body(i, carry):
                dx, grads = carry
                head = columns(params, i, width)
                dz = slope(block(z, i, width), top, total, label, g, i, width).astype(x.dtype)
                share = {"kernel": product(in_sum, dz, (0, 0), head["kernel"]), "bias": jnp.sum(dz, axis=0, dtype=high)}
                dx = dx + product(dz, head["kernel"], (1, 1), x)
                return dx, {name: add_block(grads[name], share[name], i, width) for name in names}

            in_sum, steps = silenced(g[:, None], x), len(blocks(params["kernel"], width))
            dx, grads = lax.fori_loop(0, steps, body, lasting(partial(body, 0), (jnp.zeros_like(x, high), grads)))
            everything = weighed(weights(jnp.zeros((), jnp.int32), vocab, high), z, top)
            return grads, (values(top, total, own - top, everything, label), dx.astype(x.dtype))

        zeros = {name: placed(jnp.zeros(params[name].shape, high), params[name]) for name in names}
        grads, (loss, dx) = scan(chunk_of, zeros, (chunks(rows), chunks(labels), chunks(g)))
        dparams = {name: grads[name].astype(params[name].dtype) for name in names}
        return joined(loss).reshape(label.shape), (dparams, (joined(dx).reshape(x.shape), None))

    loss = as_loss(stateless("linear_cross_entropy", init, fwd, bwd))
    mass, ahead = label_mass(class_weights, ignore_index), Ahead(both, loss.fwd, loss.bwd)
    return replace(loss, counted=lambda t: counts(t, ignore_index), mass=mass, check=check, ahead=ahead)


def even(length: int, largest: int) -> int:
    """The size of blocks of `length` entries, all about alike, none above `largest`, but at least one entry."""
    return ceil(length / ceil(length / max(1, min(largest, length))))
