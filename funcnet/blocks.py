"""Blocks: what is often composed of layers. No rules of their own, only `serial` and `skip`.

    mlp                 y = dense(s(dense(x)))
    transformer_block   h = x + attention(norm(x))        y = h + mlp(norm(h))
    separable_conv      y = pointwise(depthwise(x))
    residual_block      y = relu(g(x) + f(x)),   f: conv, batch norm, relu, conv, batch norm

where g is the identity, or a convolution of one entry and a batch norm where the block changes the shape. Params, state
and residuals are those of the layers, by name. In a transformer block the norms stand in front of the branches, so that
nothing lies between x, h and y but sums, and the gradient of y reaches x whole.
Source: Vaswani et al. 2017, arXiv:1706.03762; Xiong et al. 2020, arXiv:2002.04745 (the norm in front); Chollet 2017,
arXiv:1610.02357; He et al. 2016, arXiv:1512.03385, figure 5 and option B.
"""

from collections.abc import Callable
from dataclasses import replace

from jax.nn import initializers

from funcnet import expect
from funcnet.combine import serial, skip
from funcnet.layer import Layer
from funcnet.layers.activation import gelu, relu
from funcnet.layers.attention import attention
from funcnet.layers.batch_norm import batch_norm
from funcnet.layers.conv import conv, depthwise_conv
from funcnet.layers.dense import Initializer, dense
from funcnet.layers.dropout import dropout
from funcnet.layers.gate import swiglu
from funcnet.layers.norm import layer_norm
from funcnet.window import Padding, Sizes


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


def separable_conv(
    features: int,
    kernel_size: Sizes,
    strides: Sizes = 1,
    padding: Padding = "SAME",
    dilation: Sizes = 1,
    multiplier: int = 1,
    use_bias: bool = True,
) -> Layer[dict, dict, dict]:
    """A depthwise convolution without a bias, then a pointwise one: `serial` of the parts depthwise and pointwise.

    [B, *spatial, C] -> [B, *outputs, F]; params depthwise kernel [*window, 1, multiplier C], pointwise kernel
    [1, .., multiplier C, F] and bias [F].

    Args:
        features: F, the size of the output's last axis.
        multiplier: features that the depthwise convolution makes of each channel.
        kernel_size, strides, padding, dilation: of the depthwise convolution, as for `conv`.
        use_bias: whether to add a bias, after the pointwise convolution.

    Raises:
        expect.InputError: as `conv`.
    """
    depthwise = depthwise_conv(kernel_size, strides, padding, dilation, multiplier, use_bias=False)
    parts = serial(depthwise=depthwise, pointwise=conv(features, 1, use_bias=use_bias))
    return replace(parts, name="separable_conv")


def residual_block(
    features: int,
    strides: Sizes = 1,
    project: bool | None = None,
    *,
    momentum: float = 0.9,
    eps: float = 1e-5,
    kernel_init: Initializer = initializers.he_normal(),
) -> Layer[dict, dict, dict]:
    """Two convolutions of windows of 3 around a shortcut, as in ResNet-18: [B, *spatial, C] to [B, *outputs, F].

    Every convolution is without bias, padded by 1 where its window is 3, and followed by a batch norm, so outputs =
    ceil(spatial / strides). Params skip: those of conv, batch_norm, conv_1, batch_norm_1, or with a projection main:
    the same, and shortcut: conv, batch_norm.

    Args:
        features: F, of both convolutions.
        strides: of the first convolution and of the projection.
        project: whether the shortcut is a projection; None for one if there are strides. Where the block changes the
            number of channels alone, say True.
        momentum, eps: of the batch norms.
        kernel_init: by default He's normal, which keeps the variance through a relu: std = sqrt(2 / inputs).

    Raises:
        expect.InputError: for what the layers refuse, and for a shape that changes without a projection.
    """
    features = expect.count(features, "features")
    moved = any(s != 1 for s in strides) if isinstance(strides, (tuple, list)) else strides != 1

    def normalised(window: int, strides: Sizes) -> tuple[Layer, Layer]:
        convolution = conv(features, window, strides, window // 2, use_bias=False, kernel_init=kernel_init)
        return convolution, batch_norm(momentum, eps)

    main = serial(*normalised(3, strides), relu(), *normalised(3, 1))
    shortcut = serial(*normalised(1, strides)) if project or (project is None and moved) else None
    return replace(serial(skip(main, shortcut), relu()), name="residual_block")
