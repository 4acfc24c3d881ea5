"""Group and instance norm and unit length: NumPy, PyTorch, constant groups, extreme lengths, and what is refused."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import funcnet as fn

RNG = np.random.default_rng(0)
TOLERANCES = pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float64", 1e-10)])
LAYERS = {"group_norm": fn.group_norm(2), "instance_norm": fn.instance_norm()}
BOTH = pytest.mark.parametrize("name", LAYERS)
X, DY = RNG.normal(size=(3, 4, 5, 6)), RNG.normal(size=(3, 4, 5, 6))
PARAMS = {"scale": RNG.normal(size=6), "bias": RNG.normal(size=6)}


def pull(layer, params, x, dy):
    """(y, dparams, dx)."""
    y, _, residuals = layer.fwd(params, (), x, None)
    return y, *layer.bwd(params, residuals, dy)


def ones(dtype=jnp.float32):
    return {"scale": jnp.ones(6, dtype), "bias": jnp.zeros(6, dtype)}


@pytest.mark.parametrize(
    ("layer", "size"), [(fn.group_norm(1, eps=0.2), 6), (fn.group_norm(3), 2), (fn.instance_norm(), 1)]
)
def test_the_output_is_numpys(layer, size, x64):
    groups = np.split(X, 6 // size, axis=-1)
    eps = 0.2 if size == 6 else 1e-6
    axes = {"axis": (1, 2, 3), "keepdims": True}
    x_hat = np.concatenate([(g - g.mean(**axes)) / np.sqrt(g.var(**axes) + eps) for g in groups], -1)
    np.testing.assert_allclose(layer.apply(PARAMS, (), X), PARAMS["scale"] * x_hat + PARAMS["bias"], rtol=1e-10)


@BOTH
@TOLERANCES
def test_output_and_gradients_are_those_of_pytorch(name, dtype, tolerance, x64):
    torch = pytest.importorskip("torch")
    leaves = [torch.tensor(a.astype(dtype), requires_grad=True) for a in (X, *PARAMS.values())]
    x, scale, bias = leaves
    groups = {"group_norm": 2, "instance_norm": 6}[name]
    theirs = torch.nn.functional.group_norm(x.movedim(-1, 1), groups, scale, bias, eps=1e-6).movedim(1, -1)
    theirs.backward(torch.tensor(DY.astype(dtype)))
    y, dparams, dx = pull(LAYERS[name], *jax.tree.map(lambda a: jnp.asarray(a, dtype), (PARAMS, X, DY)))
    wanted = [theirs.detach(), x.grad, scale.grad, bias.grad]
    for got, want in zip((y, dx, dparams["scale"], dparams["bias"]), wanted, strict=True):
        assert got.dtype == dtype
        np.testing.assert_allclose(got, want.numpy(), rtol=tolerance, atol=10 * tolerance)


@BOTH
def test_a_constant_group_far_from_zero_gives_the_bias_and_finite_gradients(name):
    x = jnp.full((2, 3, 6), 12345.678)
    y, dparams, dx = pull(LAYERS[name], ones(), x, jnp.asarray(DY[:2, :3, 0], jnp.float32))
    np.testing.assert_allclose(y, 0, atol=1e-3)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((dparams, dx)))


@BOTH
def test_examples_do_not_mix_and_half_precision_has_statistics_in_float32(name):
    layer, x = LAYERS[name], jnp.asarray(1000 + 300 * X, jnp.float16)  # the squares overflow float16
    y, _, saved = layer.fwd(ones(jnp.float16), (), x, None)
    assert (y.dtype, saved.x.dtype, saved.rstd.dtype) == (jnp.float16, jnp.float16, jnp.float32)
    assert saved.rstd.shape == (3, 1, {"group_norm": 2, "instance_norm": 6}[name], 1)
    np.testing.assert_allclose(np.square(y.astype(jnp.float32)).mean((1, 2, 3)), 1, rtol=1e-2)
    spoiled = layer.apply(ones(jnp.float16), (), x.at[1].set(jnp.nan))
    np.testing.assert_array_equal(spoiled[0], y[0])
    assert np.isnan(spoiled[1]).all()


def test_without_positions_instance_norm_gives_its_bias():
    y, _, dx = pull(fn.instance_norm(), ones(), jnp.asarray(X[0, 0], jnp.float32), jnp.ones((5, 6)))
    assert not y.any()
    assert not dx.any()


@pytest.mark.parametrize(
    ("layer", "x", "message"),
    [
        (fn.group_norm(4), jnp.ones((2, 6)), "in 4 groups of one size"),
        (fn.group_norm(2), jnp.ones((2, 4)), "6 features"),
        (fn.group_norm(2), jnp.ones(6), "at least 2 axes"),
        (fn.instance_norm(), jnp.ones((2, 6), jnp.int32), "floating"),
        (fn.instance_norm(), jnp.ones((2, 3, 6), jnp.bfloat16), "scale: bfloat16"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(layer, x, message):
    with pytest.raises(fn.InputError, match=message):
        layer.apply(ones(), (), x)


@pytest.mark.parametrize(
    "make", [lambda: fn.group_norm(0), lambda: fn.group_norm(2, eps=0.0), lambda: fn.instance_norm(eps=-1)]
)
def test_options_that_do_not_fit_are_refused(make):
    with pytest.raises(fn.InputError, match=r"positive"):
        make()


# l2_normalize


@TOLERANCES
def test_unit_length_is_that_of_pytorch(dtype, tolerance, x64):
    torch = pytest.importorskip("torch")
    x = torch.tensor(X.astype(dtype), requires_grad=True)
    theirs = torch.nn.functional.normalize(x, dim=-1)
    theirs.backward(torch.tensor(DY.astype(dtype)))
    y, _, dx = pull(fn.l2_normalize(), {}, X.astype(dtype), DY.astype(dtype))
    np.testing.assert_allclose(y, theirs.detach().numpy(), rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(dx, x.grad.numpy(), rtol=tolerance, atol=tolerance)


def test_zero_stays_zero_with_no_gradient_and_leaves_its_neighbours_alone():
    layer, x, dy = fn.l2_normalize(), jnp.array([[0.0, 0.0], [3.0, 4.0]]), jnp.ones((2, 2))
    y, _, dx = pull(layer, {}, x, dy)
    np.testing.assert_allclose(y, [[0, 0], [0.6, 0.8]], rtol=1e-6)
    np.testing.assert_allclose(dx, [[0, 0], [0.032, -0.024]], rtol=1e-5)
    np.testing.assert_allclose(jax.vjp(lambda x: layer.apply({}, (), x), x)[1](dy)[0], dx, rtol=1e-5)


@pytest.mark.parametrize("size", [1e-30, 1e-4, 1e4, 1e30, 3e37, 6e37, 8.5e37])
def test_no_square_overflows_or_vanishes(size):
    dtype = jnp.float16 if 1e-5 < size < 1e5 else jnp.float32
    y, _, dx = pull(fn.l2_normalize(), {}, jnp.array([[3 * size, 4 * size]], dtype), jnp.zeros((1, 2), dtype))
    np.testing.assert_allclose(y.astype(jnp.float32), [[0.6, 0.8]], rtol=1e-6 if dtype == jnp.float32 else 5e-3)
    assert not dx.any()


class Pair(NamedTuple):
    """A layer, and the numbers for its input that are scaled, or for its kernel where the input is none of these."""

    layer: fn.Layer
    x: Any
    kernel: str = ""


DIRECTIONS = {
    "cosine": Pair(fn.cosine(), (X[0, 0], DY[0, 0])),
    "contrastive": Pair(fn.contrastive(), (X[0, 0], DY[0, 0])),
    "triplet": Pair(fn.triplet(), (X[0, 0], (DY[0, 0], X[1, 0]))),
    "weight_norm": Pair(fn.weight_norm(fn.dense(3)), X[0, 0], "direction"),
    "spectral_norm": Pair(fn.spectral_norm(fn.dense(3)), X[0, 0], "kernel"),
}


@pytest.mark.parametrize("size", [1e-20, 1e20, 1e37])
@pytest.mark.parametrize("name", DIRECTIONS)
def test_what_is_made_of_unit_vectors_is_that_of_float64_at_any_size(name, size, x64):
    layer, x, kernel = DIRECTIONS[name]
    kernels = np.float32(size * np.random.default_rng(1).normal(size=(6, 3)))

    def pulled(dtype):
        sized = jax.tree.map(lambda a: jnp.asarray(np.float32(a if kernel else size * a), dtype), x)
        params, state = layer.init(jax.random.key(0), sized)
        if kernel:
            put = lambda path, leaf: jnp.asarray(kernels, dtype) if path[-1].key == kernel else jnp.ones_like(leaf)
            params = jax.tree.map_with_path(put, params)
            state = jax.tree.map(lambda leaf: jnp.ones_like(leaf) / 2, state)
        y, moved, residuals = layer.fwd(params, state, sized, None)
        return y, layer.bwd(params, residuals, jnp.asarray(np.resize([1.0, -0.5, 2.0], y.shape), dtype)), moved

    for got, wanted in zip(*map(jax.tree.leaves, (pulled("float32"), pulled("float64"))), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max() + 1e-37)


def test_integers_have_no_direction():
    with pytest.raises(fn.InputError, match="floating"):
        fn.l2_normalize().apply({}, (), jnp.ones((2, 3), jnp.int32))
