"""lru: against a loop in NumPy and `jax.grad` of one; every contraction, what it keeps, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import funcnet as fn

KEY = jax.random.key(0)
B, T, D, F, N = 3, 6, 4, 2, 5
LAYER = fn.lru(F, N)


def setting(dtype=np.float64):
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape).astype(dtype))
    params = {"nu": draw(N), "theta": draw(N), "kernel_real": draw(D, N), "kernel_imag": draw(D, N)}
    return params | {"out_real": draw(N, F), "out_imag": draw(N, F)}, draw(B, T, D), draw(B, T, F)


def in_turn(p, x):
    """y [T, F] of one example, a step at a time, as the paper writes it; NumPy's or JAX's."""
    exp = np.exp if isinstance(x, np.ndarray) else jnp.exp
    lam = exp(-exp(p["nu"]) + 1j * exp(p["theta"]))
    gain = (1 - abs(lam) ** 2) ** 0.5
    h, y = 0 * lam, []
    for step in x:
        h = lam * h + gain * (step @ (p["kernel_real"] + 1j * p["kernel_imag"]))
        y.append((h @ (p["out_real"] + 1j * p["out_imag"])).real)
    return y


def test_the_output_is_numpys(x64):
    params, x, _ = setting()
    p = {name: np.asarray(value) for name, value in params.items()}
    wanted = np.array([in_turn(p, example) for example in np.asarray(x)])
    np.testing.assert_allclose(LAYER.apply(params, (), x), wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("contract", [fn.total, fn.per_example, fn.squared_norm])
def test_gradients_are_autodiffs_of_a_loop_by_every_contraction(contract, x64, standard_promotion):
    params, x, dy = setting()
    own = lambda x, dy: jax.vjp(lambda p, x: jnp.stack(in_turn(p, x)), params, x)[1](dy)
    each, dx = jax.jit(jax.vmap(own))(x, dy)
    _, _, residuals = LAYER.fwd(params, (), x, None)
    got, got_dx = LAYER.bwd(params, residuals, dy, contract)
    wanted = {
        fn.total: lambda g: g.sum(0),
        fn.per_example: lambda g: g,
        fn.squared_norm: lambda g: jnp.sum(jnp.square(g), axis=tuple(range(1, g.ndim))),
    }[contract]
    np.testing.assert_allclose(got_dx, dx, rtol=1e-9, atol=1e-12)
    for name, gradient in each.items():
        np.testing.assert_allclose(got[name], wanted(gradient), rtol=1e-9, atol=1e-12, err_msg=name)


def test_it_keeps_its_input_and_its_states_alone():
    residuals = jax.eval_shape(
        LAYER.fwd, *jax.eval_shape(LAYER.init, KEY, jnp.ones((B, T, D))), jnp.ones((B, T, D)), None
    )[2]
    assert [(leaf.shape, leaf.dtype) for leaf in residuals] == [((B, T, D), jnp.float32), ((B, T, N), jnp.complex64)]


def test_states_have_the_size_of_their_input_and_lie_in_the_ring_at_first():
    layer = fn.lru(1, 400, r_min=0.5, r_max=0.9, max_phase=1.0)
    params, _ = layer.init(KEY, jnp.ones((1, 1, 3)))
    radius, angle = np.exp(-np.exp(params["nu"])), np.exp(params["theta"])
    assert 0.5 <= radius.min() < 0.55
    assert 0.87 < radius.max() <= 0.9
    assert 0.9 < angle.max() <= 1.0
    x = jax.random.normal(jax.random.key(1), (64, 100, 3))
    h = layer.fwd(params, (), x, None)[2].h[:, -1]
    assert 0.8 < float(jnp.mean(jnp.abs(h) ** 2)) < 1.2


def test_a_state_that_hardly_decays_has_a_gradient():
    """|lambda| is 1 in float32, 1 - |lambda| is not 0."""
    layer, x = fn.lru(F, 100, r_min=1 - 1e-8), jnp.ones((1, T, D))
    params, _ = layer.init(KEY, x)
    gradients = layer.bwd(params, layer.fwd(params, (), x, None)[2], jnp.ones((1, T, F)))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((params, gradients)))


def test_where_nothing_decays_the_gradient_of_nu_is_its_limit(x64):
    """In float32 gamma is 0 from nu = -88. Before that it is sqrt(-2 a) but for O(a), its derivative by nu half of it.

    y_1 + y_2 = gamma (Re - Im)((1 + i)(2 + e^(i b))) = -2 gamma sin b.
    """
    layer, x = fn.lru(1, 1), jnp.ones((1, 2, 1))
    params = {name: jnp.ones((1, 1)) for name in layer.init(KEY, x)[0]} | {"theta": jnp.ones(1)}

    def dnu(nu, dtype):
        own, at = jax.tree.map(lambda a: a.astype(dtype), (params | {"nu": jnp.full(1, nu)}, x))
        return float(layer.bwd(own, layer.fwd(own, (), at, None)[2], jnp.ones((1, 2, 1), dtype))[0]["nu"][0])

    assert dnu(-95, jnp.float32) == 0
    for dtype, tolerance in ((jnp.float32, 1e-5), (jnp.float64, 1e-12)):
        np.testing.assert_allclose(dnu(-60, dtype), -np.sqrt(2) * np.exp(-30) * np.sin(np.e), rtol=tolerance)


@pytest.mark.parametrize("nu", [79.0, 88.0, 89.0, 1e30])
def test_where_nothing_is_left_after_a_step_the_gradient_of_nu_is_0(nu):
    layer, x = fn.lru(2, 2), jnp.ones((1, 3, 2))
    params = layer.init(KEY, x)[0] | {"nu": jnp.full(2, nu)}
    y, _, residuals = layer.fwd(params, (), x, None)
    pull = jax.vjp(lambda params: layer.apply(params, (), x), params)[1]
    for dparams in (layer.bwd(params, residuals, y)[0], pull(y)[0]):
        assert all(np.isfinite(leaf).all() for leaf in dparams.values())
        np.testing.assert_array_equal(dparams["nu"], [0, 0])


def test_where_much_decays_autodiff_of_the_forward_pass_is_exact_too(x64):
    layer, x, dy = fn.lru(1, 1), jnp.ones((1, 1, 1)), jnp.ones((1, 1, 1))
    params = {name: jnp.ones((1, 1)) for name in layer.init(KEY, x)[0]} | {"theta": jnp.ones(1), "nu": jnp.full(1, 1.9)}
    (plain,) = jax.vjp(lambda params: layer.apply(params, (), x), params)[1](dy)
    ours, _ = layer.bwd(params, layer.fwd(params, (), x, None)[2], dy)
    np.testing.assert_allclose(ours["nu"], plain["nu"], rtol=1e-14)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_half_precision_is_float32_rounded(dtype):
    params, x, dy = jax.tree.map(lambda a: a.astype(dtype), setting(np.float32))
    run = lambda params, x, dy: LAYER.bwd(params, LAYER.fwd(params, (), x, None)[2], dy)
    got = run(params, x, dy)
    wanted = run(*jax.tree.map(lambda a: a.astype(jnp.float32), (params, x, dy)))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert a.dtype == dtype
        error = np.abs(np.asarray(a, np.float32) - b).max() / np.abs(b).max()
        assert error < 4 * float(jnp.finfo(dtype).eps)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"features": 0}, "features"),
        ({"states": 0}, "states"),
        ({"r_min": 1.0}, "r_min"),
        ({"max_phase": 0.0}, "phase"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(fn.InputError, match=message):
        fn.lru(**{"features": F, "states": N} | options)


def test_what_does_not_fit_is_refused():
    params, x, _ = setting(np.float32)
    for bad in (x[0], x[..., :2], x.astype(jnp.bfloat16), jnp.ones((B, T, D), jnp.int32)):
        with pytest.raises(fn.InputError):
            LAYER.apply(params, (), bad)
    residuals = LAYER.fwd(params, (), x, None)[2]
    with pytest.raises(fn.InputError, match="cotangent"):
        LAYER.bwd(params, residuals, x)
