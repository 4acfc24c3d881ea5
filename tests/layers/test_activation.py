"""Activations: each rule, its values against NumPy and SciPy, kinks, extreme inputs and what is saved.

In half precision every number there is: 65,536 values and slopes.
"""

import inspect
import re
from functools import cache
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
import scipy.special as sp

import funcnet as fn
from funcnet.layers import activation
from tests.halves import HALVES, assert_within, every, exact

SELU = 1.0507009873554805, 1.6732632423543772
hard_sigmoid = lambda x: np.clip((x + 3) / 6, 0, 1)
elu = lambda x, alpha: np.where(x > 0, x, alpha * np.expm1(np.minimum(x, 0)))
tanh_gelu = lambda x: x * sp.expit(2 * cubic(x))
cubic = lambda x: np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)
squareplus = lambda x, b: np.where(x < 0, b / 2 / (np.hypot(x, b**0.5) + np.abs(x)), (x + np.hypot(x, b**0.5)) / 2)

# name: (constructor, arguments, the same function in NumPy, its derivative at kinks)
TABLE = {
    "identity": (fn.identity, {}, lambda x: x, {}),
    "relu": (fn.relu, {}, lambda x: np.maximum(x, 0), {0.0: 0}),
    "relu6": (fn.relu6, {}, lambda x: np.clip(x, 0, 6), {0.0: 0, 6.0: 0}),
    "leaky_relu": (fn.leaky_relu, {}, lambda x: np.where(x > 0, x, 0.01 * x), {0.0: 0.01}),
    "leaky_relu 0.3": (fn.leaky_relu, {"slope": 0.3}, lambda x: np.where(x > 0, x, 0.3 * x), {0.0: 0.3}),
    "leaky_relu 0": (fn.leaky_relu, {"slope": 0.0}, lambda x: np.maximum(x, 0), {0.0: 0}),
    "elu": (fn.elu, {}, lambda x: elu(x, 1), {0.0: 1}),
    "elu 0.5": (fn.elu, {"alpha": 0.5}, lambda x: elu(x, 0.5), {0.0: 0.5}),
    "celu": (fn.celu, {}, lambda x: elu(x, 1), {0.0: 1}),
    "celu 2": (fn.celu, {"alpha": 2.0}, lambda x: np.where(x > 0, x, 2 * np.expm1(np.minimum(x, 0) / 2)), {0.0: 1}),
    "selu": (fn.selu, {}, lambda x: SELU[0] * elu(x, SELU[1]), {0.0: SELU[0] * SELU[1]}),
    "gelu": (fn.gelu, {}, lambda x: x * sp.ndtr(x), {0.0: 0.5}),
    "gelu, tanh": (fn.gelu, {"approximate": True}, tanh_gelu, {0.0: 0.5}),
    "silu": (fn.silu, {}, lambda x: x * sp.expit(x), {0.0: 0.5}),
    "mish": (fn.mish, {}, lambda x: x * np.tanh(np.logaddexp(0, x)), {0.0: 0.6}),
    "softplus": (fn.softplus, {}, lambda x: np.logaddexp(0, x), {0.0: 0.5}),
    "sigmoid": (fn.sigmoid, {}, sp.expit, {0.0: 0.25}),
    "log_sigmoid": (fn.log_sigmoid, {}, sp.log_expit, {0.0: 0.5}),
    "tanh": (fn.tanh, {}, np.tanh, {0.0: 1}),
    "hard_tanh": (fn.hard_tanh, {}, lambda x: np.clip(x, -1, 1), {-1.0: 0, 1.0: 0, 0.0: 1}),
    "hard_sigmoid": (fn.hard_sigmoid, {}, hard_sigmoid, {-3.0: 0, 3.0: 0, 0.0: 1 / 6}),
    "hard_silu": (fn.hard_silu, {}, lambda x: x * hard_sigmoid(x), {-3.0: 0, 3.0: 1, 0.0: 0.5}),
    "squareplus": (fn.squareplus, {}, lambda x: squareplus(x, 4), {0.0: 0.5}),
    "squareplus 0.5": (fn.squareplus, {"b": 0.5}, lambda x: squareplus(x, 0.5), {0.0: 0.5}),
    "softsign": (fn.softsign, {}, lambda x: x / (1 + np.abs(x)), {0.0: 1}),
}
logistic = lambda x: sp.expit(x) * sp.expit(-x)
elu_slope = lambda x, alpha: np.where(x > 0, 1, alpha * np.exp(np.minimum(x, 0)))
near = lambda f: lambda x: f(np.clip(x, -1e3, 1e3))  # beyond, the slope is that at 1,000, and some terms overflow

# The derivatives of the same functions, with all digits wherever they are small.
SLOPES = {
    "identity": np.ones_like,
    "relu": lambda x: x > 0,
    "relu6": lambda x: (x > 0) & (x < 6),
    "leaky_relu": lambda x: np.where(x > 0, 1, 0.01),
    "leaky_relu 0.3": lambda x: np.where(x > 0, 1, 0.3),
    "leaky_relu 0": lambda x: x > 0,
    "elu": lambda x: elu_slope(x, 1),
    "elu 0.5": lambda x: elu_slope(x, 0.5),
    "celu": lambda x: elu_slope(x, 1),
    "celu 2": lambda x: elu_slope(x / 2, 1),
    "selu": lambda x: SELU[0] * elu_slope(x, SELU[1]),
    "gelu": near(lambda x: sp.ndtr(x) + x * np.exp(-x * x / 2) / np.sqrt(2 * np.pi)),
    "gelu, tanh": near(lambda x: sp.expit(2 * cubic(x)) + 2 * x * logistic(2 * cubic(x)) * cubic_slope(x)),
    "silu": near(lambda x: sp.expit(x) + x * logistic(x)),
    "mish": near(
        lambda x: np.tanh(np.logaddexp(0, x)) + x * sp.expit(x) / np.cosh(np.logaddexp(0, x).clip(0, 99)) ** 2
    ),
    "softplus": sp.expit,
    "sigmoid": logistic,
    "log_sigmoid": lambda x: sp.expit(-x),
    "tanh": lambda x: 4 * logistic(2 * x),
    "hard_tanh": lambda x: np.abs(x) < 1,
    "hard_sigmoid": lambda x: (np.abs(x) < 3) / 6,
    "hard_silu": lambda x: np.where(x <= -3, 0, np.where(x >= 3, 1, (2 * x + 3) / 6)),
    "squareplus": lambda x: squareplus(x, 4) / np.hypot(x, 2),
    "squareplus 0.5": lambda x: squareplus(x, 0.5) / np.hypot(x, 0.5**0.5),
    "softsign": lambda x: 1 / (1 + np.abs(x)) ** 2,
}
cubic_slope = lambda x: np.sqrt(2 / np.pi) * (1 + 3 * 0.044715 * x * x)
LAYERS = {name: row[0](**row[1]) for name, row in TABLE.items()}
NAMES = pytest.mark.parametrize("name", TABLE)
DTYPES = pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
GRID = np.linspace(-8, 8, 203) + 0.013  # near no kink
KINKS = np.array([0.0, -0.0, 1.0, -1.0, 3.0, -3.0, 6.0])
FAR = np.array([40, -40, 300, -300, 0.9, -0.9])  # the last two in units of the largest number


def derivative(f, x, h=1e-5):
    """Central differences of a reference: no derivative of ours or JAX's is in it."""
    return (f(x + h) - f(x - h)) / (2 * h)


@cache
def run(name):
    """By dtype: input, output, what is saved, dx for ones by bwd and by `jax.vjp` of the forward, at every point."""
    layer = LAYERS[name]

    def both(x):
        y, _, saved = layer.fwd({}, (), x, None)
        plain = jax.vjp(lambda x: layer.apply({}, (), x), x)[1](jnp.ones_like(y))[0]
        return {"x": x, "y": y, "saved": saved, "dx": layer.bwd({}, saved, jnp.ones_like(y))[1], "plain": plain}

    def points(dtype):
        far = [n * float(jnp.finfo(dtype).max) if abs(n) < 1 else n for n in FAR.tolist()]
        return np.concatenate([GRID, KINKS, far, [np.nan]]).astype(dtype)

    xs = {dtype: points(jnp.dtype(dtype)) for dtype in ("float64", "float32", "float16", "bfloat16")}
    with jax.enable_x64(True):
        out = jax.jit(lambda xs: {dtype: both(x) for dtype, x in xs.items()})(xs)
    assert all({a.dtype for a in row.values()} == {jnp.dtype(dtype)} for dtype, row in out.items())
    return jax.tree.map(lambda a: np.asarray(a, np.float64), out)


def part(name, dtype, which):
    """The part of `run` on the grid, at the kinks or far away."""
    start = {"grid": 0, "kinks": len(GRID), "far": len(GRID) + len(KINKS)}[which]
    stop = start + len({"grid": GRID, "kinks": KINKS, "far": FAR}[which])
    return SimpleNamespace(**{key: value[start:stop] for key, value in run(name)[dtype].items()})


def test_the_table_has_every_activation():
    public = {f for name, f in vars(activation).items() if inspect.isfunction(f) and not name.startswith("_")}
    own = {f for f in public if f.__module__ == activation.__name__}
    assert own == {row[0] for row in TABLE.values()}


@NAMES
def test_a_layer_has_the_name_of_its_constructor(name):
    assert LAYERS[name].name == TABLE[name][0].__name__


@NAMES
def test_values_are_those_of_numpy_and_scipy_and_the_derivative_is_their_slope(name):
    f, got = TABLE[name][2], part(name, "float64", "grid")
    np.testing.assert_allclose(got.y, f(GRID), rtol=1e-11, atol=1e-14)
    np.testing.assert_allclose(got.dx, derivative(f, GRID), rtol=1e-7, atol=1e-9)


@NAMES
@DTYPES
def test_the_derivative_at_kinks_is_the_one_stated_and_the_plain_forwards(name, dtype):
    got, eps = part(name, dtype, "kinks"), float(jnp.finfo(dtype).eps)
    for kink, slope in TABLE[name][3].items():
        here = (got.x == kink) & (np.signbit(got.x) == np.signbit(kink))
        np.testing.assert_allclose(got.dx[here], [slope], rtol=4 * eps)
        np.testing.assert_allclose(got.plain[here], [slope], rtol=4 * eps)


@NAMES
@DTYPES
def test_half_and_single_precision_are_near_float64(name, dtype):
    got, f, eps = part(name, dtype, "grid"), TABLE[name][2], float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(got.y, f(got.x), rtol=8 * eps, atol=8 * eps)
    smooth = np.abs(got.x[:, None] - KINKS).min(1) > 1e-3
    near = max(8 * eps, 1e-5)
    np.testing.assert_allclose(got.dx[smooth], derivative(f, got.x[smooth]), rtol=near, atol=near)


@NAMES
@DTYPES
def test_far_away_values_and_slopes_are_at_their_limits(name, dtype):
    got, f, eps = part(name, dtype, "far"), TABLE[name][2], float(jnp.finfo(dtype).eps)
    with np.errstate(over="ignore"):  # the float64 references square and cube what only float32 holds
        np.testing.assert_allclose(got.y, f(got.x), rtol=8 * eps, atol=4 * eps)
        slope = derivative(f, got.x, h=1e-6 * np.abs(got.x))
    np.testing.assert_allclose(got.dx, slope, rtol=8 * eps, atol=max(8 * eps, 1e-4))


@NAMES
def test_the_slopes_of_the_references_are_their_slopes(name):
    np.testing.assert_allclose(SLOPES[name](GRID), derivative(TABLE[name][2], GRID), rtol=1e-7, atol=1e-9)


@NAMES
@pytest.mark.parametrize("dtype", HALVES)
def test_every_number_of_half_precision_has_its_value_and_its_slope(name, dtype):
    """Within a unit in the last place, the slope within two; infinities have the limits, NaN is NaN."""

    @jax.jit
    def run(x):
        y, _, saved = LAYERS[name].fwd({}, (), x, None)
        return y, LAYERS[name].bwd({}, saved, jnp.ones_like(y))[1]

    x = every(dtype)
    y, dx = map(np.asarray, run(x))
    assert y.dtype == dx.dtype == x.dtype
    number = ~np.isnan(exact(x))
    assert np.isnan(exact(y)[~number]).all()
    x, y, dx = x[number], y[number], dx[number]
    at = np.clip(exact(x), -1e100, 1e100)  # where float64 still squares and cubes
    assert_within(0.51, y, TABLE[name][2](at), x)
    assert_within(2.5 if "squareplus" in name else 2, dx, SLOPES[name](at).astype(np.float64), x)


@pytest.mark.parametrize("approximate", [False, True])
def test_gelus_tail_in_half_precision_is_mpmaths(approximate):
    """Near -4, where the half of a rounded 1 + erf is 0: another reference than SciPy's."""
    x = np.linspace(-12, 0, 40).astype(jnp.bfloat16)
    layer = fn.gelu(approximate=approximate)
    y, _, saved = layer.fwd({}, (), x, None)
    dx = layer.bwd({}, saved, jnp.ones_like(y))[1]
    scale = mpmath.sqrt(2 / mpmath.pi)
    f = lambda x: (
        x * (1 + mpmath.tanh(scale * (x + mpmath.mpf("0.044715") * x**3))) / 2 if approximate else x * mpmath.ncdf(x)
    )
    with mpmath.workdps(120):
        wanted = [(float(f(mpmath.mpf(float(at)))), float(mpmath.diff(f, mpmath.mpf(float(at))))) for at in x]
    values, slopes = np.array(wanted).T
    assert_within(0.51, np.asarray(y), values, x)
    assert_within(2, np.asarray(dx), slopes, x)


@NAMES
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_infinities_have_the_limits(name, dtype, x64):
    x = jnp.array([jnp.inf, -jnp.inf], dtype)
    y, _, saved = LAYERS[name].fwd({}, (), x, None)
    dx = LAYERS[name].bwd({}, saved, jnp.ones_like(y))[1]
    limits = TABLE[name][2](np.array([1e100, -1e100]))
    limits = np.where(np.abs(limits) > 1e90, np.copysign(np.inf, limits), limits)
    np.testing.assert_allclose(y, limits, rtol=1e-6, atol=1e-90)
    np.testing.assert_allclose(dx, SLOPES[name](np.array([1e100, -1e100])), rtol=1e-6, atol=1e-90)


@NAMES
@DTYPES
def test_nan_stays_nan(name, dtype):
    assert np.isnan(run(name)[dtype]["y"][-1])


@NAMES
def test_what_is_saved_is_what_the_docstring_says(name):
    doc = " ".join(TABLE[name][0].__doc__.split())
    saves = re.findall("Saves ([xy])(; in half precision x)?[.,]", doc)
    assert len(saves) == 1, doc
    for dtype in ("float64", "float32", *HALVES):
        got, ((full, half),) = run(name)[dtype], saves
        np.testing.assert_array_equal(got["saved"], got["x" if half and dtype in HALVES else full])


@pytest.mark.parametrize(
    ("make", "f", "df"),
    [
        (fn.softplus, lambda x: np.logaddexp(0, x), sp.expit),
        (fn.log_sigmoid, sp.log_expit, lambda x: sp.expit(-x)),
        (fn.sigmoid, sp.expit, None),
        (fn.squareplus, lambda x: np.where(x < 0, 2 / (np.sqrt(x * x + 4) - x), (x + np.sqrt(x * x + 4)) / 2), None),
    ],
)
def test_small_values_keep_their_digits(make, f, df):
    """Relative accuracy in float32 where the value or the slope is tiny, as far as e^-80."""
    x = np.linspace(-80, 80, 41, dtype=np.float32)
    y, _, residuals = make().fwd({}, (), x, None)
    np.testing.assert_allclose(y, f(x.astype(np.float64)), rtol=2e-6, atol=1e-36)
    if df is not None:
        np.testing.assert_allclose(
            make().bwd({}, residuals, jnp.ones(41))[1], df(x.astype(np.float64)), rtol=2e-6, atol=1e-36
        )


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (fn.leaky_relu, {"slope": -0.1}),
        (fn.elu, {"alpha": 0.0}),
        (fn.elu, {"alpha": -1.0}),
        (fn.celu, {"alpha": 0.0}),
        (fn.squareplus, {"b": 0.0}),
        (fn.leaky_relu, {"slope": float("nan")}),
    ],
)
def test_options_that_the_rule_does_not_hold_for_are_refused(make, options):
    with pytest.raises(fn.InputError, match=next(iter(options))):
        make(**options)
