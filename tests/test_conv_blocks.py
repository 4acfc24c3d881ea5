"""separable_conv and residual_block by their parts; tests/models/test_resnet.py has the latter against PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import funcnet as fn

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)


def shapes(tree):
    return jax.tree.map(jnp.shape, tree)


def test_separable_conv_is_depthwise_then_pointwise(x64):
    x = jnp.asarray(RNG.normal(size=(2, 5, 4, 3)))
    layer = fn.separable_conv(7, 3, 2, multiplier=2)
    params, state = layer.init(KEY, x)
    depthwise, pointwise = {"kernel": (3, 3, 1, 6)}, {"kernel": (1, 1, 6, 7), "bias": (7,)}
    assert shapes(params) == {"depthwise": depthwise, "pointwise": pointwise}
    inner = fn.conv(6, 3, 2, groups=3, use_bias=False).apply(params["depthwise"], (), x)
    wanted = inner @ params["pointwise"]["kernel"][0, 0] + params["pointwise"]["bias"][None, None, None]
    np.testing.assert_allclose(layer.apply(params, state, x), wanted, rtol=1e-11, atol=1e-12)
    assert set(fn.separable_conv(7, 3, use_bias=False).init(KEY, x)[0]["pointwise"]) == {"kernel"}


def test_a_residual_block_keeps_its_input_or_projects_it():
    x = jnp.asarray(RNG.normal(size=(2, 5, 4, 3)), jnp.float32)
    plain = fn.residual_block(3)
    params, state = plain.init(KEY, x)
    assert set(params["skip"]) == {"conv", "batch_norm", "conv_1", "batch_norm_1", "relu"}
    still = jax.tree.map(jnp.zeros_like, params)
    np.testing.assert_array_equal(plain.apply(still, state, x), jnp.maximum(x, 0))
    for layer, outputs in ((fn.residual_block(6, 2), (2, 3, 2, 6)), (fn.residual_block(6, project=True), (2, 5, 4, 6))):
        params, state = layer.init(KEY, x)
        assert shapes(params["skip"]["shortcut"]["conv"]) == {"kernel": (1, 1, 3, 6)}
        assert layer.apply(params, state, x).shape == outputs


def test_a_residual_block_that_changes_the_channels_asks_for_a_projection():
    with pytest.raises(fn.InputError, match=r"(?s)output like the input.*\[2, 5, 4, 6\].*shortcut"):
        fn.residual_block(6).init(KEY, jnp.ones((2, 5, 4, 3)))
    with pytest.raises(fn.InputError, match="features as a positive"):
        fn.residual_block(0)
