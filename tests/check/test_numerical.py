"""Numerical slopes against closed forms; kinks, jumps and what cannot be told are told apart from mistakes."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import funcnet as fn
from funcnet.check.numerical import _listed, numerical
from funcnet.check.slopes import KINKS, STEPS, Numerical, _sides, extrapolated, slope_of
from tests.check.points import point_of, ruled

NONE = np.zeros_like(STEPS)


def central(f, x):
    """The difference quotients of f, and their rounding."""
    quotients = np.array([(f(x + h) - f(x - h)) / (2 * h) for h in STEPS])
    return quotients, 2.0**-52 * abs(f(x)) / STEPS


@pytest.mark.parametrize(
    ("f", "x", "slope"),
    [
        (np.sin, 0.7, np.cos(0.7)),
        (np.exp, 3.0, np.exp(3.0)),
        (np.tanh, 0.1, 1 - np.tanh(0.1) ** 2),
        (np.sqrt, 0.2, 0.5 / np.sqrt(0.2)),
        (lambda x: x**5 - 2 * x, -1.5, 5 * 1.5**4 - 2),
    ],
)
def test_the_limit_is_the_derivative_and_its_error_is_known(f, x, slope):
    value, error = extrapolated(*central(f, x))
    assert abs(value - slope) <= error < 1e-10 * abs(slope)


def test_the_limit_of_a_polynomial_in_h_squared_is_exact():
    """D(h) = 5 + 10 h^2 + h^4 in exact fractions: two columns of the table leave 5, which the third confirms."""
    quotients = np.array([float(5 + 10 * Fraction(h) ** 2 + Fraction(h) ** 4) for h in STEPS])
    value, error = extrapolated(quotients, NONE)
    assert abs(value - 5) < 1e-14
    assert error < 1e-14
    assert abs(extrapolated(quotients[:3], NONE[:3])[0] - 5) < 1e-14


def test_rounding_is_part_of_the_error_and_keeps_the_steps_large():
    """Noise of alternating sign, a unit over the step: small steps are worth nothing, and it knows."""
    noise = 1e-9 / STEPS
    wrong = noise * np.where(np.arange(len(STEPS)) % 2, 1, -1)
    value, error = extrapolated(2 + STEPS**2 + wrong, noise)
    assert abs(value - 2) <= error < 1e-6
    assert extrapolated(np.full(len(STEPS), 3.0), np.full(len(STEPS), 0.25)) == (3.0, 0.25)


def test_a_limit_of_what_is_not_finite_is_none():
    value, error = extrapolated(np.full(len(STEPS), np.nan), NONE)
    assert np.isnan(value)
    assert error == np.inf


SIDES = {
    "smooth": (np.sin, 0.5, "smooth"),
    "steep": (lambda x: np.exp(20 * x), 0.0, "smooth"),
    "constant": (lambda x: 3.0 + 0 * x, 1.0, "smooth"),
    "a kink": (np.abs, 0.0, "kink"),
    "a small kink on a slope": (lambda x: np.sin(x) + 1e-3 * abs(x), 0.0, "kink"),
    "a kink smaller than rounding": (lambda x: 1e8 + 1e-6 * abs(x), 0.0, "smooth"),
    "a jump": (np.sign, 0.0, "jump"),
    "a jump to one side": (np.floor, 2.0, "jump"),
    "a root": (lambda x: np.sqrt(abs(x)), 0.0, "jump"),
    "not a number": (np.sqrt, 0.0, "jump"),
    "a jump smaller than rounding": (lambda x: 1e8 + 2e-8 * (x > 0), 0.0, "smooth"),
    "a kink from afar": (lambda x: np.sqrt(x * x + 1e-8), 0.0, "smooth"),
    "curved and kinked": (lambda x: x * abs(x), 0.0, "smooth"),
}


@pytest.mark.parametrize("name", SIDES)
def test_kinks_and_jumps_show_in_the_one_sided_slopes(name):
    f, x, wanted = SIDES[name]
    with np.errstate(all="ignore"):
        left, right = (np.array([s * (f(x + s * h) - f(x)) / h for h in STEPS]) for s in (-1, 1))
    *sides, kind = _sides(left, right, 2.0**-50 * abs(f(x)) / STEPS)
    assert kind == wanted
    if name == "a small kink on a slope":
        np.testing.assert_allclose(sides, [0.999, 1.001], rtol=1e-7)


def unit(i, n):
    return np.eye(n)[i]


def test_the_slope_along_a_direction_is_the_cotangent_times_the_jacobian_times_it():
    a = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    x, w = np.float32([0.5, -1, 2, 0.25]), np.float32([1, 2, 3])
    point = point_of(lambda x, w: w * jnp.sin(a @ x), x, w)
    finder, v = Numerical(point), np.array([1.0, -2.0, 0.5, 3.0])
    dy, product = point.dys[0]["y"].astype(float), a.astype(float) @ x
    found = finder.slope("[0]", v)
    np.testing.assert_allclose(found.value, dy @ (w * np.cos(product) * (a.astype(float) @ v)), rtol=1e-10)
    assert found.kind == "smooth"
    assert found.error < 1e-8
    np.testing.assert_allclose([found.left, found.right], found.value, rtol=1e-3)
    np.testing.assert_allclose(finder.slope("[1]", unit(1, 3)).value, dy[1] * np.sin(product[1]), rtol=1e-10)


def test_where_small_steps_see_another_function_nothing_is_sure():
    """A staircase: its slope is 1 from afar, and 0 from near."""
    point = point_of(lambda x: jnp.floor(x * 2**16) / 2**16, np.float32([1.5 + 2**-17]))
    assert Numerical(point).slope("[0]", np.ones(1)).error == np.inf


def test_what_is_lost_in_rounding_has_no_verdict():
    """A slope of 1e-9 beside values of 1e8."""
    point = point_of(lambda x: 1e-9 * x + 1e8, np.float32([1, 2]))
    assert numerical(point, Numerical(point)) == ({"[0]": "-"}, [])
    assert "[0]: numerical differences are too noisy here to tell" in point.notes


def test_outputs_that_are_not_finite_have_no_slope_and_no_cotangent():
    point = point_of(lambda x: 1 / x, np.float32([1, 0, -2]))
    finder = Numerical(point)
    assert not finder.whole
    assert finder.dy["y"].tolist() == [point.dys[0]["y"][0], 0, point.dys[0]["y"][2]]
    np.testing.assert_allclose(finder.slope("[0]", np.ones(3)).value, -finder.dy["y"][0] - finder.dy["y"][2] / 4)
    assert Numerical(point_of(jnp.sin, np.float32([1, 0]))).whole
    assert not Numerical(point_of(lambda x: (x, 1 / x), np.float32([1, 0]))).whole


def test_where_no_output_is_finite_there_is_no_verdict():
    report = fn.check_vjp(lambda x: jnp.sqrt(x), np.float32([-1, -2]), oracles=("numerical",))
    assert report.leaves[0].verdicts == {"numerical": "-"}
    assert "no output is finite here: the numerical oracle cannot tell" in report.notes
    assert report.summary == "nothing was compared: no oracle could tell"
    empty = point_of(lambda x: x[:0], np.float32([1, 0]))
    assert numerical(empty, Numerical(empty)) == ({"[0]": "ok"}, [])


def test_a_step_is_small_beside_every_value():
    """A value below a thousandth of the root mean square moves by that; what is infinite stays."""
    finder = Numerical(point_of(jnp.sin, np.float32([3, -4, 1e-4, 0, np.inf])))
    np.testing.assert_allclose(finder.scale("[0]"), [3, 4, 2.5, 2.5, 0], rtol=1e-6)  # sqrt(25 / 4) is 2.5
    assert Numerical(point_of(jnp.sin, np.zeros(2, np.float32))).scale("[0]").tolist() == [1, 1]
    assert Numerical(point_of(jnp.sin, np.float32([np.inf]))).scale("[0]").tolist() == [0]


def test_steps_are_exact_so_that_a_narrow_function_far_from_zero_has_its_slope():
    """Rounded, they left it off by 2e-8, which looked like a mistake of the rule."""
    x = np.array([101325.1, -3e5, 2.0**17 + 2.0**-35, 2.0**18 - 2.0**10])
    finder = Numerical(point_of(lambda x: x, x, x64=True))
    v = finder.direction("[0]")
    for step in np.outer([*STEPS[6:], *-STEPS[6:]], v):  # the others may reach the next power of two
        assert [Fraction(a) for a in x + step] == [Fraction(a) + Fraction(b) for a, b in zip(x, step, strict=True)]
    x = np.array([0.0, 5e-324, 1e-300, 1.0, 1e300, np.inf])
    v = Numerical(point_of(lambda x: x, x, x64=True)).direction("[0]")
    assert np.isfinite(v).all()
    assert (v != 0).tolist() == [True] * 5 + [False]


def test_kinks_are_found_by_halving_among_the_candidates():
    x = np.float32(np.arange(20) % 7 - 3)  # 0 at 3, 10 and 17
    finder = Numerical(point_of(jax.nn.relu, x.reshape(4, 5)))
    every = np.ones((4, 5), bool)
    assert np.flatnonzero(finder.kinks("[0]", every)).tolist() == [3, 10, 17]
    assert np.flatnonzero(finder.kinks("[0]", every & (np.arange(20) != 10).reshape(4, 5))).tolist() == [3, 17]
    assert not finder.kinks("[0]", x.reshape(4, 5) != 0).any()


def test_of_very_many_kinks_all_count_if_a_sample_has_one_each():
    n = 4 * KINKS
    finder = Numerical(point_of(jnp.abs, np.zeros(n, np.float32)))
    assert finder.kinks("[0]", np.ones(n, bool)).all()
    half = Numerical(point_of(jnp.abs, np.float32(np.arange(n) < n // 2)))
    found = half.kinks("[0]", np.ones(n, bool))
    assert not found[: n // 2].any()
    assert KINKS <= found[n // 2 :].sum() < n // 2  # so many were found, and no more are taken for kinks


def test_the_rule_is_backed_where_the_slope_is_its_own_and_not_the_other():
    finder = Numerical(point_of(jnp.sin, np.float32([0.5, 1.0])))
    v = unit(0, 2)
    right = slope_of(finder.gradients["[0]"], v)
    assert finder.backs("[0]", v, 2 * right)
    assert not finder.backs("[0]", v, right)
    middle = ruled(jnp.abs, lambda x: (jnp.abs(x), x), lambda x, dy: (dy * jnp.sign(x),))
    kinked = Numerical(point_of(middle, np.float32([0.0, 1.0])))
    assert not kinked.backs("[0]", v, 5.0)
    for factor, near in ((1 + 1e-6, True), (1.01, False)):
        rule = ruled(jnp.sin, lambda x: (jnp.sin(x), x), lambda x, dy, c=factor: (c * dy * jnp.cos(x),))
        other = Numerical(point_of(rule, np.float32([0.5, 1.0])))
        assert not other.backs("[0]", v, right)
        assert other.backs("[0]", v, 2 * right) == near


def verdict(f, *args):
    point = point_of(f, *args)
    return numerical(point, Numerical(point))


def test_every_leaf_has_its_verdict_and_a_mistake_both_slopes():
    mul = ruled(lambda x, y: x * y, lambda x, y: (x * y, (x, y)), lambda r, dy: (dy * r[1], 1.01 * dy * r[0]))
    words, (failure,) = verdict(mul, np.float32([1, 2]), np.float32([3, -1]))
    assert words == {"[0]": "ok", "[1]": "WRONG"}
    assert (failure.leaf, failure.oracle, failure.kind) == ("[1]", "numerical", "slope")
    np.testing.assert_allclose(failure.got, 1.01 * failure.wanted, rtol=1e-6)
    assert verdict(jnp.sin, np.zeros((0, 3), np.float32)) == ({"[0]": "ok"}, [])
    assert verdict(jnp.abs, np.float32([0, 1])) == ({"[0]": "kink"}, [])


def test_a_slope_at_a_kink_may_be_any_between_both_sides():
    x = np.float32([0, 1])

    def sloped(slope):
        bwd = lambda x, dy: (dy * jnp.where(x == 0, slope, jnp.sign(x)),)
        return ruled(jnp.abs, lambda x: (jnp.abs(x), x), bwd)

    for slope, ok in ((0.3, True), (1.1, False), (-1.1, False)):
        words, failures = verdict(sloped(slope), x)
        assert words == {"[0]": "kink" if ok else "WRONG"}, slope
        assert [failure.kind for failure in failures] == ([] if ok else ["beyond both sides"])


def test_what_is_not_finite_is_wrong_where_there_is_a_slope_alone():
    lost = ruled(jnp.sin, lambda x: (jnp.sin(x), x), lambda x, dy: (dy * jnp.where(x == 0, jnp.nan, jnp.cos(x)),))
    point = point_of(lost, np.float32([[1, 2], [0, 3]]))
    words, (failure,) = numerical(point, Numerical(point))
    assert (words, failure.kind, failure.index) == ({"[0]": "WRONG"}, "not finite", (1, 0))
    np.testing.assert_allclose(failure.wanted, point.dys[0]["y"][1, 0], rtol=1e-6)
    assert verdict(jnp.sqrt, np.float32([0, 1])) == ({"[0]": "-"}, [])


def test_slopes_pair_real_parts_and_pass_over_what_is_not_moved():
    assert slope_of(np.array([1.0, 2.0, 3.0]), np.array([4.0, 0.0, -1.0])) == 1.0
    assert slope_of(np.array([1.0, np.nan]), np.array([4.0, 0.0])) == 4.0
    assert slope_of(np.array([1 + 2j]), np.array([3 + 1j])) == 1.0  # no conjugate: as JAX pairs them


def test_places_are_listed_up_to_four():
    mask = np.zeros((2, 3), bool)
    mask[[0, 1], [1, 2]] = True
    assert _listed(mask) == "[0, 1], [1, 2]"
    assert _listed(np.ones((2, 3), bool)) == "every element"
    assert _listed(np.ones(1, bool)) == "[0]"
    assert _listed(np.arange(6) > 0) == "[1], [2], [3], [4], .."


def test_kinks_are_told_apart_from_mistakes():
    at_zero = np.float32([0, 1, -1])
    report = fn.check_vjp(jax.nn.relu, at_zero)
    assert report.ok
    assert report.leaves[0].verdicts["numerical"] == report.leaves[0].verdicts["autodiff"] == "kink"
    assert any("kink" in note and "[0]" in note for note in report.notes)
    assert not fn.check_vjp(lambda x: jax.nn.relu(x) - jax.nn.relu(-x), at_zero, shrink=False).ok
    slope = lambda x, dy: jnp.where(x == 0, 2 * dy, dy * (x > 0).astype(dy.dtype))
    doubled = ruled(lambda x: jnp.maximum(x, 0.0), lambda x: (jnp.maximum(x, 0.0), x), lambda x, dy: (slope(x, dy),))
    report = fn.check_vjp(doubled, at_zero, oracles=("numerical",), shrink=False)
    assert [failure.kind for failure in report.failures] == ["beyond both sides"]


@pytest.mark.parametrize(("factor", "ok"), [(1.0, True), (2.0, False)])
def test_many_kinks_do_not_hide_a_mistake_elsewhere(factor, ok):
    slope = lambda x, dy: jnp.where(x > 0, jnp.asarray(factor, dy.dtype) * dy, 0.0)
    relu = ruled(lambda x: jnp.maximum(x, 0.0), lambda x: (jnp.maximum(x, 0.0), x), lambda x, dy: (slope(x, dy),))
    x = np.random.default_rng(0).normal(size=300).astype(np.float32)
    x[:100] = 0
    assert fn.check_vjp(relu, x, shrink=False).ok == ok


def test_a_gradient_that_is_not_finite_is_wrong_where_the_function_has_slopes():
    report = fn.check_vjp(jnp.linalg.norm, np.zeros(3, np.float32), oracles=("numerical",), shrink=False)
    assert [failure.kind for failure in report.failures] == ["not finite"]


@pytest.mark.parametrize(("factor", "ok"), [(3.0, True), (6.0, False)])
def test_values_whose_squares_overflow_are_judged(factor, ok):
    rule = ruled(lambda x: 3 * x, lambda x: (3 * x, None), lambda saved, dy: (factor * dy,))
    x = np.random.default_rng(0).normal(size=4) * 1e160
    assert fn.check_vjp(rule, x, x64=True, oracles=("numerical",)).ok == ok


def test_a_slope_of_unknown_error_is_no_verdict():
    steps = lambda x: jnp.floor(x * 1e5) / 1e5
    rule = ruled(steps, lambda x: (steps(x), None), lambda saved, dy: (-100 * dy,))
    report = fn.check_vjp(rule, np.array([0.3, 1.7, 2.2]), x64=True, oracles=("numerical",))
    assert "ok" not in [leaf.verdicts["numerical"] for leaf in report.leaves]
