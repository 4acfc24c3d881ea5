"""dropout and its variants: the share that is dropped, what goes as a whole, the same mask in both directions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import funcnet as fn

KEY = jax.random.key(0)
RATES = pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 0.9])


def drop(rate, x, key=KEY):
    return fn.dropout(rate).fwd({}, (), x, key)[0]


@RATES
def test_units_are_dropped_at_the_rate_and_the_others_scaled(rate):
    n = 40_000
    y = np.asarray(drop(rate, jnp.full((n // 4, 4), 3.0)))
    kept = y != 0
    np.testing.assert_allclose(y[kept], 3 / (1 - rate), rtol=1e-6)
    assert abs(kept.mean() - (1 - rate)) <= 5 * np.sqrt(rate * (1 - rate) / n)
    assert abs(np.corrcoef(kept[:-1].ravel(), kept[1:].ravel())[0, 1]) < 0.03 if rate else kept.all()


@RATES
def test_bwd_draws_the_mask_of_fwd_again(rate):
    x = jnp.linspace(1.0, 2.0, 60).reshape(5, 4, 3)
    dy = jnp.cos(7 * x)
    y, _, residuals = fn.dropout(rate).fwd({}, (), x, KEY)
    dparams, dx = fn.dropout(rate).bwd({}, residuals, dy)
    assert dparams == {}
    np.testing.assert_allclose(dx, np.asarray(dy) * np.asarray(y) / np.asarray(x), rtol=1e-6)


def test_only_the_key_is_kept():
    residuals = fn.dropout(0.5).fwd({}, (), jnp.ones((1000, 1000)), KEY)[2]
    assert sum(jax.random.key_data(leaf).nbytes for leaf in jax.tree.leaves(residuals)) == 8


def test_a_key_gives_one_mask_and_another_key_another():
    x = jnp.ones((8, 8))
    np.testing.assert_array_equal(drop(0.5, x), drop(0.5, x))
    assert (drop(0.5, x) != drop(0.5, x, jax.random.key(1))).any()


def test_evaluation_drops_nothing():
    x = jnp.ones((4, 3))
    params, state = fn.dropout(0.9).init(KEY, x)
    assert (params, state) == ({}, ())
    np.testing.assert_array_equal(fn.dropout(0.9).apply(params, state, x), x)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_half_precision_stays_half_precision(dtype):
    y, _, residuals = fn.dropout(0.25).fwd({}, (), jnp.ones((8, 8), dtype), KEY)
    dx = fn.dropout(0.25).bwd({}, residuals, jnp.ones((8, 8), dtype))[1]
    assert y.dtype == dx.dtype == dtype
    assert set(np.asarray(y, np.float32).ravel().tolist()) == {0.0, float(jnp.asarray(4 / 3, dtype))}


def test_a_dropped_unit_hides_a_bad_cotangent_and_a_kept_one_does_not():
    y, _, residuals = fn.dropout(0.5).fwd({}, (), jnp.ones((8, 8)), KEY)
    dx = fn.dropout(0.5).bwd({}, residuals, jnp.full((8, 8), jnp.nan))[1]
    np.testing.assert_array_equal(np.isnan(dx), y != 0)


@pytest.mark.parametrize("rate", [-0.1, 1.0, 1.5, float("nan")])
def test_a_rate_out_of_range_is_refused(rate):
    with pytest.raises(fn.InputError, match="rate"):
        fn.dropout(rate)


def test_training_without_a_key_is_refused_under_the_layers_name():
    model = fn.serial(fn.relu(), fn.dropout(0.5))
    with pytest.raises(fn.InputError, match="a random key") as error:
        model.fwd(*model.init(KEY, jnp.ones((2, 3))), jnp.ones((2, 3)), None)
    assert error.value.path == ("dropout",)


@pytest.mark.parametrize("x", [jnp.ones((2, 3), jnp.int32), jnp.ones((0, 3)), 1.0])
def test_an_input_that_does_not_fit_is_refused(x):
    layer = fn.dropout(0.5)
    for call in (layer.init, lambda key, x: layer.apply({}, (), x), lambda key, x: layer.fwd({}, (), x, key)):
        with pytest.raises(fn.InputError, match="floating"):
            call(KEY, x)


# Of whole channels and whole examples

WHOLE = {"spatial_dropout": (fn.spatial_dropout, (1, 2)), "drop_path": (fn.drop_path, (1, 2, 3))}
VARIANTS = pytest.mark.parametrize("name", WHOLE)


@VARIANTS
@RATES
def test_channels_or_examples_are_dropped_whole_at_the_rate(name, rate):
    make, axes = WHOLE[name]
    x = jnp.linspace(1.0, 2.0, 2000 * 2 * 2 * 3).reshape(2000, 2, 2, 3)
    y, _, saved = make(rate).fwd({}, (), x, KEY)
    kept = np.asarray(y) != 0
    np.testing.assert_array_equal(kept.all(axes), kept.any(axes))
    np.testing.assert_allclose(y, np.where(kept, x / (1 - rate), 0), rtol=1e-6)
    units = kept.all(axes)
    assert abs(units.mean() - (1 - rate)) <= 5 * np.sqrt(rate * (1 - rate) / units.size)
    dparams, dx = make(rate).bwd({}, saved, jnp.ones_like(x))
    assert dparams == {}
    np.testing.assert_allclose(dx, kept / (1 - rate), rtol=1e-6)
    assert jax.random.key_data(saved).nbytes == 8


@VARIANTS
def test_the_variants_drop_nothing_in_evaluation_and_need_a_key_in_training(name):
    layer, x = WHOLE[name][0](0.5), jnp.ones((4, 2, 3))
    np.testing.assert_array_equal(layer.apply({}, (), x), x)
    with pytest.raises(fn.InputError, match="a random key") as error:
        layer.fwd({}, (), x, None)
    assert error.value.kind == name
    with pytest.raises(fn.InputError, match="floating"):
        layer.apply({}, (), jnp.ones((2, 3), jnp.int32))
    with pytest.raises(fn.InputError, match="rate"):
        WHOLE[name][0](1.0)


def test_spatial_dropout_needs_channels():
    with pytest.raises(fn.InputError, match="at least 2 axes"):
        fn.spatial_dropout(0.5).apply({}, (), jnp.ones(3))


def test_drop_path_in_a_skip_lets_examples_go_around_the_block():
    double = fn.elementwise("double", lambda x: 2 * x, lambda x: 2 * jnp.ones_like(x))
    layer, x = fn.skip(fn.serial(double, fn.drop_path(0.5))), jnp.ones((64, 3))
    params, state = layer.init(KEY, x)
    y = layer.fwd(params, state, x, KEY)[0]
    assert set(np.asarray(y).ravel().tolist()) == {1.0, 5.0}
    np.testing.assert_array_equal(y.min(1), y.max(1))
