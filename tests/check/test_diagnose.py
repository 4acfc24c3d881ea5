"""Diagnoses, on arrays: each pattern is found by its name, and an error without one is met with silence."""

import numpy as np
import pytest

from funcnet.check.diagnosis.case import Context
from funcnet.check.diagnosis.diagnose import diagnose
from funcnet.check.judge import measure, tolerance

RNG = np.random.default_rng(0)
X, Y, DY = (RNG.normal(size=(4, 5)) for _ in range(3))
R = RNG.normal(size=(4, 5))
SQUARE = RNG.normal(size=(4, 4))


def said(got, wanted=R, arrays=None, references=None, **rest):
    """The diagnosis of a leaf called g."""
    allowed = tolerance(got.dtype)
    leaf = measure("g", got, wanted, allowed) if got.shape == wanted.shape else measure("g", got, got, allowed)
    return diagnose(leaf, got, wanted, Context({"g": wanted, **(references or {})}, arrays or {}, **rest))


def spread(axis):
    """A factor that differs along an axis."""
    return np.moveaxis(np.linspace(1, 3, R.shape[axis]).reshape(-1, 1), 0, axis)


FOUND = {
    "zero": (0 * R, "zero: no gradient"),
    "sign": (-R, "the sign is flipped"),
    "twice": (2 * R, "twice the gradient"),
    "half": (R / 2, "half the gradient"),
    "constant": (0.7 * R, "times 0.7"),
    "nearly right": (R * (1 + 1e-8), "times 1 + 1e-08"),
    "reversed": (R[::-1], "reversed along axis 0"),
    "rolled": (np.roll(R, 2, 1), "shifted by 2 along axis 1"),
    "shifted": (np.vstack([0 * R[:1], R[:-1]]), "shifted by 1 along axis 0, but for its end"),
    "permuted": (R[[1, 0, 2, 3]], "2 of its 4 slices along axis 0"),
    "shuffled": (RNG.permutation(R.ravel()).reshape(4, 5), "the right numbers in other places"),
    "one element": (
        np.where(np.arange(20).reshape(4, 5) == 7, 0.9 * R, R),
        "one element alone is wrong, [1, 2], 0.9 times",
    ),
    "a row": (np.where(np.arange(4)[:, None] == 3, 1.0, R), "only index 3 of axis 0 is wrong: it is not what"),
    "a lost row": (np.where(np.arange(4)[:, None] == 3, 0.0, R), "only index 3 of axis 0 is wrong: it is zero"),
    "masked": (np.where(X > 0, R, 0.0), "zero that should not be"),
    "signs": (np.abs(R), "right but for the sign"),
    "clipped": (np.clip(R, -0.4, 0.4), "clipped to 0.4"),
    "scaled along an axis": (R * spread(0), "differs along axis 0 alone"),
    "accumulated": (np.cumsum(R, 1), "accumulated along axis 1"),
    "not accumulated": (np.diff(R, axis=0, prepend=0), "not accumulated along axis 0"),
    "something added": (R + 0.1, "the same along axes [0, 1]"),
    "a mean forgotten": (R + R.mean(1, keepdims=True), "the same along axis 1"),
    "NaN": (np.where(X > 1, np.nan, R), "NaN at"),
    "infinite": (np.where(X > 1, np.inf, R), "infinite at"),
}


@pytest.mark.parametrize("name", FOUND)
def test_a_pattern_is_named(name):
    got, word = FOUND[name]
    assert word in said(got)


ARRAYS = {"x": X, "y": Y, "dy": DY}
OF_ARRAYS = {
    "dy itself": (DY, "this is dy itself, as if the derivative were 1"),
    "an argument itself": (X, "this is x itself"),
    "a factor too many": (R * X, "a factor x too many"),
    "a factor missing": (R / X, "a factor x is missing"),
    "the derivative of tanh": (R / (1 - Y * Y), "a factor 1 - y^2 is missing"),
    "the derivative of the sigmoid": (R / (Y * (1 - Y)), "a factor y (1 - y) is missing"),
    "divided by a size": (R / 5, "divided by 5, the size of axis 1 of x, once too often"),
    "not divided by a size": (R * 20, "a division by 20, the size of axes [0, 1] of x, is missing"),
    "not divided by a root": (R * 5**0.5, "a division by the root of 5"),
    "a term like an array": (R - DY, "off by -1 times dy"),
    "a term along an axis": (R + X * spread(0), "off by a term like x along axis 1"),
    "a centred term": (R + (X - X.mean(1, keepdims=True)) * spread(0), "like x less its mean along axis 1"),
}


@pytest.mark.parametrize("name", OF_ARRAYS)
def test_what_the_rule_had_at_hand_is_recognised(name):
    got, word = OF_ARRAYS[name]
    assert word in said(got, arrays=ARRAYS, dy={"y": DY})


def linear(dy, values=None):
    """The VJP of y = x @ w in w."""
    return {"g": (values or {"x": X})["x"].T @ dy["y"], "x": X}


OF_VJP = {
    "a lost example": (X[:3].T @ DY[:3], "index 3 of axis 0 of the cotangent is lost"),
    "a lone example": (np.outer(X[1], DY[1]), "only index 1 of axis 0 of the cotangent counts"),
    "weights": ((X * spread(0)).T @ DY, "have the wrong weights 1, 1.667, 2.333, 3 in place of 1"),
    "examples mixed up": (X.T @ DY[::-1], "the cotangent is reversed along axis 0"),
    "a mean of dy": (X.T @ np.tile(DY.mean(0), (4, 1)), "the cotangent is averaged over axis 0"),
    "the size of dy": (X.T @ np.abs(DY), "the sign of the cotangent is lost"),
    "a derivative left out": (X.T @ (DY / (1 - Y * Y)), "a factor 1 - y^2 is missing"),
    "a factor at y": (X.T @ (DY * Y), "a factor y too many"),
    "x reversed": (X[:, ::-1].T @ DY, "reversed along axis 0"),
    "y for x": (Y.T @ DY, "as if x were y"),
}


@pytest.mark.parametrize("name", OF_VJP)
def test_the_true_gradient_of_something_else_is_recognised(name):
    got, word = OF_VJP[name]
    assert word in said(got, X.T @ DY, ARRAYS, {"x": X}, dy={"y": DY}, vjp=linear)


SHAPES = {
    "not summed": (np.stack([R / 2, R / 2]), R, "not summed over axis 0"),
    "not averaged": (np.stack([R / 2, 3 * R / 2]), R, "not averaged over axis 0"),
    "summed": (R.sum(0), R, "summed over axis 0, which the leaf has itself"),
    "transposed": (R.T, R, "transposed"),
    "reshaped": (R.reshape(2, 10), R, "the right numbers in another shape"),
    "unknown": (np.ones(3), R, ""),
}


@pytest.mark.parametrize("name", SHAPES)
def test_another_shape(name):
    got, wanted, word = SHAPES[name]
    assert word in said(got, wanted)
    assert bool(said(got, wanted)) == bool(word)


def test_square_matrices_transposed_and_the_cotangents_too():
    assert said(SQUARE.T, SQUARE) == "transposed"
    vjp = lambda dy, values=None: {"g": dy["y"].sum(0)}
    word = said(SQUARE.sum(1), SQUARE.sum(0), {"y": SQUARE}, dy={"y": SQUARE}, vjp=vjp)
    assert "as if the cotangent were transposed" in word


def test_gates_in_another_order():
    wanted = RNG.normal(size=(3, 8))
    got = wanted.reshape(3, 4, 2)[:, [0, 1, 3, 2]].reshape(3, 8)
    assert said(got, wanted) == "the 4 blocks along axis 1 are in the order [0, 1, 3, 2]"


def test_the_gradient_of_another_leaf():
    other = RNG.normal(size=(4, 5))
    assert said(other, references={"b": other}) == "this is the gradient of b"
    assert said(-other, references={"b": other}) == "this is the gradient of b, with the other sign"


def test_complex_conjugates():
    z, dy = (RNG.normal(size=6) + 1j * RNG.normal(size=6) for _ in range(2))
    assert said(np.conj(z), z) == "the complex conjugate of the gradient"
    vjp = lambda dy, values=None: {"g": 2 * (values or {"g": z})["g"] * dy["y"]}
    word = said(2 * np.conj(z) * dy, 2 * z * dy, {"g": z}, dy={"y": dy}, vjp=vjp)
    assert word == "as if g were conjugated"


def test_an_output_s_cotangent_is_lost():
    vjp = lambda dy, values=None: {"g": dy["y[0]"] * X + dy["y[1]"]}
    word = said(DY * X, DY * X + Y, dy={"y[0]": DY, "y[1]": Y}, vjp=vjp)
    assert word == "the cotangent of the output y[1] is lost"


def test_a_softmax_with_its_diagonal_alone():
    p = np.exp(X) / np.exp(X).sum(1, keepdims=True)
    vjp = lambda dy, values=None: {"g": p * (dy["y"] - (dy["y"] * p).sum(1, keepdims=True))}
    word = said(p * (1 - p) * DY, vjp({"y": DY})["g"], dy={"y": DY}, vjp=vjp)
    assert "only the diagonal of the Jacobian" in word


def test_a_sum_that_runs_the_wrong_way():
    vjp = lambda dy, values=None: {"g": np.cumsum(dy["y"][::-1], 0)[::-1]}
    word = said(np.cumsum(DY, 0), vjp({"y": DY})["g"], dy={"y": DY}, vjp=vjp)
    assert word == "it runs along axis 0 in the wrong direction"


def test_rules_that_are_not_linear():
    wanted = X * DY
    square, constant = (lambda dy: {"g": X * dy["y"] ** 2}), (lambda dy: {"g": X * np.sign(dy["y"])})
    assert "dy is multiplied in twice" in said(X * DY**2, wanted, dy={"y": DY}, rule=square)
    assert "dy is left out" in said(X * np.sign(DY), wanted, dy={"y": DY}, rule=constant)


def test_half_precision_overflows():
    got = np.float16([1, np.nan, np.inf, 2])
    assert "overflowed float16" in said(got, np.float64([1, 3, 4, 2]))
    assert "where the true gradient is 0" in said(np.float32([1, np.nan, 2]), np.float64([1, 0, 2]))


@pytest.mark.parametrize("size", [1, 2, 3, 20])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_an_error_without_a_pattern_is_met_with_silence(size, dtype):
    rng = np.random.default_rng(size)
    ones = {"x": np.ones(size)}
    vjp = lambda dy, values=None: {"g": 3 * dy["y"] * (values or ones)["x"]}
    for _ in range(50):
        x, y, dy, other, wanted, got = (rng.normal(size=size) for _ in range(6))
        arrays, rule = {"x": x, "y": y, "dy": dy}, lambda dy: {"g": dy["y"]}
        context = {"references": {"x": other}, "dy": {"y": dy}, "vjp": vjp, "rule": rule}
        assert said(got.astype(dtype), wanted, arrays, **context) == ""
        nearly = wanted * (1 + 0.1 * rng.normal(size=size))
        assert size < 4 or said(nearly.astype(dtype), wanted, arrays, **context) == ""


def test_what_is_within_rounding_is_no_mistake():
    assert said(R * (1 + 1e-15)) == ""
    assert said(R.astype(np.float32), R) == ""
    assert said(np.zeros(0), np.zeros(0)) == ""


def test_no_gradient_where_there_should_be_none():
    assert said(np.where(X > 0, R, 0.0), 0 * R).endswith("elements should be zero: a mask is missing")


def test_a_large_program_is_not_run_again():
    def vjp(dy, values=None):
        raise AssertionError

    arrays = {str(i): np.float64(i) for i in range(30)}
    assert said(R * spread(0), arrays=arrays, dy={"y": DY}, vjp=vjp).startswith("times a factor that differs")
