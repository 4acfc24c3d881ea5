"""Patterns in the numbers of a gradient: each is found by its name."""

import numpy as np
import pytest

from tests.check.diagnosis.leaf import ARRAYS, DY, RNG, R, X, said

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
    "NaN": (np.where(X > 1, np.nan, R), "NaN at"),
    "infinite": (np.where(X > 1, np.inf, R), "infinite at"),
}


@pytest.mark.parametrize("name", FOUND)
def test_a_pattern_is_named(name):
    got, word = FOUND[name]
    assert word in said(got)


OF_ARRAYS = {
    "dy itself": (DY, "this is dy itself, as if the derivative were 1"),
    "an argument itself": (X, "this is x itself"),
    "divided by a size": (R / 5, "divided by 5, the size of axis 1 of x, once too often"),
    "not divided by a size": (R * 20, "a division by 20, the size of axes [0, 1] of x, is missing"),
    "not divided by a root": (R * 5**0.5, "a division by the root of 5"),
}


@pytest.mark.parametrize("name", OF_ARRAYS)
def test_an_array_at_hand_and_its_sizes_are_recognised(name):
    got, word = OF_ARRAYS[name]
    assert word in said(got, arrays=ARRAYS, dy={"y": DY})


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


def test_gates_in_another_order():
    wanted = RNG.normal(size=(3, 8))
    got = wanted.reshape(3, 4, 2)[:, [0, 1, 3, 2]].reshape(3, 8)
    assert said(got, wanted) == "the 4 blocks along axis 1 are in the order [0, 1, 3, 2]"


def test_the_gradient_of_another_leaf():
    other = RNG.normal(size=(4, 5))
    assert said(other, references={"b": other}) == "this is the gradient of b"
    assert said(-other, references={"b": other}) == "this is the gradient of b, with the other sign"


def test_a_square_matrix_transposed_and_complex_conjugates():
    square, z = RNG.normal(size=(4, 4)), RNG.normal(size=6) + 1j * RNG.normal(size=6)
    assert said(square.T, square) == "transposed"
    assert said(np.conj(z), z) == "the complex conjugate of the gradient"


def test_half_precision_overflows():
    got = np.float16([1, np.nan, np.inf, 2])
    assert "overflowed float16" in said(got, np.float64([1, 3, 4, 2]))
    assert "where the true gradient is 0" in said(np.float32([1, np.nan, 2]), np.float64([1, 0, 2]))


def test_no_gradient_where_there_should_be_none():
    assert said(np.where(X > 0, R, 0.0), 0 * R).endswith("elements should be zero: a mask is missing")
