"""Pools: the forward pass and gradients against NumPy, XLA and PyTorch, ties, NaN, and what they refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import funcnet as fn

RNG = np.random.default_rng(0)
POOLS = {"max": fn.max_pool, "avg": fn.avg_pool}
BOTH = pytest.mark.parametrize("name", POOLS)
# (input shape, window, strides, padding)
CASES = {
    "tiles": ((2, 4, 6, 3), 2, None, "VALID"),
    "tiles with a remainder": ((2, 5, 7, 3), 2, None, "VALID"),
    "overlapping": ((2, 7, 7, 3), 3, 2, "VALID"),
    "same": ((2, 5, 6, 3), 3, 2, "SAME"),
    "stride 1": ((1, 4, 5, 2), (2, 3), 1, "same"),
    "gaps": ((2, 9, 8, 1), 2, 3, "VALID"),
    "one axis": ((2, 9, 3), 3, 2, 1),
    "three axes": ((2, 4, 3, 5, 2), (2, 1, 3), (2, 1, 2), "SAME"),
    "uneven pads": ((2, 5, 6, 2), (3, 4), (2, 3), ((2, 1), (0, 3))),
    "the whole input": ((2, 3, 4, 2), (3, 4), None, "VALID"),
    "one entry": ((2, 3, 4, 2), 1, None, "VALID"),
}
EACH = pytest.mark.parametrize("case", CASES)


def pairs(shape, window, strides, padding):
    """Window, strides and pads of each spatial axis."""
    n = len(shape) - 2
    each = lambda value: value if isinstance(value, tuple) else (value,) * n
    window, strides = each(window), each(window if strides is None else strides)
    if padding == "VALID":
        return window, strides, [(0, 0)] * n
    if isinstance(padding, str):
        named = lax.padtype_to_pads(shape[1:-1], window, strides, "SAME")
        return window, strides, [tuple(map(int, pair)) for pair in named]
    return window, strides, [(padding, padding)] * n if isinstance(padding, int) else list(padding)


def reference(name, x, dy, window, strides, pads, count_include_pad=True):
    """y and dx, one window after the other."""
    sizes = zip(x.shape[1:-1], window, strides, pads, strict=True)
    out = tuple((low + n + high - k) // s + 1 for n, k, s, (low, high) in sizes)
    y, dx = np.empty((x.shape[0], *out, x.shape[-1])), np.zeros(x.shape)
    for b, *position, c in np.ndindex(*y.shape):
        starts = [j * s - low for j, s, (low, _) in zip(position, strides, pads, strict=True)]
        inside = tuple(slice(max(0, a), max(0, a + k)) for a, k in zip(starts, window, strict=True))
        entries, at = x[(b, *inside, c)], (b, *position, c)
        if name == "max":
            y[at] = entries.max()
            winner = np.unravel_index(entries.argmax(), entries.shape)
            dx[(b, *inside, c)][winner] += 0 if dy is None else dy[at]
        else:
            count = np.prod(window) if count_include_pad else entries.size
            y[at] = entries.sum() / count
            dx[(b, *inside, c)] += 0 if dy is None else dy[at] / count
    return y, dx


def pull(layer, x):
    """(y, residuals, dy, dx)."""
    y, _, residuals = jax.jit(lambda x: layer.fwd({}, (), x, None))(x)
    dy = np.random.default_rng(1).normal(size=y.shape).astype(y.dtype)
    dparams, dx = jax.jit(lambda *args: layer.bwd({}, *args))(residuals, dy)
    assert dparams == {}
    return y, residuals, dy, dx


@BOTH
@EACH
@pytest.mark.parametrize("ties", [False, True])
def test_output_and_gradient_are_numpys(name, case, ties, x64):
    shape, *options = CASES[case]
    x = RNG.integers(0, 3, size=shape).astype(np.float64) if ties else RNG.normal(size=shape)
    y, _, dy, dx = pull(POOLS[name](*options), x)
    wanted_y, wanted_dx = reference(name, x, dy, *pairs(shape, *options))
    np.testing.assert_allclose(y, wanted_y, rtol=1e-13, atol=1e-14)
    np.testing.assert_allclose(dx, wanted_dx, rtol=1e-13, atol=1e-14)


@EACH
def test_a_mean_may_leave_padding_out(case, x64):
    shape, *options = CASES[case]
    x = RNG.normal(size=shape)
    y, _, dy, dx = pull(fn.avg_pool(*options, count_include_pad=False), x)
    wanted_y, wanted_dx = reference("avg", x, dy, *pairs(shape, *options), count_include_pad=False)
    np.testing.assert_allclose(y, wanted_y, rtol=1e-13)
    np.testing.assert_allclose(dx, wanted_dx, rtol=1e-13)


@EACH
def test_max_pool_gives_what_jax_gives_with_ties_and_infinities(case):
    shape, *options = CASES[case]
    window, strides, pads = pairs(shape, *options)
    x = RNG.integers(0, 3, size=shape).astype(np.float32)
    x = jnp.asarray(np.where(RNG.random(shape) < 0.2, np.inf, x))
    plain = lambda x: lax.reduce_window(x, -np.inf, lax.max, (1, *window, 1), (1, *strides, 1), [(0, 0), *pads, (0, 0)])
    y, _, dy, dx = pull(fn.max_pool(*options), x)
    wanted_y, wanted_dx = jax.jit(lambda x, dy: (plain(x), jax.vjp(plain, x)[1](dy)[0]))(x, dy)
    np.testing.assert_array_equal(y, wanted_y)
    np.testing.assert_allclose(dx, wanted_dx, rtol=1e-6, atol=1e-6)


def torch_pool(torch, name, case, **options):
    shape, window, strides, padding = CASES[case]
    kind = {"max": "MaxPool", "avg": "AvgPool"}[name] + f"{len(shape) - 2}d"
    return getattr(torch.nn, kind)(window, strides, padding if isinstance(padding, int) else 0, **options)


@BOTH
@pytest.mark.parametrize("case", [case for case in CASES if CASES[case][3] in ("VALID", 1)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 1e-5), (np.float64, 1e-10)])
def test_output_and_gradient_are_pytorchs(name, case, dtype, tolerance, x64):
    torch = pytest.importorskip("torch")
    shape, *options = CASES[case]
    x = RNG.normal(size=shape).astype(dtype)
    y, _, dy, dx = pull(POOLS[name](*options), x)
    given = torch.tensor(np.moveaxis(x, -1, 1), requires_grad=True)
    there = torch_pool(torch, name, case)(given)
    there.backward(torch.tensor(np.moveaxis(dy, -1, 1)))
    back = lambda a: np.moveaxis(a.detach().numpy(), 1, -1)
    np.testing.assert_allclose(y, back(there), rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(dx, back(given.grad), rtol=tolerance, atol=tolerance)


def test_the_first_of_equal_maxima_wins():
    _, residuals, dy, dx = pull(fn.max_pool(2), jnp.zeros((1, 4, 4, 1)))
    assert not residuals.offset.any()
    np.testing.assert_array_equal(dx[:, ::2, ::2], dy)
    assert (np.asarray(dx) != 0).sum() == 4
    _, _, dy, dx = pull(fn.global_max_pool(), jnp.zeros((2, 3, 3, 2)))
    np.testing.assert_array_equal(dx[:, 0, 0], dy)
    assert (np.asarray(dx) != 0).sum() == 4


def test_padding_never_wins():
    """Not even where the input is -inf: then the window's first entry inside does."""
    x = jnp.full((1, 3, 3, 1), -jnp.inf)
    _, _, dy, dx = pull(fn.max_pool(3, 3, 2), x)
    np.testing.assert_allclose(dx.sum(), dy.sum(), rtol=1e-6)


def test_nan_wins_and_the_first_one_gets_the_cotangent():
    x = jnp.asarray([[1.0, jnp.nan, 3.0, jnp.nan], [jnp.inf, 0.0, 4.0, 9.0]]).reshape(1, 2, 4, 1)
    y, _, dy, dx = pull(fn.max_pool((2, 4)), x)
    assert np.isnan(y).all()
    np.testing.assert_array_equal(np.asarray(dx).reshape(2, 4), [[0, dy.item(), 0, 0], [0, 0, 0, 0]])
    for layer in (fn.max_pool(2), fn.avg_pool(2)):
        np.testing.assert_array_equal(np.isnan(layer.apply({}, (), x)).reshape(-1), [True, True])
    y, _, dy, dx = pull(fn.global_max_pool(), x)
    assert np.isnan(y).all()
    assert (dx[0, 0, 1, 0], np.asarray(dx != 0).sum()) == (dy.item(), 1)


@pytest.mark.parametrize("shape", [(2, 5, 3), (2, 5, 4, 3), (3, 2, 4, 5, 1)])
def test_global_pools_are_numpys_and_drop_the_spatial_axes(shape, x64):
    x, axes = RNG.normal(size=shape), tuple(range(1, len(shape) - 1))
    y, _, dy, dx = pull(fn.global_avg_pool(), x)
    np.testing.assert_allclose(y, x.mean(axes), rtol=1e-12)
    spread = np.expand_dims(dy, axes)
    np.testing.assert_allclose(dx, np.broadcast_to(spread, shape) / np.prod(shape[1:-1]), rtol=1e-12)
    y, _, dy, dx = pull(fn.global_max_pool(), x)
    np.testing.assert_array_equal(y, x.max(axes))
    np.testing.assert_array_equal(dx, np.where(x == x.max(axes, keepdims=True), np.expand_dims(dy, axes), 0))


def test_residuals_are_one_byte_a_window():
    x = jnp.ones((2, 32, 32, 3))
    saved = lambda layer: sum(
        leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(jax.eval_shape(layer.fwd, {}, (), x, None)[2])
    )
    assert saved(fn.max_pool(2)) == 2 * 16 * 16 * 3
    assert saved(fn.max_pool((15, 17))) == 2 * 2 * 1 * 3
    assert saved(fn.max_pool(16)) == 2 * 2 * 2 * 3 * 2
    assert saved(fn.global_max_pool()) == 2 * 3 * 4
    assert saved(fn.avg_pool(2)) == saved(fn.global_avg_pool()) == 0


def test_a_window_of_more_than_255_entries():
    x = RNG.normal(size=(1, 256, 2)).astype(np.float32)
    y, _, dy, dx = pull(fn.max_pool(256), x)
    np.testing.assert_array_equal(y[:, 0], x.max(1))
    np.testing.assert_array_equal(dx, np.where(x == x.max(1, keepdims=True), dy, 0))


def test_there_is_no_scatter_in_the_backward_pass():
    for layer in (fn.max_pool(2), fn.max_pool(3, 2, "SAME")):
        y, _, residuals = jax.eval_shape(layer.fwd, {}, (), jnp.ones((2, 8, 8, 3)), None)
        assert "scatter" not in jax.jit(layer.bwd).lower({}, residuals, y).as_text()


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_half_precision_is_summed_in_float32(dtype):
    """Means of ones, whose sum bfloat16 could not count to; and three cotangents of which two are half an ulp."""
    ones = jnp.ones((1, 300, 1), dtype)
    for layer in (fn.avg_pool(300), fn.global_avg_pool()):
        y, _, _, dx = pull(layer, ones)
        assert (y.dtype, dx.dtype, y.item()) == (dtype, dtype, 1)
    layer = fn.max_pool(3, 1, 1)
    residuals = layer.fwd({}, (), jnp.arange(3.0).at[1].set(9).reshape(1, 3, 1).astype(dtype), None)[2]
    dy = jnp.asarray([1.0, jnp.finfo(dtype).eps / 2, jnp.finfo(dtype).eps / 2]).reshape(1, 3, 1).astype(dtype)
    dx = layer.bwd({}, residuals, dy)[1].astype(jnp.float32)
    np.testing.assert_array_equal(dx.reshape(-1), [0, 1 + jnp.finfo(dtype).eps, 0])


@BOTH
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((0,), "window as a positive whole number"),
        (((2, 0),), "window as a positive whole number"),
        ((2.0,), "window as a positive whole number"),
        (((),), "at least one axis"),
        ((2, 0), "strides as a positive whole number"),
        (((2, 2), (1, 1, 1)), "window for 2, strides for 3"),
        ((2, 1, "CAUSAL"), "SAME"),
        ((2, 1, -1), "SAME"),
        ((2, 1, (1, 1)), "SAME"),
        ((2, 1, ((1, -1),)), "SAME"),
        ((2, 1, None), "SAME"),
    ],
)
def test_options_that_make_no_sense_are_refused(name, options, message):
    with pytest.raises(fn.InputError, match=message):
        POOLS[name](*options)


@BOTH
@pytest.mark.parametrize(
    ("options", "x", "message"),
    [
        ((2,), jnp.ones((2, 3)), "at least 3 axes"),
        ((2,), jnp.ones((2, 3, 3), jnp.int32), "floating"),
        ((2,), jnp.ones((0, 3, 3)), "not empty"),
        (((2, 2),), jnp.ones((2, 3, 3)), "2 spatial axes"),
        ((4,), jnp.ones((2, 5, 3, 1)), r"a window over \[4, 4\] fits in"),
        ((2, 1, 2), jnp.ones((2, 3, 3)), "padding smaller than the window"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(name, options, x, message):
    with pytest.raises(fn.InputError, match=message) as caught:
        POOLS[name](*options).apply({}, (), x)
    assert str(caught.value).startswith(f"{name}_pool")


@pytest.mark.parametrize("layer", [fn.max_pool(2), fn.avg_pool(2), fn.global_max_pool(), fn.global_avg_pool()])
def test_a_cotangent_that_does_not_fit_is_refused(layer):
    y, _, residuals = layer.fwd({}, (), jnp.ones((2, 4, 4, 3)), None)
    for dy in (y[:1], y.astype(jnp.float16), y[..., :2]):
        with pytest.raises(fn.InputError, match=r"float32\[2"):
            layer.bwd({}, residuals, dy)
    if layer.name.startswith("global"):
        with pytest.raises(fn.InputError, match="at least 3 axes"):
            layer.apply({}, (), jnp.ones((2, 3)))
