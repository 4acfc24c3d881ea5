"""Kinks, jumps and infinite slopes are found, and curvature raises no alarm."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import funcnet as fn
from funcnet._internal.errors import InputError
from funcnet.calculus.derivatives import chain, derivative
from funcnet.calculus.nonsmooth import LARGEST, _limit, _one_sided_slopes, _wide_values, refuse_kinks

RNG = np.random.default_rng(0)
near = partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-10)


def step(x):
    return jnp.where(x >= 0, jnp.ones_like(x), 0)


def safe_sqrt(x):
    """Its automatic derivative at 0 is 0, and the slope from the right is infinite."""
    return jnp.where(x > 0, jnp.sqrt(jnp.where(x > 0, x, 1)), 0)


BROKEN = [
    (jnp.abs, 0.0, "at 0: slope -1 from the left, 1 from the right"),
    (jax.nn.relu, 0.0, "slope 0 from the left, 1 from the right"),
    (lambda x: jnp.maximum(x, 1 - x), 0.5, "at 0.5: slope -1 from the left, 1 from the right"),
    (lambda x: jnp.abs(x - 3) + 1000, 3.0, "at 3: slope -1 from the left, 1 from the right"),
    (lambda x: jnp.abs(x - 1e-4), 1e-4, "slope -1 from the left, 1 from the right"),
    (lambda x: 1e-6 * jnp.abs(x), 0.0, "slope -1e-06 from the left, 1e-06 from the right"),
    (lambda x: jnp.exp(x) + 0.01 * jnp.abs(x), 0.0, "slope 0.99 from the left, 1.01 from the right"),
    (partial(jax.nn.leaky_relu, negative_slope=0.99), 0.0, "slope 0.99 from the left, 1 from the right"),
    (jnp.floor, 2.0, "slope inf from the left, 0 from the right"),
    (step, 0.0, "slope inf from the left, 0 from the right"),
    (jnp.sign, 0.0, "slope inf from the left, inf from the right"),
    (jnp.sqrt, 0.0, "slope undefined from the left, inf from the right"),
    (safe_sqrt, 0.0, "slope 0 from the left, inf from the right"),
    (jnp.cbrt, 0.0, "slope inf from the left, inf from the right"),
    (jnp.log, 0.0, "at 0: slope"),
    (jnp.arcsin, 1.0, "at 1: slope inf from the left, undefined from the right"),
    (lambda x: 1 / x, 0.0, "at 0: slope"),
    (lambda x: x**1.5, 0.0, "slope undefined from the left"),
    (jnp.exp, float("inf"), "at inf: slope"),
    (jnp.exp, float("nan"), "at nan: slope"),
    (lambda x: jnp.exp(-1 / x**2), 0.0, "slope 0 from the left, 0 from the right, but nan by automatic"),
]


@pytest.mark.parametrize(("f", "x", "message"), BROKEN)
@pytest.mark.parametrize("wide", [False, True], ids=["float32", "float64"])
def test_points_without_a_derivative_are_refused_with_both_slopes(f, x, message, wide):
    with jax.enable_x64(wide):
        for rule in (derivative(f), chain(f), chain(lambda x: 1.0 * x, f, jnp.sin)):
            with pytest.raises(InputError, match=message) as error:
                rule(x)
            assert "one finite slope" in error.value.expected
            assert error.value.remedy.startswith("move the point, or put a smooth function in place")


@pytest.mark.parametrize(
    ("f", "x", "message"),
    [
        (
            jnp.abs,
            [1.0, 0.0],
            r"\(abs\) at \[1, 0\], coordinate 1, entry 1 of its value: slope -1 from the left, 1 from",
        ),
        (jnp.linalg.norm, [0.0, 0.0], r"\(norm\) at \[0, 0\], coordinate 0: slope -1 from the left, 1 from the right"),
        (jnp.sqrt, [1.0, 0.0], r"at \[1, 0\], coordinate 1, entry 1 of its value: slope undefined .* inf"),
        (jnp.max, [2.0, 1.0, 2.0], r"coordinate 0: slope 0 from the left, 1 from the right"),
        (lambda x: jnp.abs(x[0] - x[1]), [0.3, 0.3], "coordinate 0: slope -1 from the left, 1 from the right"),
        (jax.nn.relu, [0.0, 1e-9], "coordinate 0, entry 0 of its value: slope 0 from the left, 1 from the right"),
        (jax.nn.relu, [1e-3, 1e4, 0.0], "coordinate 2, entry 2"),
        (step, [0.0, 3.0], "coordinate 0, entry 0"),
        (jnp.abs, [0.0, *range(1, 10)], r"at \[0, 1, 2, 3, 4, 5, 6, 7, \.\.\.\], coordinate 0"),
    ],
)
def test_a_kink_in_one_coordinate_is_found(f, x, message):
    with pytest.raises(InputError, match=message):
        chain(f)(np.float32(x))


def test_the_error_names_the_link_and_the_value_that_it_met():
    with pytest.raises(InputError, match=r"function 2 of 3 \(abs\) at 0: slope -1 from the left, 1 from the right"):
        chain(lambda x: x - 2, jnp.abs, jnp.sin)(2.0)
    with pytest.raises(InputError, match=r"function 1 of 2 \(f1\)"):
        chain(lambda x: jnp.maximum(x, 0), jnp.sin)(0.0)


def test_a_smooth_function_whose_automatic_derivative_is_not_finite_is_refused():
    """1e20 has a cube in float64 and none in float32; in a branch not taken reverse mode makes NaN of 0 * inf."""
    with pytest.raises(InputError, match=r"slope 3e\+40 from the left, 3e\+40 from the right, but inf by automatic"):
        chain(lambda x: x**3)(1e20)
    masked = lambda x: jnp.where(x[0] > 1, x / (x[0] + 1), x)
    with pytest.raises(InputError, match="slope 1 from the left, 1 from the right, but nan by automatic"):
        chain(masked)(np.float32([-1.0, 0.0]))


def sharp(x):
    return jnp.sin(1e4 * x)


SMOOTH = {
    "exp": (jnp.exp, [30.0, -30.0, 88.0, 0.0, 1e-20]),
    "reciprocal": (lambda x: 1 / x, [1e-6, -1e-6, 1e-12, 1e4]),
    "fast sine": (lambda x: jnp.sin(100 * x), [0.0, 1.0, 30.0, -300.0, np.pi / 200]),
    "faster sine": (sharp, [0.0, 0.1, 1.0, np.pi / 2e4]),
    "cube": (lambda x: x**3, [0.0, 1e-3, 1e6]),
    "tanh": (jnp.tanh, [0.0, 1e-8, 5.0, 20.0, 1e3]),
    "steep tanh": (lambda x: jnp.tanh(1e5 * x), [0.0, 1e-5, 1.0]),
    "x|x|": (lambda x: x * jnp.abs(x), [0.0, -1.0, 1e-12]),
    "|x|^3/2": (lambda x: jnp.abs(x) ** 1.5, [0.0, 1e-6]),
    "root": (jnp.sqrt, [1e-6, 1e-12, 1e-30, 1e6]),
    "log": (jnp.log, [1e-6, 1e-30, 1.0]),
    "root near its edge": (lambda x: jnp.sqrt(x + 1e-6), [0.0, 1e-9]),
    "smoothed |x|": (lambda x: jnp.sqrt(x * x + 1e-12), [0.0, 1e-6, -1e-5]),
    "relu": (jax.nn.relu, [1e-30, -1e-30, 1e-6, -3.0, 1e6]),
    "relu of a difference": (
        lambda x: jax.nn.relu(x - 1),
        [1.000001, 0.999999, 1 + 2**-23, 1 + 2**-22, 1 + 2**-21, 1 + 2**-19, 1 - 2**-23, 0.0],
    ),
    "gelu": (jax.nn.gelu, [0.0, -8.0, 1e-4, 40.0]),
    "softplus": (jax.nn.softplus, [0.0, -30.0, 30.0, -80.0]),
    "careless softplus": (lambda x: jnp.log(1 + jnp.exp(x)), [-30.0, -36.0, -20.0, 0.0, 30.0]),
    "cancelling": (lambda x: (x + 1e6) - 1e6, [0.1, 1.0, 3.3]),
    "one": (lambda x: jnp.sin(x) ** 2 + jnp.cos(x) ** 2, [0.0, 0.7, 3.0, 100.0]),
    "nothing": (lambda x: jnp.sin(x) ** 2 + jnp.cos(x) ** 2 - 1, [0.1, 0.7, 3.0, 10.0]),
    "constant": (lambda x: x * 0 + 3.0, [0.0, 1.0]),
    "small sine on a large number": (lambda x: 1e6 + jnp.sin(x), [0.0, 1.0]),
    "wall": (lambda x: jnp.exp(-1 / x**2), [0.05, 0.3, 1.0]),
}


@pytest.mark.parametrize("name", SMOOTH)
@pytest.mark.parametrize("wide", [False, True], ids=["float32", "float64"])
def test_smooth_functions_raise_no_alarm(name, wide):
    f, points = SMOOTH[name]
    with jax.enable_x64(wide):
        for x in points:
            slope, wanted = derivative(f)(x), jax.grad(f)(jnp.asarray(x))
            np.testing.assert_allclose(slope, wanted, rtol=1e-6, atol=1e-9)
            np.testing.assert_allclose(chain(f)(x).reverse, wanted.reshape(1, 1), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("f", "x"),
    [
        (jax.nn.logsumexp, [0.0, 0.0, 0.0]),
        (jax.nn.logsumexp, [100.0, 0.0, -100.0]),
        (jax.nn.softmax, [0.0, 1.0, -30.0, 60.0]),
        (jax.nn.softmax, [1e-8, 0.0, 1e8]),
        (jnp.linalg.norm, [0.0, 1e-9]),
        (jnp.linalg.norm, [1e-6, 1.0, 0.0]),
        (jnp.max, [1.0, 2.0, 1.9999]),
        (lambda x: x - jnp.mean(x), [3.0, 3.0, 3.0]),
        (lambda x: jnp.mean(x - jnp.mean(x)), [0.1, 0.7, 5.3]),
        (lambda x: jnp.sum(jax.nn.softmax(x)), [0.3, 0.2, 7.0]),
        (jnp.prod, [0.0, 3.0, 1e6]),
        (jnp.sort, [3.0, 1.0, 2.0]),
    ],
)
def test_smooth_functions_of_vectors_raise_no_alarm(f, x):
    x = np.float32(x)
    rule = chain(f)(x)
    np.testing.assert_allclose(rule.reverse, jax.jacobian(f)(x).reshape(rule.reverse.shape), rtol=1e-6)


SMOOTH_EVERYWHERE = [
    jnp.sin, jnp.tanh, jnp.exp, jnp.arctan, jax.nn.gelu, jax.nn.silu, jax.nn.softplus, jax.nn.sigmoid,
    jax.scipy.special.erf, jnp.sinc, jnp.arcsinh, lambda x: 1 / (1 + 25 * x**2),
    lambda x: x * jnp.log1p(x**2), jax.nn.log_softmax,
]  # fmt: skip


@pytest.mark.parametrize("f", SMOOTH_EVERYWHERE)
@pytest.mark.parametrize("scale", [0.01, 1, 10])
def test_smooth_functions_at_many_points_raise_no_alarm(f, scale):
    chain(f)(np.float32(scale * np.append(RNG.normal(size=60), 0)))


def test_kinks_at_many_points_are_all_found():
    kinks = np.float32(RNG.normal(size=20) * 10.0 ** RNG.integers(-3, 4, size=20))
    for at in kinks:
        with pytest.raises(InputError, match="slope -1 from the left, 1 from the right"):
            derivative(lambda x, at=at: jnp.abs(x - jnp.asarray(at, x.dtype)))(at)


def test_a_kink_that_only_rounding_hides_is_found():
    """0.6 - x and x are the same number in float32 at 0.3, where the slope would be the silent average, 0."""
    f = lambda x: jnp.maximum(x, 0.6 - x)
    assert jax.grad(f)(0.3) == 0
    with pytest.raises(InputError, match="slope -1 from the left, 1 from the right"):
        derivative(f)(0.3)


def test_traced_points_are_not_checked():
    assert jax.jit(derivative(jax.nn.relu))(0.0) == 0
    assert jax.jit(lambda: derivative(jax.nn.relu)(0.0))() == 0
    assert jax.vmap(derivative(jax.nn.relu))(jnp.zeros(2)).tolist() == [0, 0]
    assert jax.jit(chain(jnp.sin, jax.nn.relu))(0.0).reverse == 0
    assert jax.vmap(chain(jax.nn.relu))(jnp.zeros(2)).reverse.shape == (2, 1, 1)
    assert jax.grad(lambda a: derivative(lambda x: a * jax.nn.relu(x))(0.0))(1.0) == 0
    assert jax.grad(lambda a: chain(lambda x: a * jax.nn.relu(x))(0.0).reverse[0, 0])(1.0) == 0


def test_a_second_derivative_is_checked_too():
    with pytest.raises(InputError, match="slope -2 from the left, 2 from the right"):
        derivative(derivative(lambda x: x * jnp.abs(x)))(0.0)


def test_arrays_in_float32_and_layers_may_be_links(x64):
    """A layer takes only the dtype of its parameters, so it is checked in that one."""
    layer, x = fn.dense(3), jnp.ones(2, jnp.float32)
    params, state = layer.init(jax.random.key(0), x[None])
    dense = lambda x: layer.apply(params, state, x[None])[0]
    weights = jnp.ones((4, 3), jnp.float32)
    near(chain(dense, jnp.tanh, lambda x: weights @ x)(x).jacobians[0], params["kernel"].T)
    for x in np.float32(RNG.normal(size=(10, 2))):
        chain(dense, jnp.tanh, lambda x: jnp.sin(weights @ x))(x)
    one = jnp.float32(1)  # widened, since float32 could not tell this kink from its rounding
    with pytest.raises(InputError, match="slope -1 from the left, 1 from the right"):
        derivative(lambda x: one * jnp.abs(x - 3) + 1000)(jnp.float32(3))
    with pytest.raises(InputError, match=r"\(f2\).* slope 0 from the left, 1 from the right"):
        chain(dense, lambda x: fn.relu().apply({}, (), x))(jnp.zeros(2, jnp.float32))
    with pytest.raises(
        InputError, match=r"\(f1\) at \[0, 0\], coordinate 0, entry 0 of its value: slope .* from the left"
    ):
        chain(lambda x: jax.nn.relu(dense(x)))(jnp.zeros(2, jnp.float32))


def test_half_precision(standard_promotion):
    for dtype in (jnp.float16, jnp.bfloat16):
        result = chain(jnp.sin, jnp.exp)(jnp.asarray([0.5, 0.0], dtype))
        assert result.reverse.dtype == dtype
        with pytest.raises(InputError, match="slope -1 from the left, 1 from the right"):
            derivative(jnp.abs)(jnp.asarray(0, dtype))


@pytest.mark.parametrize("seed", [0, 6, 26])
def test_a_wide_smooth_function_has_no_kink_by_chance(seed):
    with jax.enable_x64(True):
        weights = np.random.default_rng(seed).normal(size=(100, 200)) / 200**0.5
        assert chain(lambda x: jnp.tanh(weights @ x))(jnp.ones(200)).reverse.shape == (100, 200)


def refused(f, x, slope):
    """What is said of a point, the derivative given; None if nothing is."""
    try:
        refuse_kinks(f, x, f(x), jnp.asarray(slope), "f")
    except InputError as error:
        return error.received


def test_the_slopes_are_one_sided_limits_a_row_an_entry_and_a_column_a_coordinate(x64):
    """Of [max(2 a, 3 a), |a| b] at (0, 5): 2 and 3 along a, then -5 and 5, and 0 along b."""
    f = lambda x: jnp.stack([jnp.maximum(2 * x[0], 3 * x[0]), jnp.abs(x[0]) * x[1]])
    left, right, bad = _one_sided_slopes(f, jnp.array([0.0, 5.0]), np.zeros((2, 2)))
    np.testing.assert_allclose(left, [[2, 0], [-5, 0]], rtol=1e-9)
    np.testing.assert_allclose(right, [[3, 0], [5, 0]], rtol=1e-9)
    np.testing.assert_array_equal(bad, [[True, False], [True, False]])


def test_a_limit_is_infinite_where_slopes_double_beyond_rounding_and_the_derivative():
    column = lambda *values: np.array(values, float)[:, None]
    no, yes, one = np.array([False]), np.array([True]), np.ones(1)
    assert _limit(column(1, 3, 9, 27), no, one / 2, one) == np.inf
    assert _limit(-column(1, 3, 9, 27), no, one / 2, one) == -np.inf
    assert _limit(column(1, 3, 9, 27), no, 2 * one, one) == 27  # rounding could have made the first of them
    assert _limit(column(1, 3, 9, 27), no, one / 2, 40 * one) == 27  # the derivative is as large
    assert _limit(column(1, 3, 6, 27), no, one / 2, one) == 27  # not more than doubled
    assert _limit(column(1, 1.5, 2, 2.5), yes, one / 2, one) == 1  # a kink's slope is the first


def test_only_concrete_points_of_up_to_a_thousand_entries_are_checked():
    at = lambda n: np.zeros(n, np.float32)
    f = lambda x: jnp.abs(x[0])
    assert "slope -1 from the left, 1 from the right" in refused(f, at(LARGEST), at(LARGEST))
    assert refused(f, at(LARGEST + 1), at(LARGEST + 1)) is None
    jax.jit(lambda x: refuse_kinks(jnp.abs, x, jnp.abs(x), x, "f"))(jnp.float32(0))


def test_the_entry_and_the_coordinate_of_a_matrix_are_counted_flat():
    x = np.float32([[1, 2], [0, 0]])
    said = refused(jnp.abs, x, np.zeros((2, 2, 2, 2), np.float32))
    assert said == "f at [1, 2, 0, 0], coordinate 2, entry 2 of its value: slope -1 from the left, 1 from the right"


def test_a_derivative_that_is_not_finite_is_refused_where_both_slopes_are():
    assert refused(jnp.sin, jnp.float32(0.5), 0.8) is None
    assert refused(jnp.sin, jnp.float32(0.5), np.nan).endswith("but nan by automatic differentiation")


def test_where_float64_is_not_taken_the_point_s_own_dtype_is_used():
    def picky(x):
        if x.dtype != jnp.bfloat16:
            raise TypeError(x.dtype)
        return 2 * x

    points = np.array([[1.0], [2.5]])
    assert _wide_values(jnp.sin, points, jnp.float32).dtype == np.float64
    narrow = _wide_values(picky, points, jnp.bfloat16)
    assert narrow.dtype == jnp.bfloat16
    np.testing.assert_array_equal(narrow, [[2.0], [5.0]])
