"""Reverse mode as a judge: every element, the worst cotangent, and where it is none."""

import jax
import jax.numpy as jnp
import numpy as np

import funcnet as fn
from funcnet.check.autodiff import _mended, autodiff
from funcnet.check.slopes import Numerical
from tests.check.points import point_of, ruled


def asked(f, *args, judge=True):
    """(leaves, verdicts, failures), and the point."""
    point = point_of(f, *args)
    return autodiff(point, Numerical(point), judge), point


def with_bwd(f, bwd):
    return ruled(f, lambda x: (f(x), x), lambda x, dy: (bwd(x, dy),))


def test_one_wrong_element_is_found_with_both_values():
    x = np.float32([[0.5, 1, 2], [3, -1, 0.25]])
    wrong = lambda x, dy: (dy * jnp.cos(x)).at[1, 2].mul(1.01)
    ((leaf,), verdicts, (failure,)), point = asked(with_bwd(jnp.sin, wrong), x)
    assert verdicts == {"[0]": "WRONG"}
    assert leaf.index == failure.index == (1, 2)
    wanted = point.dys[point.shown["[0]"]]["y"][1, 2] * np.cos(0.25)
    np.testing.assert_allclose(failure.wanted, wanted, rtol=1e-6)
    np.testing.assert_allclose(failure.got, 1.01 * wanted, rtol=1e-6)


def test_the_cotangent_is_shown_for_which_the_error_is_largest():
    """A rule that fails for the larger of the two only."""
    x = np.float32([1])
    first, second = (float(dy["y"][0]) for dy in point_of(jnp.sin, x).dys)
    for of, shown in ((first, 0), (second, 1)):
        rule = with_bwd(jnp.sin, lambda x, dy, of=of: dy * jnp.cos(x) * jnp.where(dy == of, 1.1, 1.0))
        (_, verdicts, _), point = asked(rule, x)
        assert (verdicts["[0]"], point.shown["[0]"]) == ("WRONG", shown)


def test_a_kink_excuses_its_own_element_alone():
    x = np.float32([0, 1, -1])
    other = lambda x, dy: dy * jnp.where(x == 0, 0.7, jnp.sign(x))
    (_, verdicts, failures), _ = asked(with_bwd(jnp.abs, other), x)
    assert (verdicts, failures) == ({"[0]": "kink"}, [])
    wrong = lambda x, dy: other(x, dy) * jnp.where(x == 1, 1.1, 1.0)
    ((leaf,), verdicts, failures), _ = asked(with_bwd(jnp.abs, wrong), x)
    assert (verdicts, leaf.index, len(failures)) == ({"[0]": "WRONG"}, (1,), 1)


def test_without_being_asked_it_measures_and_excuses_nothing():
    other = lambda x, dy: dy * jnp.where(x == 0, 0.7, jnp.sign(x))
    ((leaf,), verdicts, _), _ = asked(with_bwd(jnp.abs, other), np.float32([0, 1]), judge=False)
    assert (verdicts, leaf.index) == ({"[0]": "WRONG"}, (0,))


def test_where_it_is_not_finite_itself_it_says_nothing_and_the_rest_counts():
    x = np.float32([0, 4])
    root = lambda x, dy: dy * jnp.where(x == 0, 0.0, 0.5 / jnp.sqrt(jnp.where(x == 0, 1.0, x)))
    (_, verdicts, _), point = asked(with_bwd(jnp.sqrt, root), x)
    assert verdicts == {"[0]": "-"}
    assert "[0]: autodiff of the plain program is not finite at [0], so it is no judge there" in point.notes
    ((leaf,), verdicts, _), _ = asked(with_bwd(jnp.sqrt, lambda x, dy: 1.1 * root(x, dy)), x)
    assert (verdicts, leaf.index) == ({"[0]": "WRONG"}, (1,))
    (_, verdicts, _), point = asked(jnp.sqrt, x)
    assert verdicts == {"[0]": "-"}
    assert "[0]: autodiff of the plain program is not finite either, so it is no judge" in point.notes


def softplus(x):
    """Its parts have kinks at 0 that cancel: reverse mode takes half of one, and none of the other."""
    return jnp.maximum(x, 0.0) + jnp.log1p(jnp.exp(-jnp.where(x > 0, x, -x)))


def test_where_it_is_wrong_itself_the_numerical_slope_decides():
    x = np.float32([0, 1])
    (_, verdicts, failures), point = asked(with_bwd(softplus, lambda x, dy: dy * jax.nn.sigmoid(x)), x)
    assert (verdicts, failures) == ({"[0]": "-"}, [])
    assert any("at [0] the numerical slope is the rule's" in note for note in point.notes)
    assert _mended(point, Numerical(point), "[0]", np.array([True, False]))
    wrong = lambda x, dy: dy * (jax.nn.sigmoid(x) + jnp.where(x == 0, 0.2, 0.0))
    (_, verdicts, _), _ = asked(with_bwd(softplus, wrong), x)
    assert verdicts == {"[0]": "WRONG"}


def test_an_empty_leaf_is_ok():
    ((leaf,), verdicts, failures), _ = asked(jnp.sin, np.zeros((0, 2), np.float32))
    assert (leaf.shape, verdicts, failures) == ((0, 2), {"[0]": "ok"}, [])


def test_a_function_that_only_its_rule_makes_differentiable_is_judged_by_the_other_oracles():
    def root(a):  # Newton's iteration for the square root
        return jax.lax.while_loop(lambda y: jnp.any(jnp.abs(y * y - a) > 1e-6 * a), lambda y: 0.5 * (y + a / y), a)

    right = ruled(root, lambda a: (root(a), root(a)), lambda y, dy: (dy / (2 * y),))
    report = fn.check_vjp(right, "f32[3]>1", oracles=("autodiff", "algebra"))
    report.raise_for_failure()
    assert report.leaves[0].verdicts["autodiff"] == "-"
    assert any("reverse mode" in note for note in report.notes)
