"""True gradients of something else: each is found by its name."""

import numpy as np
import pytest

from tests.check.diagnosis.leaf import ARRAYS, DY, RNG, X, Y, said, spread


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


def test_a_square_cotangent_transposed():
    square = RNG.normal(size=(4, 4))
    vjp = lambda dy, values=None: {"g": dy["y"].sum(0)}
    word = said(square.sum(1), square.sum(0), {"y": square}, dy={"y": square}, vjp=vjp)
    assert "as if the cotangent were transposed" in word


def test_a_conjugated_argument():
    z, dy = (RNG.normal(size=6) + 1j * RNG.normal(size=6) for _ in range(2))
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
