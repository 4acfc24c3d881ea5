"""Squared norms where the shares of positions cancel, against the same factors in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import funcnet as fn
from funcnet._internal.casting import cast
from funcnet.gradients import gram
from tests.trees import normal

HALF_AND_SINGLE = ["float32", "bfloat16", "float16"]
squared_norm = jax.jit(lambda factor, param: fn.squared_norm(factor, param))  # once for each shape and dtype


def cancelling(seed, shape, dtype="float32", left=0.0):
    """x that is the same at all positions, and dy [B, T, F] whose sum over positions is `left` of its terms' size."""
    batch, steps, inputs, outputs = shape
    rng = np.random.default_rng(seed)
    x = np.repeat(rng.standard_normal((batch, 1, inputs)), steps, 1)
    dy = rng.standard_normal((batch, steps, outputs))
    dy = dy - dy.mean(1, keepdims=True) + left * rng.standard_normal((batch, 1, outputs))
    return jnp.asarray(x, dtype), jnp.asarray(dy, dtype)


def gradients(factor, size):
    """One gradient an example, in float64, by NumPy."""
    match factor:
        case fn.Sum(factors):
            return sum(gradients(each, size) for each in factors)
        case fn.Gather(ids, dy):
            x = np.eye(size + 1)[np.where((ids < 0) | (ids >= size), size, ids), :size]
        case fn.Outer(x, dy):
            pass
    x, dy = (np.asarray(a, np.float64).reshape(len(a), -1, a.shape[-1]) for a in (x, dy))
    return np.einsum("bti,btj->bij", x, dy)


def assert_right(factor, param):
    wanted = np.square(gradients(factor, param.shape[0])).sum((1, 2))
    got = np.asarray(squared_norm(factor, param))
    np.testing.assert_allclose(got, wanted, rtol=1e-3)
    return wanted


def test_positions_that_cancel_to_nothing_have_next_to_no_norm():
    x = jnp.repeat(jax.random.normal(jax.random.key(3), (1, 1, 64)), 7, 1)
    layer, dy = fn.dense(7, use_bias=False), 1 / 7 - jnp.eye(7)[None]
    params = {"kernel": jnp.zeros((64, 7))}
    residuals = layer.fwd(params, (), x, None)[2]
    squares = layer.bwd(params, residuals, dy, fn.squared_norm)[0]["kernel"]
    assert 0 <= squares[0] < 1e-12
    assert_right(layer.bwd(params, residuals, dy, fn.keep)[0]["kernel"], params["kernel"])


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE)
@pytest.mark.parametrize("left", [0.0, 1e-8, 1e-6, 1e-4, 1.0])
@pytest.mark.parametrize("shape", [(2, 7, 64, 7), (2, 2, 5, 3), (1, 16, 24, 40), (2, 1, 5, 3), (2, 2, 8, 1)], ids=str)
def test_a_norm_is_right_however_much_cancels(shape, left, dtype):
    x, dy = cancelling(1, shape, dtype, left)
    assert_right(fn.Outer(x, dy), jnp.zeros((shape[2], shape[3]), dtype))


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE)
def test_uses_that_cancel(dtype):
    x, dy = cancelling(2, (2, 3, 40, 30), dtype, 1.0)
    other = normal(3, jax.ShapeDtypeStruct((2, 3, 40), jnp.dtype(dtype)))
    against = fn.Sum((fn.Outer(x, dy), fn.Outer(x, -dy), fn.Outer(1e-3 * other, dy)))
    assert_right(against, jnp.zeros((40, 30), dtype))


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE)
def test_a_table_and_a_head_that_cancel(dtype):
    """The head takes off at its one-hot positions what the lookup adds, but for a little."""
    ids = jnp.array([[3, 1, 3], [0, 40, 2]])  # 40 is no row
    dy = normal(4, jax.ShapeDtypeStruct((2, 3, 30), jnp.dtype(dtype)))
    head = fn.Outer(jax.nn.one_hot(ids, 40, dtype=dtype), -dy.at[:, 0].multiply(1 + 2**-6))
    assert_right(fn.Sum((fn.Gather(ids, dy, 40), head)), jnp.zeros((40, 30), dtype))
    assert_right(fn.Sum((head, fn.Gather(ids, dy, 40))), jnp.zeros((40, 30), dtype))


def test_a_head_and_a_table_in_either_order():
    ids, shapes = jnp.array([[3, 1], [0, 40]]), [(2, 3, 40), (2, 3, 30), (2, 2, 30)]
    x, dy, of_table = (normal(n, jax.ShapeDtypeStruct(shape, jnp.float32)) for n, shape in enumerate(shapes))
    uses = fn.Outer(x, dy), fn.Gather(ids, of_table, 40)
    for order in (uses, uses[::-1]):
        assert_right(fn.Sum(order), jnp.zeros((40, 30)))


def test_rows_without_a_positive_entry_are_not_zero():
    x, dy = (-jax.nn.relu(normal(seed, jax.ShapeDtypeStruct((2, 2, 8), jnp.float32))) for seed in (1, 2))
    assert not np.any(np.max(np.asarray(x), -1))
    assert np.all(assert_right(fn.Outer(x, dy), jnp.zeros((8, 8))) > 0)


def models():
    x = jnp.repeat(normal(6, jax.ShapeDtypeStruct((2, 1, 24), jnp.float32)), 4, 1)
    head = fn.serial(embedding=fn.embedding(24, 24), head=fn.dense(24, use_bias=False))
    return {
        "dense": (fn.dense(30), x),
        "attention": (fn.attention(2), x),
        "mlp": (fn.mlp(32, 24), x),
        "repeat": (fn.repeat(fn.dense(24), 2), x),
        "nested repeat": (fn.repeat(fn.repeat(fn.dense(24), 2), 2), x),
        "lstm": (fn.lstm(12), x),
        "lru": (fn.lru(24, 24), x),
        "conv of one entry": (fn.conv(24, 1), x),
        "tied": (fn.tied(head, {"head/kernel": "embedding/embedding.T"}), jnp.zeros((2, 4), jnp.int32)),
        "mixed": (fn.mixed(fn.dense(24)), x),
        "weight_norm": (fn.weight_norm(fn.dense(24)), x),
    }


def innermost(factor):
    return innermost(factor.factor) if isinstance(factor, fn.Stacked) else factor


@pytest.mark.parametrize("name", models())
def test_no_layer_has_a_norm_that_is_off(name):
    """The same input at all positions, and cotangents that cancel over them: squared_norm is that of per_example."""
    layer, x = models()[name]
    params, state = jax.eval_shape(layer.init, jax.random.key(0), x)
    params = normal(9, params)
    y, _, residuals = jax.jit(layer.fwd)(params, state, x, None)
    dy = np.asarray(normal(7, y))
    dy = dy - dy.mean(1, keepdims=True)
    squares, kept = jax.jit(
        lambda params, residuals, dy: [layer.bwd(params, residuals, dy, how)[0] for how in (fn.squared_norm, fn.keep)]
    )(params, residuals, dy)

    def check(square, factor, param):
        if isinstance(factor, fn.Outer):
            assert_right(factor, param)
        assert np.all(np.asarray(square) >= 0)
        with jax.enable_x64(True):
            wide = cast((factor, param), "float64")
            sizes = fn.per_example(*wide), fn.per_example(*jax.tree.map(jnp.abs, wide))
            wanted, uncancelled = (np.square(each).reshape(len(square), -1).sum(1) for each in sizes)
        # a plain sum, as of a bias, has the rounding of its terms in float32
        rounding = 0 if isinstance(innermost(factor), fn.Outer) else 1e-12 * uncancelled.max()
        np.testing.assert_allclose(square, wanted, rtol=1e-3, atol=rounding)

    jax.tree.map(check, squares, kept, params)


def test_the_head_of_a_language_model_has_no_norm_that_is_off():
    """Features that are the same everywhere, and weights that cancel: each block of the vocabulary by itself."""
    loss = fn.linear_cross_entropy(300, chunk=400)
    features = jnp.repeat(normal(8, jax.ShapeDtypeStruct((2, 1, 64), jnp.float32)), 4, 1)
    labels = jnp.ones((2, 4), jnp.int32)
    params, _ = loss.init(jax.random.key(0), (features, labels))
    _, _, residuals = loss.fwd(params, (), (features, labels), None)
    dy = jnp.array([[1.0, -1.0, 2.0, -2.0], [0.5, 0.25, -0.25, -0.5 + 2**-20]])
    squares = loss.bwd(params, residuals, dy, fn.squared_norm)[0]["kernel"]
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda a: a.astype(float), (params, features, dy))
        _, _, residuals = loss.fwd(wide[0], (), (wide[1], labels), None)
        wanted = np.square(loss.bwd(wide[0], residuals, wide[2], fn.per_example)[0]["kernel"]).sum((1, 2))
    assert squares[0] >= 0
    np.testing.assert_allclose(squares, wanted, rtol=1e-3, atol=1e-12)


def test_the_loop_of_one_example_at_a_time_goes_under_jit_vmap_and_scan():
    x, dy = (
        jnp.stack(pair) for pair in zip(*(cancelling(i, (3, 4, 24, 20), left=10.0**-i) for i in range(9)), strict=True)
    )
    param = jnp.zeros((24, 20))
    one = lambda x, dy: fn.squared_norm(fn.Outer(x, dy), param)
    wanted = np.square(np.stack([gradients(fn.Outer(*pair), 24) for pair in zip(x, dy, strict=True)])).sum((2, 3))
    np.testing.assert_allclose(jax.jit(jax.vmap(one))(x, dy), wanted, rtol=1e-3)
    np.testing.assert_allclose(jax.lax.map(lambda pair: one(*pair), (x, dy)), wanted, rtol=1e-3)
    layers = fn.Stacked(fn.Outer(x, dy))
    np.testing.assert_allclose(fn.squared_norm(layers, jnp.zeros((9, 24, 20))), wanted.sum(0), rtol=1e-3)


def test_numbers_whose_squares_overflow_have_their_norm():
    x, dy = cancelling(1, (2, 3, 8, 8), left=1.0)
    assert_right(fn.Outer(x * 2.0**66, dy * 2.0**-66), jnp.zeros((8, 8)))


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("sizes", [(1e-22, 1e18), (1e-25, 1e10), (1e-25, 1e25), (3e19, 1e-19), (1e-19, 1e3), (1, 1e-18),
                                   (1e38, 1e-37), (1, 1e-15)], ids=str)  # fmt: skip
def test_products_that_overflow_or_vanish_take_nothing_from_a_norm(sizes, steps):
    """Those of x or dy with themselves, where those of x with dy do neither."""
    x, dy = (size * normal(i, jax.ShapeDtypeStruct((2, steps, 16), jnp.float32)) for i, size in enumerate(sizes))
    assert_right(fn.Outer(x.at[0].divide(8), dy), jnp.zeros((16, 16)))


def test_positions_of_different_sizes_have_their_norm():
    x, dy = (normal(i, jax.ShapeDtypeStruct((2, 3, 8), jnp.float32)) for i in (1, 2))
    by = jnp.float32([1e20, 1e-20, 1e-30])[None, :, None]
    assert_right(fn.Outer(x * by, dy / by), jnp.zeros((8, 8)))
    assert_right(fn.Outer(x * by, dy * jnp.float32([0, 1e20, 1e30])[None, :, None]), jnp.zeros((8, 8)))


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_rows_of_every_normal_size_count_where_their_products_do(steps):
    """60 draws of rows near the smallest, the largest and middling numbers, whose products are of one size."""
    rng = np.random.default_rng(steps)
    sizes = rng.choice([-37, -20, 0, 20, 37], (60, steps, 1)) + rng.uniform(0, 1, (60, steps, 1))
    others = np.clip(rng.uniform(-8, 8, (60, 1, 1)) + rng.uniform(-1, 1, sizes.shape) - sizes, -37, 38)
    entries = lambda *shape: rng.uniform(0.5, 1, shape) * rng.choice([-1, 1], shape)
    x, dy = (entries(60, steps, n) * 10**size for n, size in ((6, sizes), (5, others)))
    assert_right(fn.Outer(jnp.float32(x), jnp.float32(dy)), jnp.zeros((6, 5)))


@pytest.mark.parametrize("steps", [1, 3])
def test_a_norm_beyond_the_largest_number_is_infinite_and_one_of_zeros_is_zero(steps):
    x, dy = (normal(i, jax.ShapeDtypeStruct((2, steps, 8), jnp.float32)) for i in (1, 2))
    for size in (1e19, 1e30):
        np.testing.assert_array_equal(fn.squared_norm(fn.Outer(size * x, size * dy), jnp.zeros((8, 8))), [np.inf] * 2)
    for zeros in (fn.Outer(0 * x, dy), fn.Outer(x, 0 * dy), fn.Outer(1e37 * x, 0 * dy)):
        np.testing.assert_array_equal(fn.squared_norm(zeros, jnp.zeros((8, 8))), [0, 0])


def test_no_gradient_is_formed_of_zeros(monkeypatch):
    monkeypatch.setattr(gram, "_formed", lambda uses, size: jnp.array(7.0))
    x, dy = (normal(i, jax.ShapeDtypeStruct((2, 3, 8), jnp.float32)) for i in (1, 2))
    zeros = fn.Outer(x.at[0, :2].set(0), dy.at[0, 2].set(0))
    assert 7 not in np.asarray(fn.squared_norm(zeros, jnp.zeros((8, 8))))


def test_numbers_that_are_not_finite_have_no_finite_norm():
    x, dy = cancelling(1, (2, 3, 8, 8), left=1.0)
    for bad in (jnp.nan, jnp.inf):
        squares = fn.squared_norm(fn.Outer(x.at[0, 0, 0].set(bad), dy), jnp.zeros((8, 8)))
        assert np.isfinite(np.asarray(squares)).tolist() == [False, True]


@pytest.mark.parametrize(("steps", "size"), [(1, 8), (5, 8), (22, 32), (180, 256)])
@pytest.mark.parametrize("mean", [0.0, 1.0])
def test_ordinary_numbers_are_left_to_the_gram_matrices(monkeypatch, steps, size, mean):
    monkeypatch.setattr(gram, "_formed", lambda uses, size: jnp.array(jnp.nan))
    x, dy = (normal(i, jax.ShapeDtypeStruct((2, steps, size), jnp.float32)) for i in (1, 2))
    factor = fn.Outer(jnp.maximum(x + mean, 0), dy)
    wanted = np.square(gradients(factor, size)).sum((1, 2))
    np.testing.assert_allclose(fn.squared_norm(factor, jnp.zeros((size, size))), wanted, rtol=1e-5)


@pytest.mark.parametrize("left", [1.0, 1e-4])
def test_derivatives_are_those_of_the_sum_of_squares(left):
    x, dy = cancelling(3, (2, 3, 8, 8), left=left)
    param = jnp.zeros((8, 8))
    gram_form = lambda x, dy: jnp.sum(fn.squared_norm(fn.Outer(x, dy), param))
    plain = lambda x, dy: jnp.sum(jnp.square(jnp.einsum("bti,btj->bij", x, dy)))
    for got, wanted in zip(jax.grad(gram_form, (0, 1))(x, dy), jax.grad(plain, (0, 1))(x, dy), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)
    tangents = (jnp.ones_like(x), dy)
    got, wanted = (jax.jvp(f, (x, dy), tangents)[1] for f in (gram_form, plain))
    np.testing.assert_allclose(got, wanted, rtol=1e-3, atol=1e-4)


def test_no_examples_have_no_norms():
    empty = jnp.zeros((0, 2, 8))
    assert fn.squared_norm(fn.Outer(empty, empty), jnp.zeros((8, 8))).shape == (0,)
