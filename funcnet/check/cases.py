"""The library's own rules, each at the shapes and options it is checked at: one table for tests, command and readers.

A name is the constructor's, then what is special. Shapes have odd sizes and sizes of one, and from one axis to five;
the order is that of the library: layers, losses, combinators.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.nn import initializers as _init

from funcnet.check.checker import ORACLES, check_layer
from funcnet.check.report import Report
from funcnet.combinators.freeze import freeze
from funcnet.combinators.mixed import mixed
from funcnet.combinators.moe import moe
from funcnet.combinators.named import named
from funcnet.combinators.packed import packed
from funcnet.combinators.parallel import branch, parallel
from funcnet.combinators.recurrent import bidirectional, stacked
from funcnet.combinators.remat import remat
from funcnet.combinators.repeat import repeat
from funcnet.combinators.reversible import reversible
from funcnet.combinators.routing import RouterTotals, router_totals
from funcnet.combinators.serial import serial
from funcnet.combinators.sides import select
from funcnet.combinators.skip import skip
from funcnet.combinators.spectral_norm import spectral_norm
from funcnet.combinators.tied import tied
from funcnet.combinators.weight_norm import weight_norm
from funcnet.compositions import mlp, residual_block, separable_conv, transformer_block
from funcnet.gradients.factor import Use
from funcnet.interop.jax import from_function
from funcnet.layer import Layer, elementwise, no_params, stateless
from funcnet.layers.activation import (
    celu,
    elu,
    gelu,
    hard_sigmoid,
    hard_silu,
    hard_tanh,
    identity,
    leaky_relu,
    log_sigmoid,
    mish,
    relu,
    relu6,
    selu,
    sigmoid,
    silu,
    softplus,
    softsign,
    squareplus,
    tanh,
)
from funcnet.layers.attention import attention
from funcnet.layers.batch_norm import batch_norm
from funcnet.layers.bilinear import bilinear
from funcnet.layers.conv import conv, depthwise_conv
from funcnet.layers.conv_transpose import conv_transpose
from funcnet.layers.dense import dense
from funcnet.layers.dropout import drop_path, dropout, spatial_dropout
from funcnet.layers.embedding import embedding
from funcnet.layers.gate import geglu, glu, swiglu
from funcnet.layers.join import add, concat
from funcnet.layers.lru import lru
from funcnet.layers.norm import layer_norm, rms_norm
from funcnet.layers.normalize import group_norm, instance_norm, l2_normalize
from funcnet.layers.piecewise import maxout, prelu
from funcnet.layers.pool import avg_pool, global_avg_pool, global_max_pool, max_pool
from funcnet.layers.positions import position_embedding, sinusoidal_positions
from funcnet.layers.recurrent import gru, lstm, rnn
from funcnet.layers.reshape import flatten, reshape
from funcnet.layers.softmax import log_softmax, softmax
from funcnet.losses.binary import binary_cross_entropy, focal
from funcnet.losses.cross_entropy import cross_entropy
from funcnet.losses.ctc import ctc
from funcnet.losses.divergence import kl_divergence
from funcnet.losses.linear import linear_cross_entropy
from funcnet.losses.margin import hinge, triplet
from funcnet.losses.regression import huber, mae, mse
from funcnet.losses.router import router_losses
from funcnet.losses.similarity import contrastive, cosine

DTYPES = ("float64", "float32", "bfloat16", "float16")
WIDE = DTYPES[:2]  # of layers that refuse half precision
UNSEEN = tuple(oracle for oracle in ORACLES if oracle != "numerical")
_LARGE = DTYPES[:3]  # of numbers beyond float16


@dataclass(frozen=True, eq=False)
class Case:
    """A layer and an input to check it at.

    Attributes:
        name: the constructor's name, and after a slash what is special.
        layer: the layer.
        x: its input in the texts of `funcnet.check.spec`, or a tuple of them; floating arrays are cast to each dtype.
        dtypes: those it is checked in.
        oracles: those that it is put before; numerical differences see through `stop_gradient`.
    """

    name: str
    layer: Layer
    x: Any
    dtypes: tuple[str, ...] = DTYPES
    oracles: tuple[str, ...] = ORACLES

    @property
    def constructor(self) -> str:
        """The name of the function that makes the layer."""
        return self.name.split("/")[0]

    def check(self, dtype: str = "", oracles: Sequence[str] = (), **options: Any) -> Report:
        """`fn.check_layer` in one of its dtypes, the first by default.

        By default the first is put before all of the case's oracles, the others before autodiff alone.
        """
        dtype = dtype or self.dtypes[0]
        oracles = oracles or (self.oracles if dtype == self.dtypes[0] else ("autodiff",))
        return check_layer(self.layer, self.x, dtype=dtype, oracles=oracles, **options)


def _softmax() -> Layer:
    """A rule as a user may write it: y = e^x / sum(e^x) over the last axis, dx = y (dy - sum(dy y))."""

    def fwd(params, x):
        e = jnp.exp(x - jnp.max(x, -1, keepdims=True))
        y = e / jnp.sum(e, -1, keepdims=True)
        return y, y

    def bwd(params, y, dy, contract):
        return {}, y * (dy - jnp.sum(dy * y, -1, keepdims=True))

    return stateless("softmax", no_params, fwd, bwd)


def _any_use() -> Layer:
    """y = (x @ kernel) * table[ids], its factors nothing but the two uses."""

    def init(key, x):
        return {"kernel": jnp.ones((x["x"].shape[-1], 3), x["x"].dtype), "table": jnp.ones((4, 3), x["x"].dtype)}

    def of_kernel(kernel, given):
        return (given["x"] @ kernel) * given["rows"][:, None]

    def of_table(table, given):
        return given["z"] * table[given["ids"]][:, None]

    def fwd(params, given):
        return of_kernel(params["kernel"], {"x": given["x"], "rows": params["table"][given["ids"]]}), given

    def bwd(params, given, dy, contract):
        kernel, rows = params["kernel"], params["table"][given["ids"]]
        uses = {
            "kernel": Use(of_kernel, {"x": given["x"], "rows": rows}, dy),
            "table": Use(of_table, {"z": given["x"] @ kernel, "ids": given["ids"]}, dy),
        }
        dparams = {name: contract(use, params[name]) for name, use in uses.items()}
        return dparams, {"x": (dy * rows[:, None]) @ kernel.T, "ids": None}

    return stateless("any_use", init, fwd, bwd)


def _spread(positions: int) -> Layer:
    """x [B, D] at every one of T positions, [B, T, D]."""

    def fwd(params, x):
        return jnp.repeat(x[:, None], positions, axis=1), jnp.zeros((0,), x.dtype)

    return stateless("spread", no_params, fwd, lambda params, residuals, dy, contract: ({}, jnp.sum(dy, axis=1)))


def _centred(share: Sequence[float]) -> Layer:
    """x [B, T, F] less the mean over positions, but for a share s of it, over s; examples have these shares in turn."""

    def centred(x):
        s = jnp.asarray(share, x.dtype)[jnp.arange(x.shape[0], dtype=jnp.int32) % len(share), None, None]
        return (x - (1 - s) * jnp.mean(x, axis=1, keepdims=True)) / s

    def fwd(params, x):
        return centred(x), jnp.zeros((0,), x.dtype)

    return stateless("centred", no_params, fwd, lambda params, residuals, dy, contract: ({}, centred(dy)))


# Shares of the positions in a kernel's gradient that all but cancel, in some examples: no Gram matrix tells the rest.
_CANCELLING = serial(_spread(3), dense(6, use_bias=False), _centred([1e-7, 1.0, 1e-7, 0.5]))
_TWICE = branch(a=dense(6, use_bias=False), b=dense(6, use_bias=False))
_CANCELLING_TWICE = tied(
    serial(_spread(2), uses=_TWICE, add=add(), centred=_centred([1e-7, 1.0, 1e-7, 0.5])),
    {"uses/b/kernel": "uses/a/kernel"},
)

_USED = {"x": "f32[5,3,2]", "ids": "i32[5]<4"}

_SEQUENCES = {"x": "f32[3,4,2]", "lengths": "i32[3]<5"}

_ATTENDED = {"x": "f32[2,4,5]", "mask": "bool[2,4,5]", "bias": "f32[2,4,4,5]", "lengths": "i32[2]<6"}


def _aligned(labels: str, label_lengths: str, logit_lengths: str) -> dict[str, str]:
    """A target of `ctc`."""
    return {"labels": labels, "label_lengths": label_lengths, "logit_lengths": logit_lengths}


_WEIGHTS = [0.5, 2.0, 0.0, 1.0, 3.0]  # of classes


def _masked(target: str) -> dict[str, str]:
    """A target [..] with a mask for each entry."""
    return {"target": target, "mask": f"bool{target[target.index('[') : target.index(']') + 1]}"}


_BLOCK = serial(layer_norm(), dense(3), gelu(), dense(5))

_ATTENDING = skip(attention(2))
_SEGMENTS = {"x": "f32[2,5,4]", "segments": "i32[2,5]<3"}
_ROUTED = {"x": "f32[3,4]", "router": RouterTotals("f32[3]", "f32[3]", "i32[3]<4")}
_LENGTHS = {"x": "f32[2,3,4]", "lengths": "i32[2]<4"}
_BEGUN = {"x": "f32[2,3,4]", "state": ("f32[2,2]", "f32[2,2]")}
_BIASED = {"x": "f32[2,3,4]", "bias": "f32[2,3,3]"}

_TRANSPOSED = {"head/kernel": "embedding/embedding.T"}
_LANGUAGE = serial(embedding(7, 5), layer_norm(), head=dense(7))
_DROPPING = serial(dense(3), dropout(0.4))
_SQUARE = serial(dense(3), tanh(), dense(3))


def _affine(params, x):
    return jnp.tanh(x @ params["kernel"]) * params["scale"].reshape((1,) * (x.ndim - 1) + (-1,))


def _affine_init(key, x):
    return dense(x.shape[-1], use_bias=False).init(key, x)[0] | {"scale": jnp.ones(x.shape[-1], x.dtype)}


def _chosen(params, x):
    return {"y": jnp.take_along_axis(x["x"], x["ids"][:, None], 1), "next": x["ids"] + 1}


CASES: tuple[Case, ...] = (
    Case("dense", dense(3), "f32[4,5]"),
    Case("dense/rank 1", dense(3), "f32[5]"),
    Case("dense/rank 3", dense(4), "f32[3,2,5]"),
    Case("dense/rank 5", dense(2), "f32[2,1,3,2,5]"),
    Case("dense/one feature of one", dense(1), "f32[1,1]"),
    Case("dense/one feature to many", dense(7), "f32[3,1]"),
    Case("dense/one example", dense(3), "f32[1,5]"),
    Case("dense/no bias", dense(3, use_bias=False), "f32[4,5]"),
    Case("dense/initializers", dense(3, kernel_init=_init.he_uniform(), bias_init=_init.ones), "f32[4,5]"),
    Case("embedding", embedding(7, 5), "i32[4,3]<7"),
    Case("embedding/one id", embedding(5, 3), "i8[]<5"),
    Case("embedding/no positions", embedding(3, 2), "u8[4]<3"),
    Case("embedding/no ids", embedding(7, 5), "i32[0,3]<7"),
    Case("embedding/more positions than features", embedding(3, 2), "i16[2,5]<3"),
    Case("embedding/padding", embedding(4, 3, padding_id=2), "i32[3,5]<4", oracles=UNSEEN),
    Case("embedding/rank 4", embedding(4, 1), "i32[2,1,3,2]<4"),
    Case("position_embedding", position_embedding(3), "f32[4,3,5]"),
    Case("position_embedding/fewer positions", position_embedding(4), "f32[2,3,2]"),
    Case("position_embedding/rank 4", position_embedding(3), "f32[2,2,3,1]"),
    Case("position_embedding/no batch", position_embedding(3), "f32[2,5]"),
    Case("sinusoidal_positions", sinusoidal_positions(), "f32[4,3,6]"),
    Case("sinusoidal_positions/base", sinusoidal_positions(20.0), "f32[5,2]"),
    Case("layer_norm", layer_norm(), "f32[4,5]"),
    Case("layer_norm/rank 1", layer_norm(), "f32[5]"),
    Case("layer_norm/rank 5", layer_norm(), "f32[2,1,3,2,7]"),
    Case("layer_norm/one feature", layer_norm(), "f32[3,1]"),
    Case("layer_norm/large eps", layer_norm(eps=0.3), "f32[4,5]"),
    Case("layer_norm/large rows", layer_norm(), "f32[4,5]>-3e20<3e20", _LARGE),
    Case("rms_norm", rms_norm(), "f32[4,5]"),
    Case("rms_norm/rank 1", rms_norm(), "f32[5]"),
    Case("rms_norm/rank 5", rms_norm(), "f32[2,1,3,2,7]"),
    Case("rms_norm/one feature", rms_norm(), "f32[3,1]"),
    Case("rms_norm/one feature, large eps", rms_norm(eps=0.3), "f32[3,1]"),
    Case("rms_norm/large eps", rms_norm(eps=0.3), "f32[4,5]"),
    Case("rms_norm/large rows", rms_norm(), "f32[4,5]>-3e20<3e20", _LARGE),
    Case("batch_norm", batch_norm(), "f32[6,3]"),
    Case("batch_norm/rank 4", batch_norm(momentum=0.7, eps=0.3), "f32[3,2,3,2]"),
    Case("batch_norm/no bias", batch_norm(use_bias=False), "f32[5,1,4]"),
    Case("batch_norm/no parameters", batch_norm(use_scale=False, use_bias=False), "f32[4,3,1]"),
    Case("batch_norm/one value a feature", batch_norm(eps=0.3), "f32[1,3]"),
    Case("batch_norm/far from zero", batch_norm(), "f32[6,3]>101324<101326", WIDE),
    Case("batch_norm/large features", batch_norm(), "f32[6,3]>-3e20<3e20", _LARGE),
    Case("serial/batch_norm between", serial(dense(3, use_bias=False), batch_norm(eps=0.1), dense(2)), "f32[5,4]"),
    Case("repeat/of a batch_norm", repeat(serial(batch_norm(eps=0.1), dense(4)), 2), "f32[5,4]"),
    Case("group_norm", group_norm(2), "f32[4,3,6]"),
    Case("group_norm/one group", group_norm(1), "f32[3,5]"),
    Case("group_norm/rank 5", group_norm(3), "f32[2,1,3,2,3]"),
    Case("group_norm/large eps", group_norm(2, eps=0.3), "f32[2,4,4]"),
    Case("group_norm/large groups", group_norm(2), "f32[2,3,4]>-3e20<3e20", _LARGE),
    Case("instance_norm", instance_norm(), "f32[3,6,5]"),
    Case("instance_norm/rank 4", instance_norm(), "f32[2,3,3,2]"),
    Case("instance_norm/one position, large eps", instance_norm(eps=0.3), "f32[3,1,2]"),
    Case("instance_norm/large channels", instance_norm(), "f32[2,5,3]>-3e20<3e20", _LARGE),
    Case("l2_normalize", l2_normalize(), "f32[4,5]"),
    Case("l2_normalize/rank 1", l2_normalize(), "f32[3]"),
    Case("l2_normalize/rank 4", l2_normalize(), "f32[2,1,3,4]"),
    Case("l2_normalize/large rows", l2_normalize(), "f32[4,5]>-3e20<3e20", _LARGE),
    Case("conv", conv(4, 3), "f32[2,5,4,3]"),
    Case("conv/strides", conv(4, 3, 2, "VALID"), "f32[2,6,8,3]"),
    Case("conv/dilation, pads", conv(2, (2, 3), (2, 1), ((0, 3), (4, 1)), dilation=(3, 2)), "f32[2,7,5,3]"),
    Case("conv/groups", conv(6, 3, 2, groups=2), "f32[2,5,4,4]"),
    Case("conv/depthwise", conv(3, 3, (1, 2), dilation=(2, 1), groups=3), "f32[2,5,6,3]"),
    Case("conv/one axis, one entry", conv(2, 1, 2), "f32[2,5,3]"),
    Case("conv/three axes, no bias", conv(2, 2, use_bias=False), "f32[1,3,2,3,2]"),
    Case("conv/kernel larger than the input", conv(5, (3, 2), 1, ((2, 0), (1, 3)), dilation=(1, 2)), "f32[1,2,2,4]"),
    Case("conv/one axis, kernel larger than the input", conv(8, 3), "f32[1,2,9]"),
    Case("conv/groups of three", conv(4, 3, groups=2), "f32[2,5,6]"),
    Case("conv/depthwise, rows left over", conv(2, (3, 2), groups=2), "f32[2,9,3,2]"),
    Case("conv_transpose", conv_transpose(4, 3, 2), "f32[2,3,2,3]"),
    Case("conv_transpose/valid", conv_transpose(2, (2, 3), (3, 1), "VALID"), "f32[2,2,3,3]"),
    Case(
        "conv_transpose/dilation, pads", conv_transpose(2, 3, (1, 2), ((2, 5), (1, 3)), dilation=(2, 1)), "f32[2,3,2,2]"
    ),
    Case("conv_transpose/one axis, one entry", conv_transpose(2, 1, 2), "f32[2,3,3]"),
    Case("conv_transpose/three axes, no bias", conv_transpose(2, 2, use_bias=False), "f32[1,2,3,1,2]"),
    Case("depthwise_conv", depthwise_conv(3, multiplier=2), "f32[2,4,3,3]"),
    Case("depthwise_conv/uneven", depthwise_conv((2, 3), (2, 1)), "f32[2,19,5,3]"),
    Case("depthwise_conv/one axis, strides", depthwise_conv(3, 2, "VALID", use_bias=False), "f32[2,6,2]"),
    Case("separable_conv", separable_conv(4, 3, 2), "f32[2,5,4,3]"),
    Case("max_pool", max_pool(2), "f32[2,4,5,3]"),
    Case("max_pool/overlapping", max_pool(3, 2), "f32[2,5,7,2]"),
    Case("max_pool/one axis, same", max_pool(3, 2, "SAME"), "f32[2,6,3]"),
    Case("max_pool/three axes, pads", max_pool((2, 1, 3), (2, 1, 1), ((1, 0), (0, 0), (1, 2))), "f32[1,3,2,3,2]"),
    Case("max_pool/pads in front", max_pool(3, 1, ((2, 0), (1, 0))), "f32[2,4,5,2]"),
    Case("max_pool/gaps", max_pool(2, 3), "f32[1,8,6,1]"),
    Case("avg_pool", avg_pool(2), "f32[2,4,5,3]"),
    Case("avg_pool/overlapping, same", avg_pool(3, 2, "SAME"), "f32[2,5,6,2]"),
    Case("avg_pool/pads left out", avg_pool(3, 1, 1, count_include_pad=False), "f32[2,4,3,1]"),
    Case("avg_pool/one axis", avg_pool(3, 2), "f32[2,7,3]"),
    Case("global_max_pool", global_max_pool(), "f32[2,3,5,3]"),
    Case("global_max_pool/one axis", global_max_pool(), "f32[3,5,1]"),
    Case("global_avg_pool", global_avg_pool(), "f32[2,3,5,3]"),
    Case("global_avg_pool/three axes", global_avg_pool(), "f32[1,3,2,1,5]"),
    Case("dropout", dropout(0.4), "f32[4,5]"),
    Case("dropout/rate 0", dropout(0.0), "f32[3]"),
    Case("dropout/rank 5", dropout(0.9), "f32[2,1,3,2,5]"),
    Case("rnn", rnn(3), "f32[2,5,4]"),
    Case("rnn/lengths, reverse", rnn(2, reverse=True), _SEQUENCES),
    Case("rnn/states", rnn(2, return_state=True), {"x": "f32[3,2,1]", "state": "f32[3,2]"}),
    Case("gru", gru(3), "f32[2,5,4]"),
    Case("gru/lengths, reverse, states", gru(2, reverse=True, return_state=True), _SEQUENCES | {"state": "f32[3,2]"}),
    Case("lstm", lstm(3), "f32[2,5,4]"),
    Case("lstm/one of all", lstm(1), "f32[1,1,1]"),
    Case("lstm/lengths, states", lstm(2, return_state=True), _SEQUENCES | {"state": ("f32[3,2]", "f32[3,2]")}),
    Case("lstm/lengths, reverse", lstm(2, reverse=True), _SEQUENCES),
    Case("bidirectional", bidirectional(lstm(3), lstm(3, reverse=True)), "f32[2,3,4]"),
    Case(
        "bidirectional/lengths, states",
        bidirectional(gru(2, return_state=True), gru(2, reverse=True, return_state=True)),
        _SEQUENCES | {"state": ("f32[3,2]", "f32[3,2]")},
    ),
    Case("bidirectional/lengths", bidirectional(gru(2), rnn(2, reverse=True)), _SEQUENCES),
    Case("stacked", stacked(gru(2), rnn(3, reverse=True)), "f32[2,3,4]"),
    Case("stacked/lengths", stacked(gru(2), rnn(3)), _SEQUENCES),
    Case(
        "stacked/lengths, states",
        stacked(lstm(2, return_state=True), gru(3, return_state=True)),
        _SEQUENCES | {"state": (("f32[3,2]", "f32[3,2]"), "f32[3,3]")},
    ),
    Case("lru", lru(3, 4), "f32[2,5,3]"),
    Case("lru/one step", lru(2, 1), "f32[3,1,1]"),
    Case("lru/slow decay", lru(1, 3, r_min=0.9, r_max=0.99, max_phase=0.5), "f32[1,7,2]"),
    Case("attention", attention(2), "f32[2,5,4]"),
    Case("attention/one query, one feature", attention(1, rate=0.3), {"x": "f32[1,1,1]", "context": "f32[1,2,1]"}),
    Case("attention/causal, tiles", attention(2, causal=True, block=2), "f32[2,5,4]"),
    Case("attention/window, tiles", attention(2, window=2, block=2), "f32[2,7,4]"),
    Case("attention/causal window", attention(1, causal=True, window=3, use_bias=False), "f32[1,6,3]"),
    Case(
        "attention/shared keys, rotary",
        attention(4, kv_heads=2, head_dim=2, rotary=True, rotary_base=9.0, features=3),
        "f32[2,3,5]",
    ),
    Case(
        "attention/cross, masks, tiles",
        attention(4, kv_heads=2, head_dim=3, block=3),
        _ATTENDED | {"context": "f32[2,5,2]"},
    ),
    Case("attention/a mask for each head", attention(2), {"x": "f32[2,3,4]", "mask": "bool[2,2,3,3]"}),
    Case("attention/a bias for all heads", attention(2, block=2), {"x": "f32[2,3,4]", "bias": "f32[2,3,3]"}),
    Case("attention/one key, tiles of queries", attention(2, block=2), {"x": "f32[2,5,4]", "context": "f32[2,1,3]"}),
    Case(
        "attention/causal, fewer keys, uneven tiles",
        attention(2, causal=True, block=3),
        {"x": "f32[2,8,4]", "context": "f32[2,4,3]"},
    ),
    Case(
        "attention/causal, more keys, uneven tiles",
        attention(1, causal=True, block=2),
        {"x": "f32[2,3,2]", "context": "f32[2,7,3]"},
    ),
    Case(
        "attention/window of fewer keys, tiles",
        attention(1, window=4, block=2),
        {"x": "f32[2,9,2]", "context": "f32[2,4,3]"},
    ),
    Case("attention/window of all, tiles", attention(1, causal=True, window=9, block=2), "f32[2,5,2]"),
    Case("attention/dropped weights, tiles", attention(2, causal=True, rate=0.4, block=3), "f32[2,5,4]"),
    Case("mlp", mlp(6, 3), "f32[4,5]"),
    Case("mlp/gated, dropped", mlp(3, 4, gated=True, rate=0.3, use_bias=False), "f32[2,3,5]"),
    Case("mlp/activation", mlp(2, 1, activation=tanh()), "f32[5]"),
    Case("transformer_block", transformer_block(4, 2, causal=True), "f32[2,3,4]"),
    Case(
        "transformer_block/options",
        transformer_block(
            4, 2, hidden=3, kv_heads=1, rotary=True, window=2, norm=rms_norm, gated=True, rate=0.2, attention_rate=0.3
        ),
        "f32[2,3,4]",
    ),
    Case("spatial_dropout", spatial_dropout(0.4), "f32[4,3,5]"),
    Case("spatial_dropout/no positions", spatial_dropout(0.4), "f32[4,5]"),
    Case("spatial_dropout/rank 5", spatial_dropout(0.7), "f32[2,1,3,2,5]"),
    Case("drop_path", drop_path(0.4), "f32[6,3]"),
    Case("drop_path/rank 1", drop_path(0.4), "f32[5]"),
    Case("drop_path/rank 4", drop_path(0.7), "f32[5,1,2,3]"),
    Case("flatten", flatten(), "f32[4,3,5]"),
    Case("flatten/rank 1", flatten(), "f32[3]"),
    Case("flatten/rank 5", flatten(), "f32[1,3,1,2,5]"),
    Case("reshape", reshape(5, 3), "f32[4,3,5]"),
    Case("reshape/one size open", reshape(2, -1, 1), "f32[3,4,5]"),
    Case("reshape/no sizes", reshape(), "f32[3,1,1]"),
    # Wide enough that hard activations are met on every side of their kinks.
    Case("identity", identity(), "f32[5]>-8<8"),
    Case("relu", relu(), "f32[4,5]>-8<8"),
    Case("relu6", relu6(), "f32[4,9]>-8<8"),
    Case("relu6/near zero", relu6(), "f32[9]>-1<1"),
    Case("leaky_relu", leaky_relu(), "f32[3,1,5]>-8<8"),
    Case("leaky_relu/slope 0.3", leaky_relu(0.3), "f32[4,5]>-8<8"),
    Case("leaky_relu/slope 0", leaky_relu(0.0), "f32[4,5]>-8<8"),
    Case("elu", elu(), "f32[2,3,1,5]>-8<8"),
    Case("elu/alpha", elu(0.7), "f32[4,5]>-8<8"),
    Case("celu", celu(), "f32[2,1,3,1,5]>-8<8"),
    Case("celu/alpha", celu(2.5), "f32[4,5]>-8<8"),
    Case("selu", selu(), "f32[4,5]>-8<8"),
    Case("gelu", gelu(), "f32[4,5]>-8<8"),
    Case("gelu/approximate", gelu(approximate=True), "f32[4,5]>-8<8"),
    # Where a cube overflows.
    Case("gelu/approximate, far away", gelu(approximate=True), "f32[7]>-1e30<1e30", ("float32", "bfloat16")),
    Case("silu", silu(), "f32[4,5]>-8<8"),
    Case("mish", mish(), "f32[4,5]>-8<8"),
    Case("softplus", softplus(), "f32[4,5]>-8<8"),
    Case("sigmoid", sigmoid(), "f32[4,5]>-8<8"),
    Case("log_sigmoid", log_sigmoid(), "f32[4,5]>-8<8"),
    Case("tanh", tanh(), "f32[4,5]>-8<8"),
    Case("hard_tanh", hard_tanh(), "f32[4,9]>-8<8"),
    Case("hard_sigmoid", hard_sigmoid(), "f32[4,9]>-8<8"),
    Case("hard_silu", hard_silu(), "f32[4,9]>-8<8"),
    Case("squareplus", squareplus(), "f32[4,5]>-8<8"),
    Case("squareplus/b", squareplus(0.5), "f32[4,5]>-8<8"),
    Case("softsign", softsign(), "f32[4,5]>-8<8"),
    Case("softmax", softmax(), "f32[4,5]"),
    Case("softmax/rank 1", softmax(), "f32[5]"),
    Case("softmax/rank 4, large", softmax(), "f32[2,1,3,4]>-9<9"),
    Case("log_softmax", log_softmax(), "f32[4,5]"),
    Case("log_softmax/rank 1", log_softmax(), "f32[5]"),
    Case("log_softmax/rank 4, large", log_softmax(), "f32[2,1,3,4]>-9<9"),
    Case("glu", glu(), "f32[4,6]>-4<4"),
    Case("glu/rank 1", glu(), "f32[2]"),
    Case("swiglu", swiglu(), "f32[4,6]>-4<4"),
    Case("swiglu/rank 4", swiglu(), "f32[2,1,3,4]"),
    Case("geglu", geglu(), "f32[4,6]>-4<4"),
    Case("geglu/approximate", geglu(approximate=True), "f32[2,3,4]>-4<4"),
    Case("prelu", prelu(), "f32[4,5]"),
    Case("prelu/slope", prelu(-0.7), "f32[2,3,1,2]"),
    Case("prelu/rank 1", prelu(), "f32[5]"),
    Case("maxout", maxout(2), "f32[4,6]"),
    Case("maxout/one piece", maxout(1), "f32[3]"),
    Case("maxout/rank 4", maxout(5), "f32[2,1,3,5]"),
    Case("elementwise/saves the input", elementwise("square", jnp.square, lambda x: 2 * x), "f32[4,5]"),
    Case("elementwise/saves the output", elementwise("exp", jnp.exp, lambda y: y, "output"), "f32[4,5]"),
    Case("stateless", _softmax(), "f32[4,5]"),
    Case("stateless/any use of a parameter", _any_use(), _USED),
    Case("stateless/any use, normalised", weight_norm(_any_use(), names=("kernel", "table")), _USED),
    Case("cross_entropy", cross_entropy(), ("f32[6,5]", "i32[6]<5")),
    Case("cross_entropy/one example", cross_entropy(), ("f32[5]", "i32[]<5")),
    Case("cross_entropy/one class", cross_entropy(), ("f32[3,1]", "i32[3]<1")),
    Case("cross_entropy/positions", cross_entropy(), ("f32[2,3,1,2,5]", "i32[2,3,1,2]<5")),
    Case("cross_entropy/smoothing", cross_entropy(label_smoothing=0.1), ("f32[6,5]", "u8[6]<5")),
    Case("cross_entropy/ignored", cross_entropy(ignore_index=2), ("f32[6,5]", "i32[6]<5")),
    Case(
        "cross_entropy/smoothing, ignored",
        cross_entropy(label_smoothing=0.2, ignore_index=-1),
        ("f32[6,5]", "i8[6]>-1<5"),
    ),
    Case("cross_entropy/soft labels", cross_entropy(), ("f32[6,5]", "f32[6,5]>0<1")),
    Case(
        "cross_entropy/class weights",
        cross_entropy(label_smoothing=0.1, ignore_index=2, class_weights=_WEIGHTS),
        ("f32[6,5]", "i32[6]<5"),
    ),
    Case("cross_entropy/weighted soft labels", cross_entropy(class_weights=_WEIGHTS), ("f32[6,5]", "f32[6,5]>0<1")),
    Case("cross_entropy/unsigned labels", cross_entropy(ignore_index=2**32 - 1), ("f32[6,5]", "u32[6]<5")),
    Case("cross_entropy/smoothed soft labels", cross_entropy(label_smoothing=0.1), ("f32[2,3,5]", "f32[2,3,5]>0<1")),
    Case("binary_cross_entropy", binary_cross_entropy(), ("f32[6,5]", "f32[6,5]>0<1")),
    Case("binary_cross_entropy/integers", binary_cross_entropy(), ("f32[6,1]", "i32[6,1]<2")),
    Case("binary_cross_entropy/booleans", binary_cross_entropy(), ("f32[6]", "bool[6]")),
    Case("binary_cross_entropy/rank 5", binary_cross_entropy(), ("f32[3,1,2,1,5]", "f32[3,1,2,1,5]>0<1")),
    Case("binary_cross_entropy/weight", binary_cross_entropy(pos_weight=2.5), ("f32[6,5]", "f32[6,5]>0<1")),
    Case(
        "binary_cross_entropy/weights, mask",
        binary_cross_entropy(pos_weight=np.array([0.0, 0.3, 4.0])),
        ("f32[4,2,3]", _masked("f32[4,2,3]>0<1")),
    ),
    Case(
        "binary_cross_entropy/integers, mask", binary_cross_entropy(pos_weight=3), ("f32[6,1]", _masked("i32[6,1]<2"))
    ),
    Case("mse", mse(), ("f32[6,5]", "f32[6,5]")),
    Case("mse/rank 1", mse(), ("f32[1]", "f32[1]")),
    Case("mse/rank 5", mse(), ("f32[3,1,2,1,5]", "f32[3,1,2,1,5]")),
    Case("mse/mask", mse(), ("f32[6,5]", _masked("f32[6,5]"))),
    Case("mse/rank 1, mask", mse(), ("f32[5]", _masked("f32[5]"))),
    Case("mae", mae(), ("f32[2,3,5]", "f32[2,3,5]")),
    Case("mae/rank 1", mae(), ("f32[3]", "f32[3]")),
    Case("mae/mask", mae(), ("f32[4,1,2,3]", _masked("f32[4,1,2,3]"))),
    Case("huber", huber(), ("f32[6,5]", "f32[6,5]")),
    Case("huber/delta", huber(0.3), ("f32[2,3,5]", "f32[2,3,5]")),
    Case("huber/mask", huber(0.3), ("f32[2,3,5]", _masked("f32[2,3,5]"))),
    Case("kl_divergence", kl_divergence(), ("f32[6,5]<0", "f32[6,5]>0<1")),
    Case("kl_divergence/rank 1", kl_divergence(), ("f32[5]", "f32[5]>0<1")),
    Case("kl_divergence/rank 4", kl_divergence(), ("f32[2,1,3,4]<0", "f32[2,1,3,4]>0<1")),
    Case("hinge", hinge(), ("f32[6,5]", "f32[6,5]>-1<1")),
    Case("hinge/rank 1", hinge(), ("f32[3]", "f32[3]>-1<1")),
    Case("hinge/both sides", hinge(), ("f32[6,5]>-4<4", "f32[6,5]>-1<1")),
    Case("hinge/integers", hinge(), ("f32[6,5]", "i32[6,5]>-1<0")),
    Case("hinge/mask", hinge(), ("f32[6,2]>-4<4", _masked("f32[6,2]>-1<1"))),
    Case("cosine", cosine(), ("f32[6,5]", "f32[6,5]")),
    Case("cosine/rank 1", cosine(), ("f32[3]", "f32[3]")),
    Case("cosine/rank 4", cosine(), ("f32[2,1,3,4]", "f32[2,1,3,4]")),
    Case("focal", focal(), ("f32[6,5]", "f32[6,5]>0<1")),
    Case("focal/integers", focal(0.5, alpha=0.25), ("f32[6,1]", "i32[6,1]<2")),
    Case("focal/gamma 0", focal(0.0, alpha=0.75), ("f32[2,3,2]", "f32[2,3,2]>0<1")),
    Case("focal/mask", focal(0.5, alpha=0.25), ("f32[6,2]", _masked("f32[6,2]>0<1"))),
    Case("contrastive", contrastive(0.5), ("f32[5,3]", "f32[5,3]")),
    Case("contrastive/one feature", contrastive(2.0), ("f32[3,1]", "f32[3,1]")),
    Case("contrastive/one example", contrastive(0.5), ("f32[1,4]", "f32[1,4]")),
    Case("triplet", triplet(), ("f32[6,5]", ("f32[6,5]", "f32[6,5]"))),
    Case("triplet/rank 1, margin", triplet(4.0), ("f32[3]", ("f32[3]", "f32[3]"))),
    Case("triplet/rank 3", triplet(0.2), ("f32[2,3,4]", ("f32[2,3,4]", "f32[2,3,4]"))),
    Case("ctc", ctc(), ("f32[3,6,4]", _aligned("i32[3,2]>1<4", "i32[3]<3", "i32[3]>3<7"))),
    Case("ctc/blank", ctc(blank=3), ("f32[2,4,4]", _aligned("u8[2,2]<3", "i8[2]<3", "i32[2]>3<5"))),
    Case("ctc/repeats", ctc(), ("f32[2,5,2]", _aligned("i32[2,3]>1<2", "i32[2]>1<4", "i32[2]>5<6"))),
    Case("ctc/no labels", ctc(), ("f32[2,3,2]", _aligned("i32[2,1]>1<2", "i32[2]<1", "i32[2]<4"))),
    Case(
        "ctc/too few steps",
        ctc(zero_infinity=True),
        ("f32[3,4,4]", _aligned("i32[3,3]>1<2", "i32[3]>1<4", "i32[3]>1<5")),
    ),
    Case("linear_cross_entropy", linear_cross_entropy(7), ("f32[4,5]", "i32[4]<7")),
    Case("linear_cross_entropy/blocks", linear_cross_entropy(7, chunk=20), ("f32[2,3,4]", "i32[2,3]<7")),
    Case("linear_cross_entropy/unsigned", linear_cross_entropy(7, ignore_index=2**32 - 1), ("f32[4,5]", "u32[4]<7")),
    Case(
        "linear_cross_entropy/class weights",
        linear_cross_entropy(5, label_smoothing=0.1, ignore_index=2, z_loss=0.02, class_weights=_WEIGHTS, chunk=12),
        ("f32[6,3]", "i32[6]<5"),
    ),
    Case("linear_cross_entropy/one position", linear_cross_entropy(5, chunk=2), ("f32[3]", "i32[]<5")),
    Case("linear_cross_entropy/one class", linear_cross_entropy(1, z_loss=0.1), ("f32[3,2]", "u8[3]<1")),
    Case(
        "linear_cross_entropy/smoothing, ignored, z-loss, no bias",
        linear_cross_entropy(6, label_smoothing=0.1, ignore_index=2, z_loss=0.02, use_bias=False, chunk=12),
        ("f32[5,3]", "i8[5]<6"),
    ),
    Case("serial", serial(dense(3), tanh(), dense(2)), "f32[4,5]"),
    Case("serial/one layer, named", serial(last=dense(3)), "f32[4,5]"),
    Case("serial/nested, random", serial(serial(dense(3), dropout(0.3)), flatten(), rms_norm()), "f32[4,2,5]"),
    Case("attention/segments", attention(2, rotary=True, causal=True), _SEGMENTS),
    Case("attention/segments, tiles", attention(2, kv_heads=1, block=2, window=3), _SEGMENTS),
    Case("position_embedding/segments", position_embedding(5), _SEGMENTS),
    Case("sinusoidal_positions/segments", sinusoidal_positions(), _SEGMENTS),
    Case(
        "packed",
        packed(serial(position_embedding(5), repeat(_ATTENDING, 2), weight_norm(dense(3)), select()), 3, longest=5),
        {"x": "f32[2,5,4]", "segments": "i32[2,5]<4 sorted"},
    ),
    Case(
        "packed/tied, as long as a row",
        packed(tied(serial(dense(4), tanh(), dense(4)), {"dense_1/kernel": "dense/kernel.T"}), 2),
        {"x": "f32[1,5,4]", "segments": "i32[1,5]<3 sorted"},
    ),
    Case("packed/all of it pads", packed(serial(_ATTENDING, dense(3)), 2), {**_SEGMENTS, "segments": "i32[2,5]<1"}),
    Case("moe", moe(dense(3), 3), "f32[2,5,4]"),
    Case("moe/two of four, some dropped", moe(mlp(5, 3), 4, top_k=2, capacity_factor=0.8), "f32[2,7,4]"),
    Case(
        "moe/lengths, random, none dropped",
        moe(serial(dense(3), dropout(0.4)), 3, top_k=2, capacity_factor=None),
        {"x": "f32[3,5,4]", "lengths": "i32[3]<6"},
    ),
    Case("moe/one position an example", moe(dense(3), 4, top_k=2), "f32[5,4]"),
    Case(
        "serial/mixtures are counted", serial(router_totals(), repeat(skip(moe(dense(4), 3, top_k=2)), 2)), "f32[2,5,4]"
    ),
    Case(
        "serial/mixtures are counted through a branch, lengths",
        serial(router_totals(), branch(dense(4), remat(moe(dense(4), 3))), add()),
        {"x": "f32[2,5,4]", "lengths": "i32[2]<6"},
    ),
    Case("moe/of weight_norm", moe(weight_norm(dense(3)), 3), "f32[2,5,4]"),
    Case("router_totals", router_totals(), {"x": "f32[3,4]", "bias": "f32[3,2]"}),
    Case("router_totals/an array", router_totals(), "f32[3,4]"),
    Case("router_losses", router_losses(cross_entropy(), balance=0.5, z=0.3), (_ROUTED, "i32[3]<4")),
    Case(
        "router_losses/one a position, parameters",
        router_losses(linear_cross_entropy(4), balance=0.5, z=0.3),
        ({**_ROUTED, "x": "f32[3,2,5]"}, "i32[3,2]<4"),
    ),
    Case("serial/lengths for some", serial(dense(4), repeat(_ATTENDING, 2), select()), _LENGTHS),
    Case("repeat/a bias for all", repeat(_ATTENDING, 2), _BIASED),
    Case("serial/a bias for one branch", serial(branch(_ATTENDING, dense(4)), add()), _BIASED),
    Case("skip/shortcut with a bias", skip(attention(2), dense(4)), _BIASED),
    Case("serial/an initial state", serial(dense(4), lstm(2), dense(3)), _BEGUN),
    Case("bidirectional/layers in a row, lengths", bidirectional(gru(2), serial(gru(2), dense(2))), _SEQUENCES),
    Case("stacked/layers in a row", stacked(serial(gru(2), dense(3)), gru(2)), "f32[3,4,2]"),
    Case("stacked/layers in a row, lengths", stacked(serial(gru(2), dense(3)), gru(2)), _SEQUENCES),
    Case("select", select(), {"x": "f32[2,3]", "lengths": "i32[2]<4", "other": "f32[2]"}),
    Case("serial/positions that cancel", _CANCELLING, "f32[4,5]", ("float64",)),
    Case("parallel", parallel(dense(3), serial(dense(2), softsign())), ("f32[4,5]", "f32[4,3]")),
    Case("parallel/integers beside floats", parallel(tanh(), flatten()), ("f32[4,5]", "i32[4,2,3]<7")),
    Case("skip", skip(_BLOCK), "f32[4,5]"),
    Case("skip/of a skip", skip(skip(dense(5))), "f32[2,3,5]"),
    Case("skip/shortcut", skip(serial(dense(3), tanh()), dense(3, use_bias=False)), "f32[4,5]"),
    Case("residual_block", residual_block(2, eps=0.1), "f32[3,3,3,2]"),
    Case("residual_block/projection", residual_block(3, 2, eps=0.1), "f32[2,5,4,2]"),
    Case("repeat", repeat(skip(_BLOCK), 3), "f32[4,5]"),
    Case("repeat/once, random", repeat(dropout(0.4), 1), "f32[4,5]"),
    Case("repeat/of a repeat", repeat(repeat(serial(dense(3), silu()), 2), 2), "f32[4,3]"),
    Case("remat", remat(_BLOCK), "f32[4,5]"),
    Case("remat/random, repeated", repeat(remat(serial(dense(3), dropout(0.4))), 2), "f32[4,3]"),
    Case("weight_norm", weight_norm(dense(3)), "f32[4,5]"),
    Case("repeat/of weight_norm", repeat(weight_norm(skip(serial(dense(3), tanh(), dense(4)))), 2), "f32[2,3,4]"),
    Case("weight_norm/conv", weight_norm(conv(2, 3, use_bias=False)), "f32[3,4,2]"),
    Case("weight_norm/other names", weight_norm(rnn(2), ("kernel", "recurrent_kernel")), "f32[2,3,3]"),
    # Large kernels, whose singular vectors are still about right once the parameters are moved.
    Case("spectral_norm", spectral_norm(dense(3, kernel_init=_init.constant(2))), "f32[4,5]"),
    Case("spectral_norm/conv", spectral_norm(conv(2, 3, kernel_init=_init.constant(-2)), iterations=2), "f32[3,4,2]"),
    Case(
        "repeat/of spectral_norm",
        repeat(spectral_norm(serial(dense(3, kernel_init=_init.ones), tanh(), dense(4, kernel_init=_init.ones))), 2),
        "f32[2,4]",
    ),
    Case("mixed", mixed(serial(dense(3), gelu(), rms_norm())), "f32[4,5]", ("float32",)),
    Case("mixed/float16", mixed(serial(dense(3), tanh()), compute="float16"), "f32[4,5]", ("float32",)),
    Case("mixed/float64", mixed(dense(3), "float64", "float32", "float64"), "f32[4,5]", ("float64",)),
    Case("mixed/loss", mixed(cross_entropy()), ("f32[4,5]", "i32[4]<5"), ("float32",)),
    Case("mixed/head and loss", mixed(linear_cross_entropy(7, chunk=20)), ("f32[2,3,4]", "i32[2,3]<7"), ("float32",)),
    Case("mixed/repeated", repeat(mixed(dense(3)), 2), "f32[4,3]", ("float32",)),
    Case("mixed/unrounded", mixed(serial(lru(3, 4), lru(2, 3, r_min=0.9))), "f32[2,5,3]", ("float32",)),
    Case(
        "mixed/unrounded, frozen, repeated",
        mixed(repeat(serial(freeze(lru(3, 2)), dense(3)), 2)),
        "f32[2,3,3]",
        ("float32",),
    ),
    Case(
        "mixed/parts kept", mixed(repeat(serial(rms_norm(), dense(4)), 2), keep=("rms_norm",)), "f32[3,4]", ("float32",)
    ),
    Case("mixed/frozen parts", mixed(serial(freeze(serial(freeze(dense(3)), dense(2))))), "f32[4,5]", ("float32",)),
    Case("branch", branch(dense(3), serial(dense(2), softsign())), "f32[4,5]"),
    Case("branch/of a pair, one branch", branch(parallel(tanh(), flatten())), ("f32[4,5]", "i32[4,2,3]<7")),
    Case(
        "serial/branch of integers, add",
        serial(branch(embedding(5, 3), embedding(5, 3), embedding(5, 3)), add()),
        "i32[4,2]<5",
    ),
    Case("bilinear", bilinear(3), ("f32[4,5]", "f32[4,2]")),
    Case("bilinear/rank 1, no bias", bilinear(2, use_bias=False), ("f32[3]", "f32[5]")),
    Case("bilinear/rank 4", bilinear(4), ("f32[2,3,2,3]", "f32[2,3,2,5]")),
    Case("bilinear/one feature of one and one", bilinear(1), ("f32[1,1]", "f32[1,1]")),
    Case("serial/a branch and bilinear", serial(branch(dense(3), dense(4)), bilinear(2)), "f32[4,5]"),
    Case("concat", concat(), ("f32[4,3,5]", "f32[4,3,1]", "f32[4,3,2]")),
    Case("concat/one array", concat(), ("f32[3,4]",)),
    Case("concat/an axis from the front", concat(1), ("f32[2,1,3]", "f32[2,4,3]")),
    Case("concat/an axis from the back", concat(-2), ("f32[2,3,1,2]", "f32[2,3,4,2]")),
    Case("add", add(), ("f32[4,3,2]", "f32[4,3,2]", "f32[4,3,2]")),
    Case("add/one array", add(), ("f32[3]",)),
    Case("named", named("middle", serial(dense(3), dropout(0.3))), "f32[4,5]"),
    Case("freeze", freeze(dense(3)), "f32[4,5]"),
    Case("repeat/of a frozen part", repeat(serial(freeze(serial(dense(4), tanh())), dense(3)), 2), "f32[4,3]"),
    Case("reversible", reversible(serial(dense(4), gelu(), dense(3)), dense(3)), "f32[4,6]", WIDE),
    Case(
        "reversible/a pair", reversible(_DROPPING, serial(dense(2), dropout(0.3))), ("f32[4,1,3]", "f32[4,1,2]"), WIDE
    ),
    Case("reversible/half precision inside", reversible(mixed(dense(3)), mixed(dense(3))), "f32[4,6]", ("float32",)),
    Case(
        "repeat/of a reversible layer", repeat(named("block", reversible(dense(3), dropout(0.3))), 3), "f32[4,6]", WIDE
    ),
    Case(
        "serial/of reversible layers",
        serial(reversible(dense(2), tanh()), reversible(silu(), dense(2))),
        "f32[3,4]",
        WIDE,
    ),
    Case("tied", tied(_LANGUAGE, _TRANSPOSED), "i32[3,4]<7"),
    Case("tied/narrow", tied(serial(embedding(3, 2), head=dense(3)), _TRANSPOSED), "i8[2,5]<3"),
    Case("tied/kernels", tied(_SQUARE, {"dense_1/kernel": "dense/kernel", "dense_1/bias": "dense/bias"}), "f32[4,3]"),
    Case(
        "tied/in a repeat",
        tied(serial(repeat(_SQUARE, 2)), {"repeat/dense_1/kernel": "repeat/dense/kernel.T"}),
        "f32[4,2,3]",
    ),
    Case(
        "tied/lookups", tied(branch(a=embedding(5, 3), b=embedding(5, 3)), {"b/embedding": "a/embedding"}), "i32[4,3]<5"
    ),
    Case("tied/repeats", tied(serial(*[repeat(dense(3), 2)] * 2), {"repeat_1/kernel": "repeat/kernel"}), "f32[4,3]"),
    Case("tied/positions that cancel", _CANCELLING_TWICE, "f32[4,9]", ("float64",)),
    Case("tied/convolutions", tied(serial(conv(2, 3), conv(2, 3)), {"conv_1/kernel": "conv/kernel"}), "f32[2,4,3,2]"),
    Case("from_function", from_function(_affine, _affine_init), "f32[4,5]"),
    Case("from_function/no params, integers", from_function(_chosen), {"x": "f32[4,5]", "ids": "i32[4]<5"}),
    Case("repeat/of a function", repeat(skip(from_function(_affine, _affine_init)), 2), "f32[4,2,3]"),
)


def constructors() -> frozenset[str]:
    """The names of the functions whose layers are in the table."""
    return frozenset(case.constructor for case in CASES)
