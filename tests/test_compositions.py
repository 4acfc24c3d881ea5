"""Blocks: against the same written out in JAX; their parts; what they refuse. tests/models has whole models."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import funcnet as fn

KEY = jax.random.key(0)
X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 8)), jnp.float32)


def dense(p, x):
    return jnp.einsum("btd,df->btf", x, p["kernel"]) + (p["bias"][None, None] if "bias" in p else 0.0)


def normed(p, x):
    centred = x - x.mean(-1, keepdims=True)
    return centred / jnp.sqrt(jnp.square(centred).mean(-1, keepdims=True) + 1e-6) * p["scale"][None, None]


def moved(params):
    """Params that are not ones and zeros."""
    return jax.tree.map(lambda leaf: leaf + 0.1 * jnp.cos(jnp.arange(leaf.size)).reshape(leaf.shape), params)


def test_an_mlp_is_two_dense_layers_around_an_activation():
    layer = fn.mlp(6, 3)
    params = moved(layer.init(KEY, X)[0])
    wanted = dense(params["out"], jax.nn.gelu(dense(params["hidden"], X), approximate=False))
    np.testing.assert_allclose(layer.apply(params, layer.init(KEY, X)[1], X), wanted, rtol=1e-5, atol=1e-6)
    assert {path: leaf.shape for path, leaf in params["hidden"].items()} == {"kernel": (8, 6), "bias": (6,)}
    assert layer.name == "mlp"


@pytest.mark.parametrize(("options", "gate"), [({}, jax.nn.silu), ({"activation": fn.glu()}, jax.nn.sigmoid)])
def test_a_gated_mlp_multiplies_half_of_the_hidden_units_by_the_other(options, gate):
    layer = fn.mlp(6, 3, gated=True, use_bias=False, **options)
    params, state = layer.init(KEY, X)
    assert {name: p["kernel"].shape for name, p in params.items() if p} == {"hidden": (8, 12), "out": (6, 3)}
    a, b = jnp.split(dense(params["hidden"], X), 2, axis=-1)
    np.testing.assert_allclose(layer.apply(params, state, X), dense(params["out"], a * gate(b)), rtol=1e-5, atol=1e-6)


def test_a_transformer_block_is_its_branches_in_order():
    layer = fn.transformer_block(8, 2, hidden=12, kv_heads=1, causal=True, rotary=True, window=3)
    params, state = layer.init(KEY, X)
    params = moved(params)
    p, q = params["attention"], params["mlp"]
    norm = lambda p, x: normed(p, x) + p["bias"][None, None]
    h = X + fn.attention(2, kv_heads=1, head_dim=None, causal=True, rotary=True, window=3).apply(
        p["attention"], (), norm(p["norm"], X)
    )
    hidden = jax.nn.gelu(dense(q["mlp"]["hidden"], norm(q["norm"], h)), approximate=False)
    np.testing.assert_allclose(layer.apply(params, state, X), h + dense(q["mlp"]["out"], hidden), rtol=1e-5, atol=1e-5)
    assert q["mlp"]["hidden"]["kernel"].shape == (8, 12)


def test_a_block_has_the_norm_the_sizes_and_the_dropout_that_it_is_asked_for():
    layer = fn.transformer_block(8, 2, norm=fn.rms_norm, use_bias=False, rate=0.5, attention_rate=0.5)
    params, state = layer.init(KEY, X)
    assert params["mlp"]["mlp"]["hidden"]["kernel"].shape == (8, 32)
    assert not [path for path, _ in jax.tree_util.tree_leaves_with_path(params) if "bias" in jax.tree_util.keystr(path)]
    assert {name: list(part.parts) for name, part in layer.parts.items()} == {
        "attention": ["norm", "attention", "dropout"],
        "mlp": ["norm", "mlp", "dropout"],
    }
    one, other = (layer.fwd(params, state, X, jax.random.key(i))[0] for i in range(2))
    assert not np.array_equal(one, other)
    assert len(str(fn.summary(layer, X)).splitlines()) > 10


def test_only_the_weights_are_dropped_with_attention_rate_alone():
    layer = fn.transformer_block(8, 2, attention_rate=0.5)
    params, state = layer.init(KEY, X)
    y, _, residuals = layer.fwd(params, state, X, KEY)
    assert "dropout" not in layer.parts["mlp"].parts
    assert not np.allclose(y, layer.apply(params, state, X))
    assert residuals["attention"]["attention"].key is not None


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(fn.InputError, match="hidden as a positive"):
        fn.mlp(0, 3)
    with pytest.raises(fn.InputError, match="features as a positive"):
        fn.transformer_block(0, 2)
    with pytest.raises(fn.InputError, match="a rate of"):
        fn.mlp(3, 3, rate=1.5)
    with pytest.raises(fn.InputError, match="an output like the input"):
        fn.transformer_block(6, 2).init(KEY, X)
    with pytest.raises(fn.InputError, match="features that 3 heads divide"):
        fn.transformer_block(8, 3).init(KEY, X)


def shapes(tree):
    return jax.tree.map(jnp.shape, tree)


def test_separable_conv_is_depthwise_then_pointwise(x64):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 4, 3)))
    layer = fn.separable_conv(7, 3, 2, multiplier=2)
    params, state = layer.init(KEY, x)
    depthwise, pointwise = {"kernel": (3, 3, 1, 6)}, {"kernel": (1, 1, 6, 7), "bias": (7,)}
    assert shapes(params) == {"depthwise": depthwise, "pointwise": pointwise}
    inner = fn.conv(6, 3, 2, groups=3, use_bias=False).apply(params["depthwise"], (), x)
    wanted = inner @ params["pointwise"]["kernel"][0, 0] + params["pointwise"]["bias"][None, None, None]
    np.testing.assert_allclose(layer.apply(params, state, x), wanted, rtol=1e-11, atol=1e-12)
    assert set(fn.separable_conv(7, 3, use_bias=False).init(KEY, x)[0]["pointwise"]) == {"kernel"}


def test_a_residual_block_keeps_its_input_or_projects_it():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 4, 3)), jnp.float32)
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
