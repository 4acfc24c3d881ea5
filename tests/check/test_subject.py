"""A point: what is drawn there, how its values are moved, and how well a gradient is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import funcnet as fn
from funcnet.check.judge import tolerance
from funcnet.check.subject import host, sharded_like
from tests.check.points import layer_point, point_of, ruled

X = np.float32([0.5, -1.0, 2.0])


def pair(x, i, z):
    return {"y": x["a"] * z[i], "n": i}


PAIR = (pair, {"a": X}, np.array([0, 1, 1]), np.complex64([1j, 2]))


def test_only_leaves_and_outputs_that_have_a_derivative_are_among_its_values(standard_promotion):
    point = point_of(*PAIR)
    assert list(point.values) == ["[0]['a']", "[2]"]
    assert list(point.outputs) == ["y['y']"]
    assert point.sound == list(point.values)
    point.broken.add("[2]")
    assert point.sound == ["[0]['a']"]


def test_two_cotangents_are_drawn_like_the_outputs_and_depend_on_the_seed(standard_promotion):
    first, again, other = (point_of(*PAIR, seed=seed).dys for seed in (1, 1, 2))
    for dys in (first, other):
        assert all(dy["y['y']"].dtype == np.complex64 and dy["y['y']"].shape == (3,) for dy in dys)
    assert not np.array_equal(first[0]["y['y']"], first[1]["y['y']"])
    np.testing.assert_array_equal(first[0]["y['y']"], again[0]["y['y']"])
    assert not np.array_equal(first[0]["y['y']"], other[0]["y['y']"])


def test_draws_are_standard_normal_and_scaled_by_element():
    point, n = point_of(jnp.sin, X), 20_000
    like = {"a": np.zeros(n, np.float32), "z": np.zeros(n, np.complex64)}
    drawn = point.draw(like)
    for noise in (drawn["a"], drawn["z"].real, drawn["z"].imag):
        assert abs(noise.mean()) < 5 / n**0.5
        assert abs(noise.std() - 1) < 5 / n**0.5
    scaled = point.draw({"a": np.zeros(3)}, {"a": np.array([0.0, 1.0, 1e6])})["a"]
    assert scaled[0] == 0
    assert abs(scaled[2]) > 100 * abs(scaled[1])


def test_values_take_their_places_and_an_integer_output_has_a_cotangent_without_numbers(standard_promotion):
    point = point_of(*PAIR)
    args = point.args({"[0]['a']": "new", "[2]": "other"})
    assert (args[0], args[2]) == ("new", "other")
    np.testing.assert_array_equal(args[1], [0, 1, 1])
    dy = point.cotangent({"y['y']": "dy"})
    assert dy["y"] == "dy"
    assert (dy["n"].dtype, dy["n"].shape) == (jax.dtypes.float0, (3,))


def test_a_layer_s_integer_output_has_the_cotangent_none():
    layer = fn.Layer(
        "pairs",
        lambda key, x: ({}, ()),
        lambda params, state, x: (x, jnp.argmax(x)),
        lambda params, state, x, key: ((x, jnp.argmax(x)), state, ()),
        lambda params, saved, dy, by=fn.total: ({}, dy[0]),
    )
    assert layer_point(layer, X[None]).cotangent({"y[0]": "dy"}) == ("dy", None)


def test_the_rule_and_the_reference_are_the_two_gradients():
    rule = ruled(jnp.sin, lambda x: (jnp.sin(x), x), lambda x, dy: (2 * dy * jnp.cos(x),))
    point = point_of(rule, X)
    for k, dy in enumerate(point.dys):
        wanted = dy["y"].astype(float) * np.cos(X.astype(float))
        np.testing.assert_allclose(point.references[k]["[0]"], wanted, rtol=1e-14)
        np.testing.assert_allclose(point.rule[k]["[0]"], 2 * wanted, rtol=1e-6)
        assert point.references[k]["[0]"].dtype == np.float64
        assert point.rule[k]["[0]"].dtype == np.float32
    np.testing.assert_allclose(point.plain_output["y"], np.sin(X), rtol=1e-6)
    assert point.reverses


def test_without_reverse_mode_the_rule_measures_itself_and_a_note_says_so():
    def root(a):
        return jax.lax.while_loop(lambda y: jnp.any(jnp.abs(y * y - a) > 1e-6 * a), lambda y: 0.5 * (y + a / y), a)

    point = point_of(ruled(root, lambda a: (root(a), root(a)), lambda y, dy: (dy / (2 * y),)), np.float32([2, 3]))
    assert not point.reverses
    np.testing.assert_array_equal(point.references[0]["[0]"], point.rule[0]["[0]"].astype(float))
    assert point.baseline_error["[0]"].tolist() == [0, 0]
    assert any("reverse mode does not go through" in note for note in point.notes)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_values_are_moved_by_units_of_rounding(dtype):
    point = point_of(jnp.sin, np.ones(3, jnp.dtype(dtype)))
    moved = point._beside({"[0]": np.array([0, 1, -2])})["[0]"]
    eps = float(jnp.finfo(dtype).eps)
    assert moved.dtype == jnp.dtype(dtype)
    assert [float(v) for v in moved] == [1, 1 + eps, 1 - 2 * eps]


def test_the_longest_sum_counts_for_the_tolerance():
    a = np.ones((7, 3), np.float32)
    point = point_of(lambda x: a @ x, X)
    assert point.terms == 7  # three forwards, seven backwards
    (room, *_) = point.rooms("[0]")
    np.testing.assert_array_equal(room, np.abs(point.references[0]["[0]"]).max() * tolerance("float32", 7))


def test_a_gradient_that_cancels_is_known_less_well_by_what_the_program_loses():
    """1 - cos x, squared: near 0 it has lost three digits or four of the seven of float32."""
    x = np.float32([0.011, -0.017, 0.023])
    exact, poor = point_of(jnp.square, x), point_of(lambda x: jnp.square(1 - jnp.cos(x)), x)
    share = lambda point: point.baseline_error["[0]"].max() / np.abs(point.references[0]["[0]"]).max()
    assert share(exact) < 1e-5
    assert 1e-4 < share(poor) < 1e-1
    first, second = poor.rooms("[0]")
    np.testing.assert_array_equal(second - first > 0, [True] * 3)
    wanted = poor.references[0]["[0]"]
    assert poor.measured("[0]", (wanted + poor.baseline_error["[0]"] / 2).astype(np.float32), wanted).within
    assert not poor.measured("[0]", (wanted + 2 * poor.baseline_error["[0]"]).astype(np.float32), wanted).within


def test_where_nothing_is_rounded_nothing_is_lost():
    """The gradient of -x is -dy, whatever x is."""
    assert point_of(lambda x: -x, X).baseline_error["[0]"].tolist() == [0, 0, 0]


def test_what_a_leaf_may_be_off_is_pooled_but_for_elements_moved_over_a_kink():
    point = point_of(jnp.sin, X)
    unit = np.abs(point.references[0]["[0]"]).max()
    np.testing.assert_array_equal(point._pooled("[0]", np.array([1, 3, 2]) * 1e-7 * unit), [3e-7 * unit] * 3)
    kinked = point._pooled("[0]", np.array([1e-7, 1, 2e-7]) * unit)
    np.testing.assert_array_equal(kinked, np.array([2e-7, 1, 2e-7]) * unit)
    assert point._pooled("[0]", np.zeros(0)).shape == (0,)


def test_without_a_mesh_values_stay_as_they_are():
    assert type(host({"a": jnp.ones(2)})["a"]) is np.ndarray
    assert sharded_like(X, jnp.ones(3)) is X
    assert sharded_like(X, None) is X
