"""Factors and terms too many or too few: each is found by its name."""

import numpy as np
import pytest

from tests.check.diagnosis.leaf import ARRAYS, DY, R, X, Y, said, spread

FOUND = {
    "scaled along an axis": (R * spread(0), "differs along axis 0 alone"),
    "accumulated": (np.cumsum(R, 1), "accumulated along axis 1"),
    "not accumulated": (np.diff(R, axis=0, prepend=0), "not accumulated along axis 0"),
    "something added": (R + 0.1, "the same along axes [0, 1]"),
    "a mean forgotten": (R + R.mean(1, keepdims=True), "the same along axis 1"),
}


@pytest.mark.parametrize("name", FOUND)
def test_a_pattern_along_an_axis_is_named(name):
    got, word = FOUND[name]
    assert word in said(got)


OF_ARRAYS = {
    "a factor too many": (R * X, "a factor x too many"),
    "a factor missing": (R / X, "a factor x is missing"),
    "the derivative of tanh": (R / (1 - Y * Y), "a factor 1 - y^2 is missing"),
    "the derivative of the sigmoid": (R / (Y * (1 - Y)), "a factor y (1 - y) is missing"),
    "a term like an array": (R - DY, "off by -1 times dy"),
    "a term along an axis": (R + X * spread(0), "off by a term like x along axis 1"),
    "a centred term": (R + (X - X.mean(1, keepdims=True)) * spread(0), "like x less its mean along axis 1"),
}


@pytest.mark.parametrize("name", OF_ARRAYS)
def test_what_the_rule_had_at_hand_is_recognised(name):
    got, word = OF_ARRAYS[name]
    assert word in said(got, arrays=ARRAYS, dy={"y": DY})
