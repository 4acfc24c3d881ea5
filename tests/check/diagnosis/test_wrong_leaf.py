"""What a leaf is held to, and when there is time for another run."""

import numpy as np
import pytest

from funcnet.check.diagnosis.wrong_leaf import ARRAYS, NUMBERS, Context, WrongLeaf, axes_named, subsets
from funcnet.check.judge import measure


@pytest.mark.parametrize(
    ("arrays", "vjp", "small"),
    [
        ({"x": np.ones(3)}, print, True),
        ({"x": np.ones(3)}, None, False),
        ({str(i): np.ones(1) for i in range(ARRAYS)}, print, True),
        ({str(i): np.ones(1) for i in range(ARRAYS + 1)}, print, False),
        ({"x": np.ones(NUMBERS)}, print, True),
        ({"x": np.ones(NUMBERS + 1)}, print, False),
    ],
)
def test_there_is_time_for_few_numbers_and_a_vjp(arrays, vjp, small):
    assert Context({}, arrays, vjp=vjp).small is small


def case(got, wanted, rounding=1e-6):
    return WrongLeaf(measure("g", got, wanted, 1e-12), got, wanted, Context({"g": wanted}), rounding)


def test_an_explanation_is_ten_times_better_than_the_reference_and_of_few_numbers_much_better():
    wanted = np.arange(1.0, 21)
    assert case(wanted + 0.5, wanted).bar == pytest.approx(0.05)
    assert case(wanted[:1] + 0.5, wanted[:1]).bar == pytest.approx(0.5e-6)
    assert case(wanted, wanted).bar == np.inf


def test_arrays_are_the_same_to_rounding_of_one_shape_and_finite():
    wanted = np.linspace(1, 2, 20)
    same = case(2 * wanted, wanted).same
    assert same(wanted * (1 + 0.9e-6), wanted)
    assert not same(wanted * (1 + 1.1e-6), wanted)
    assert not same(wanted[None], wanted)
    assert not same(np.where(wanted > 1.5, np.nan, wanted), wanted)


def test_axes_come_in_sets_the_largest_first_and_have_words():
    assert subsets(2) == [(0, 1), (0,), (1,)]
    assert (axes_named((1,)), axes_named((0, 2))) == ("axis 1", "axes [0, 2]")
