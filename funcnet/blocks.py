"""Blocks: what is often composed of layers. No rules of their own, only `serial` and `skip`.

    mlp                 y = dense(s(dense(x)))
    transformer_block   h = x + attention(norm(x))        y = h + mlp(norm(h))

Params, state and residuals are those of the layers, by name. The norms stand in front of the branches, so that nothing
lies between x, h and y but sums, and the gradient of y reaches x whole.
Source: Vaswani et al. 2017, arXiv:1706.03762; Xiong et al. 2020, arXiv:2002.04745 (the norm in front).
"""

from collections.abc import Callable
from dataclasses import replace

from funcnet import expect
from funcnet.combine import serial, skip
from funcnet.layer import Layer
from funcnet.layers.activation import gelu
from funcnet.layers.attention import attention
from funcnet.layers.dense import dense
from funcnet.layers.dropout import dropout
from funcnet.layers.gate import swiglu
from funcnet.layers.norm import layer_norm


def mlp(
    hidden: int,
    features: int,
    activation: Layer | None = None,
    *,
    gated: bool = False,
    rate: float = 0.0,
    use_bias: bool = True,
) -> Layer[dict, dict, dict]:
    """dense(features)(s(dense(hidden)(x))) on the last axis of x [.., D], to [.., F]; params `hidden` and `out`.

    Args:
        hidden: how many units s gives.
        features: F.
        activation: s; by default `gelu()`, or `swiglu()` if gated.
        gated: s is of the glu family and takes two features for each that it gives: the first dense has 2 * hidden.
        rate: the share of s's units that training drops.
        use_bias: whether both dense layers have biases.

    Raises:
        expect.InputError: for sizes that are not positive, a rate out of range, or what `dense` refuses.
    """
    hidden = expect.count(hidden, "hidden")
    layers = {
        "hidden": dense(2 * hidden if gated else hidden, use_bias),
        "activation": activation or (swiglu() if gated else gelu()),
        **({"dropout": dropout(rate)} if rate else {}),
        "out": dense(features, use_bias),
    }
    return replace(serial(**layers), name="mlp")


def transformer_block(
    features: int,
    heads: int,
    hidden: int | None = None,
    *,
    kv_heads: int | None = None,
    causal: bool = False,
    rotary: bool = False,
    window: int | None = None,
    norm: Callable[[], Layer] = layer_norm,
    activation: Layer | None = None,
    gated: bool = False,
    rate: float = 0.0,
    attention_rate: float = 0.0,
    use_bias: bool = True,
) -> Layer[dict, dict, dict]:
    """x + attention(norm(x)), then the same with an mlp: [B, T, D] to [B, T, D].

    Params attention: {norm, attention} and mlp: {norm, mlp}, with those of the four layers.

    Args:
        features: D.
        heads, kv_heads, causal, rotary, window: of `attention`.
        hidden: of the `mlp`; 4 D by default.
        norm: makes a norm: `layer_norm`, `rms_norm`.
        activation, gated: of the `mlp`.
        rate: the share of units that training drops at the end of both branches.
        attention_rate: the share of attention's weights that training drops.
        use_bias: whether attention and mlp have biases.

    Raises:
        expect.InputError: for what `attention`, `mlp`, `dropout` and `skip` refuse, such as an x without D features.
    """
    features = expect.count(features, "features")
    attend = attention(heads, kv_heads, None, causal, rotary, window, rate=attention_rate, use_bias=use_bias)
    units = mlp(4 * features if hidden is None else hidden, features, activation, gated=gated, use_bias=use_bias)

    def branch(**layer: Layer) -> Layer:
        return skip(serial(norm=norm(), **layer, **({"dropout": dropout(rate)} if rate else {})))

    return replace(serial(attention=branch(attention=attend), mlp=branch(mlp=units)), name="transformer_block")
