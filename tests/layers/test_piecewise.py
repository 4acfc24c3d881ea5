"""prelu and maxout: PyTorch, NumPy, kinks and ties, NaN, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import funcnet as fn

RNG = np.random.default_rng(0)
X, DY = RNG.normal(size=(4, 3, 6)), RNG.normal(size=(4, 3, 6))
SLOPE = RNG.normal(size=6)
TOLERANCES = pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float64", 1e-10)])


def pull(layer, params, x, dy):
    """(y, dparams, dx)."""
    y, _, residuals = layer.fwd(params, (), x, None)
    return y, *layer.bwd(params, residuals, dy)


@TOLERANCES
def test_prelu_is_that_of_pytorch(dtype, tolerance, x64):
    torch = pytest.importorskip("torch")
    x, slope = (torch.tensor(a.astype(dtype), requires_grad=True) for a in (X, SLOPE))
    theirs = torch.nn.functional.prelu(x.movedim(-1, 1), slope).movedim(1, -1)
    theirs.backward(torch.tensor(DY.astype(dtype)))
    y, dparams, dx = pull(fn.prelu(), {"slope": jnp.asarray(SLOPE, dtype)}, X.astype(dtype), DY.astype(dtype))
    for got, wanted in ((y, theirs.detach()), (dx, x.grad), (dparams["slope"], slope.grad)):
        assert got.dtype == dtype
        np.testing.assert_allclose(got, wanted.numpy(), rtol=tolerance, atol=tolerance)


def test_prelu_at_its_kink_has_the_slope_below_and_keeps_nan():
    params, _ = fn.prelu(0.3).init(None, jnp.ones((2, 3)))
    x = jnp.array([[0.0, -0.0, jnp.nan]])
    y, dparams, dx = pull(fn.prelu(), params, x, jnp.ones((1, 3)))
    np.testing.assert_array_equal(y, [[0, 0, np.nan]])
    np.testing.assert_allclose(dx[0, :2], [0.3, 0.3], rtol=1e-6)
    np.testing.assert_array_equal(dparams["slope"][:2], [0, 0])
    plain = jax.vjp(lambda x: fn.prelu().apply(params, (), x), x)[1](jnp.ones((1, 3)))[0]
    np.testing.assert_array_equal(plain[0, :2], dx[0, :2])


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_prelu_sums_half_precision_slopes_in_float32(dtype):
    x = -jnp.ones((4096, 1), dtype)
    dparams = pull(fn.prelu(), {"slope": jnp.ones(1, dtype)}, x, jnp.ones_like(x))[1]
    assert (dparams["slope"].dtype, dparams["slope"].item()) == (dtype, -4096)


@pytest.mark.parametrize("pieces", [1, 2, 3, 6])
def test_maxout_is_the_largest_of_its_pieces(pieces, x64):
    parts = np.stack(np.split(X, pieces, -1))
    dy = DY[..., : 6 // pieces]
    y, _, dx = pull(fn.maxout(pieces), {}, X, dy)
    np.testing.assert_array_equal(y, parts.max(0))
    np.testing.assert_array_equal(dx, np.concatenate(np.where(parts == parts.max(0), dy, 0), -1))


def test_of_equal_pieces_the_first_takes_the_gradient_and_nan_wins():
    x = jnp.array([[1.0, 2.0, jnp.nan, 1.0, 3.0, 5.0]])
    y, _, dx = pull(fn.maxout(2), {}, x, jnp.array([[7.0, 8.0, 9.0]]))
    np.testing.assert_array_equal(y, [[1, 3, np.nan]])
    np.testing.assert_array_equal(dx, [[7, 0, 9, 0, 8, 0]])


@pytest.mark.parametrize(("pieces", "kept"), [(128, jnp.int8), (129, jnp.int32)])
def test_maxout_saves_small_numbers_alone(pieces, kept):
    x = jnp.asarray(RNG.normal(size=(2, 3 * pieces)), jnp.float32).at[0, -3].set(99.0)
    y, _, saved = fn.maxout(pieces).fwd({}, (), x, None)
    assert (saved.shape, saved.dtype, saved[0, 0]) == ((2, 3), kept, pieces - 1)
    dx = fn.maxout(pieces).bwd({}, saved, jnp.ones((2, 3)))[1]
    np.testing.assert_allclose(jnp.sum(jnp.where(dx == 1, x, 0), -1), jnp.sum(y, -1), rtol=1e-6)


@pytest.mark.parametrize(
    ("layer", "params", "x", "message"),
    [
        (fn.prelu(), {"slope": jnp.ones(3)}, jnp.ones((2, 4)), "3 features"),
        (fn.prelu(), {"kernel": jnp.ones(3)}, jnp.ones((2, 3)), r"slope: float32\[3\]"),
        (fn.prelu(), {"slope": jnp.ones(3)}, jnp.ones((2, 3), jnp.float16), "slope: float16"),
        (fn.maxout(4), {}, jnp.ones((2, 6)), "4 pieces"),
        (fn.maxout(2), {}, jnp.ones((2, 6), jnp.int32), "floating"),
    ],
)
def test_what_does_not_fit_is_refused(layer, params, x, message):
    with pytest.raises(fn.InputError, match=message):
        layer.apply(params, (), x)


def test_no_pieces_are_refused():
    with pytest.raises(fn.InputError, match="pieces"):
        fn.maxout(0)
