"""The sides of the benchmark compute the same, and a side that does not is named."""

import jax
import pytest

from benchmarks import linear_cross_entropy


def test_sides_that_agree_pass_and_others_are_named():
    functions, args = linear_cross_entropy.sides(positions=16, features=4, vocab=50, chunk=8)
    answers = {name: jax.jit(f)(*args) for name, f in functions.items()}
    linear_cross_entropy.check(answers)
    loss, (dparams, dx) = answers[linear_cross_entropy.OURS]
    wrong = answers | {linear_cross_entropy.OURS: (loss, (dparams | {"bias": 1.01 * dparams["bias"]}, dx))}
    with pytest.raises(AssertionError, match=r"funcnet, at once differs .* of a leaf of shape \[50\]"):
        linear_cross_entropy.check(wrong)
