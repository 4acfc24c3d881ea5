"""Blocks that are often composed from layers. They have no rules of their own, only those of `serial` and `skip`.

    mlp                 y = dense(s(dense(x)))
    transformer_block   h = x + attention(norm(x))        y = h + mlp(norm(h))
    separable_conv      y = pointwise(depthwise(x))
    residual_block      y = relu(g(x) + f(x)),   f: conv, batch norm, relu, conv, batch norm

where g is the identity, or a convolution with a window of one entry and a batch norm where the block changes the shape.
Params, state and residuals are those of the layers, by name. In a transformer block each branch begins with its norm:
only sums lie between x, h and y, and the cotangent of y reaches x undiminished.
Source: Vaswani et al. 2017, arXiv:1706.03762; Xiong et al. 2020, arXiv:2002.04745 (the norm in front); Chollet 2017,
arXiv:1610.02357; He et al. 2016, arXiv:1512.03385, figure 5 and option B.
"""

from collections.abc import Callable
from dataclasses import replace

from funcnet._internal import expect
from funcnet._internal.defaults import HE_NORMAL, Default, Initializer
from funcnet._internal.windows import Padding, Sizes
from funcnet.combinators.serial import serial
from funcnet.combinators.skip import skip
from funcnet.layer import Layer
from funcnet.layers.activation import gelu, relu
from funcnet.layers.attention import attention
from funcnet.layers.batch_norm import batch_norm
from funcnet.layers.conv import conv, depthwise_conv
from funcnet.layers.dense import dense
from funcnet.layers.dropout import dropout
from funcnet.layers.gate import swiglu
from funcnet.layers.norm import layer_norm
from funcnet.structure import constructor


@constructor
def mlp(
    hidden: int,
    features: int,
    *,
    activation: Layer | None = None,
    gated: bool = False,
    rate: float = 0.0,
    use_bias: bool = True,
) -> Layer[dict, dict, dict]:
    """dense(features)(s(dense(hidden)(x))) on the last axis of x [.., D], to [.., F]; params `hidden` and `out`.

    Args:
        hidden: how many units s outputs.
        features: F.
        activation: s; by default `gelu()`, or `swiglu()` if gated.
        gated: s is of the glu family, which takes two features for each one it gives: the first dense has 2 * hidden.
        rate: the share of s's units that training drops.
        use_bias: whether both dense layers have biases.

    Raises:
        InputError: for sizes that are not positive, a rate out of range, or anything that `dense` refuses.
    """
    hidden = expect.count(hidden, "hidden")
    expect.flags(gated=gated)
    layers = {
        "hidden": dense(2 * hidden if gated else hidden, use_bias=use_bias),
        "activation": activation or (swiglu() if gated else gelu()),
        **({"dropout": dropout(rate)} if rate else {}),
        "out": dense(features, use_bias=use_bias),
    }
    return replace(serial(**layers), name="mlp")


@constructor
def transformer_block(
    features: int,
    heads: int,
    *,
    hidden: int | None = None,
    kv_heads: int | None = None,
    causal: bool = False,
    rotary: bool = False,
    window: int | None = None,
    norm: Callable[[], Layer] = Default(layer_norm, "layer_norm"),
    activation: Layer | None = None,
    gated: bool = False,
    rate: float = 0.0,
    attention_rate: float = 0.0,
    use_bias: bool = True,
) -> Layer[dict, dict, dict]:
    """x + attention(norm(x)), then the same with an mlp: [B, T, D] to [B, T, D].

    Params {attention: {norm, attention}, mlp: {norm, mlp}}, which hold those of the four layers.

    Args:
        features: D.
        heads, kv_heads, causal, rotary, window: as for `attention`.
        hidden: as for `mlp`; 4 D by default.
        norm: the constructor of a norm: `layer_norm`, `rms_norm`.
        activation, gated: as for `mlp`.
        rate: the share of units that training drops at the end of each branch.
        attention_rate: the share of attention's weights that training drops.
        use_bias: whether attention and mlp have biases.

    Raises:
        InputError: for what `attention`, `mlp`, `dropout` or `skip` refuses, such as an x without D features.
    """
    features = expect.count(features, "features")
    attend = attention(
        heads,
        kv_heads=kv_heads,
        head_dim=None,
        causal=causal,
        rotary=rotary,
        window=window,
        rate=attention_rate,
        use_bias=use_bias,
    )
    units = mlp(
        4 * features if hidden is None else hidden, features, activation=activation, gated=gated, use_bias=use_bias
    )

    def branch(**layer: Layer) -> Layer:
        return skip(serial(norm=norm(), **layer, **({"dropout": dropout(rate)} if rate else {})))

    return replace(serial(attention=branch(attention=attend), mlp=branch(mlp=units)), name="transformer_block")


@constructor
def separable_conv(
    features: int,
    kernel_size: Sizes,
    strides: Sizes = 1,
    padding: Padding = "SAME",
    *,
    dilation: Sizes = 1,
    multiplier: int = 1,
    use_bias: bool = True,
) -> Layer[dict, dict, dict]:
    """A depthwise convolution without a bias, then a pointwise one: `serial` of the parts depthwise and pointwise.

    [B, *spatial, C] -> [B, *outputs, F]; params depthwise kernel [*window, 1, multiplier C], pointwise kernel
    [1, .., multiplier C, F] and bias [F].

    Args:
        features: F, the size of the output's last axis.
        multiplier: how many features the depthwise convolution makes from each channel.
        kernel_size, strides, padding, dilation: of the depthwise convolution, as for `conv`.
        use_bias: whether to add a bias, after the pointwise convolution.

    Raises:
        InputError: as `conv`.
    """
    depthwise = depthwise_conv(kernel_size, strides, padding, dilation=dilation, multiplier=multiplier, use_bias=False)
    parts = serial(depthwise=depthwise, pointwise=conv(features, 1, use_bias=use_bias))
    return replace(parts, name="separable_conv")


@constructor
def residual_block(
    features: int,
    strides: Sizes = 1,
    *,
    project: bool | None = None,
    momentum: float = 0.9,
    eps: float = 1e-5,
    kernel_init: Initializer = HE_NORMAL,
) -> Layer[dict, dict, dict]:
    """Two convolutions of windows of 3 around a shortcut, as in ResNet-18: [B, *spatial, C] to [B, *outputs, F].

    Every convolution is without bias, padded by 1 where its window is 3, and followed by a batch norm, so outputs =
    ceil(spatial / strides). Under `skip` the params hold those of conv, batch_norm, conv_1 and batch_norm_1; with a
    projection these are under `main`, and those of its conv and batch_norm under `shortcut`.

    Args:
        features: F, of both convolutions.
        strides: of the first convolution and of the projection.
        project: whether the shortcut is a projection; None for one where a stride is not 1. Where the block changes the
            number of channels alone, pass True.
        momentum, eps: of the batch norms.
        kernel_init: by default He's normal, which keeps the variance through a relu: std = sqrt(2 / inputs).

    Raises:
        InputError: for anything that the layers refuse, and for a shape that changes without a projection.
    """
    features = expect.count(features, "features")
    if project is not None:
        expect.flags(project=project)
    moved = any(s != 1 for s in strides) if isinstance(strides, (tuple, list)) else strides != 1

    def normalised(window: int, strides: Sizes) -> tuple[Layer, Layer]:
        convolution = conv(features, window, strides, window // 2, use_bias=False, kernel_init=kernel_init)
        return convolution, batch_norm(momentum=momentum, eps=eps)

    main = serial(*normalised(3, strides), relu(), *normalised(3, 1))
    shortcut = serial(*normalised(1, strides)) if project or (project is None and moved) else None
    return replace(serial(skip(main, shortcut), relu()), name="residual_block")
