"""Encodings of positions against their definitions, and counted by segments."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import funcnet as fn

S = jax.ShapeDtypeStruct
KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
TABLE = RNG.normal(size=(7, 5))
IDS = np.array([[3, 0, 3], [6, 6, 6], [1, 2, 3], [0, 0, 5]])
DY = RNG.normal(size=(4, 3, 5))
TOLERANCES = pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float64", 1e-10)])
HALF = pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])


def test_a_learned_row_is_added_to_each_position():
    x, table = DY.astype(np.float32), RNG.normal(size=(6, 5)).astype(np.float32)
    layer, params = fn.position_embedding(6), {"embedding": jnp.asarray(table)}
    y, _, saved = layer.fwd(params, (), x, None)
    np.testing.assert_allclose(y, x + table[:3], rtol=1e-6)
    dparams, dx = layer.bwd(params, saved, x)
    np.testing.assert_array_equal(dx, x)
    np.testing.assert_allclose(dparams["embedding"], np.concatenate([x.sum(0), np.zeros((3, 5))]), rtol=1e-5, atol=1e-6)
    params, state = layer.init(KEY, S((2, 3, 5), jnp.bfloat16))
    assert (params["embedding"].shape, params["embedding"].dtype, state) == ((6, 5), jnp.bfloat16, ())


def test_more_positions_than_there_are_rows_are_refused():
    params = {"embedding": jnp.ones((2, 5))}
    for call in (fn.position_embedding(2).apply, lambda p, s, x: fn.position_embedding(2).init(KEY, x)):
        with pytest.raises(fn.InputError, match="at most 2 positions"):
            call(params, (), jnp.ones((4, 3, 5)))
    with pytest.raises(fn.InputError, match="at least 2 axes"):
        fn.position_embedding(2).apply(params, (), jnp.ones(5))


@TOLERANCES
def test_waves_are_those_of_the_paper_sines_first(dtype, tolerance, x64):
    angles = np.arange(50)[:, None] / 1e4 ** (np.arange(0, 8, 2) / 8)
    wanted = np.concatenate([np.sin(angles), np.cos(angles)], 1)
    y = fn.sinusoidal_positions().apply({}, (), jnp.zeros((2, 50, 8), dtype))
    assert y.dtype == dtype
    np.testing.assert_allclose(y, np.broadcast_to(wanted, (2, 50, 8)), atol=tolerance)


@HALF
def test_waves_in_half_precision_come_from_angles_in_float32(dtype):
    y = fn.sinusoidal_positions().apply({}, (), jnp.zeros((1, 1000, 4), dtype))
    wanted = fn.sinusoidal_positions().apply({}, (), jnp.zeros((1, 1000, 4)))
    np.testing.assert_array_equal(y, wanted.astype(dtype))


# rotary


@TOLERANCES
def test_rotary_turns_pairs_as_complex_numbers_and_its_vjp_is_its_inverse(dtype, tolerance, x64):
    x, dy = (RNG.normal(size=(2, 9, 3, 6)) for _ in range(2))
    positions = np.arange(9)[None, :, None]
    turn = np.exp(1j * positions[..., None] / 100.0 ** (np.arange(3) / 3))
    wanted = (x[..., :3] + 1j * x[..., 3:]) * turn
    y, pullback = jax.vjp(lambda x: fn.rotary(x, positions, 100.0), jnp.asarray(x, dtype))
    np.testing.assert_allclose(y, np.concatenate([wanted.real, wanted.imag], -1), atol=tolerance)
    dy = jnp.asarray(dy, dtype)
    np.testing.assert_allclose(fn.rotary(dy, -positions, 100.0), pullback(dy)[0], atol=tolerance)
    np.testing.assert_allclose(fn.rotary(y, -positions, 100.0), x, atol=tolerance)


def test_rotated_inner_products_depend_on_the_distance_alone(x64):
    q, k = (jnp.asarray(RNG.normal(size=(1, 8))) for _ in range(2))
    at = lambda x, t: fn.rotary(x, jnp.array([t]))
    products = [(at(q, t + 3) * at(k, t)).sum() for t in (0, 5, -40)]
    np.testing.assert_allclose(products, products[0], rtol=1e-12)


@pytest.mark.parametrize(
    ("x", "positions", "message"),
    [
        (jnp.ones((4, 3)), jnp.arange(4), "even number"),
        (jnp.ones((2, 4, 6)), jnp.arange(4), r"2 axes, of the sizes \[2, 4\]"),
        (jnp.ones((4, 6)), jnp.arange(3), "sizes"),
        (jnp.ones((4, 6)), jnp.arange(4, dtype=jnp.uint32), "signed"),
        (jnp.ones((4, 6), jnp.int32), jnp.arange(4), "floating"),
    ],
)
def test_rotary_refuses_what_does_not_fit(x, positions, message):
    with pytest.raises(fn.InputError, match=message):
        fn.rotary(x, positions)


@pytest.mark.parametrize("make", [fn.sinusoidal_positions, lambda base: fn.rotary(jnp.ones(2), jnp.array(1), base)])
def test_a_base_that_is_not_greater_than_one_is_refused(make):
    with pytest.raises(fn.InputError, match="base"):
        make(base=1.0)


def test_an_odd_number_of_features_has_no_waves():
    with pytest.raises(fn.InputError, match="even number"):
        fn.sinusoidal_positions().apply({}, (), jnp.ones((2, 3, 5)))
