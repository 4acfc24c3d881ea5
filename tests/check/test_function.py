"""A function as a subject: what is read off it, what is said of it, and what is refused in words."""

from itertools import count

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import funcnet as fn
from funcnet.check.function import _alike, _raw, function
from funcnet.check.plain import trace
from funcnet.check.spec import parse
from tests.check.points import ruled

SINE = ruled(jnp.sin, lambda x: (jnp.sin(x), x), lambda x, dy: (dy * jnp.cos(x),))
X = np.float32([1, 2])


def subject(f, *args, reference=None, x64=False, seed=0):
    return function(f, args, reference, x64, seed)


def test_a_subject_has_the_function_s_name_a_root_for_each_argument_and_its_vjp():
    made = subject(SINE, X)
    assert (made.title, made.roots, made.x64, made.layer) == ("sin", ("[0]",), False, None)
    y, pullback = made.pull(made.args)
    np.testing.assert_allclose(y, np.sin(X), rtol=1e-6)
    np.testing.assert_allclose(pullback(jnp.ones(2))[0], np.cos(X), rtol=1e-6)
    assert subject(lambda x, y: x * y, X, X).roots == ("[0]", "[1]")


def test_specs_are_drawn_from_the_seed():
    first, again, other = (subject(lambda x: 2 * x, parse("f32[3]"), seed=seed).args[0] for seed in (1, 1, 2))
    assert first.shape == (3,)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_arguments_are_widened_by_the_option_alone():
    half, whole = np.ones(2, jnp.bfloat16), np.arange(2)
    args = subject(lambda x, i: x[i], half, whole).args
    assert [a.dtype for a in args] == [jnp.bfloat16, np.int64]
    assert subject(lambda x, i: x[i], half, whole, x64=True).args[0].dtype == np.float64
    with pytest.raises(fn.InputError, match="at most 32 bits"):
        subject(jnp.sin, np.ones(2))
    with jax.enable_x64(True):
        args = subject(lambda x, y: x * y.astype(x.dtype), half, np.ones(2)).args
    assert [a.dtype for a in args] == [jnp.bfloat16, np.float64]


NOTES = {
    "no rule": (jnp.sin, None, ("no custom rule inside: autodiff is compared with itself",)),
    "one": (SINE, None, ("custom rules: custom_vjp sin",)),
    "twice": (lambda x: SINE(x) + SINE(2 * x), None, ("custom rules: custom_vjp sin (2x)",)),
    "a reference": (SINE, jnp.sin, ("custom rules: custom_vjp sin", "autodiff is that of the reference given")),
    "a reference, no rule": (lambda x: jnp.sin(x), jnp.sin, ("autodiff is that of the reference given",)),
    "a stop": (
        lambda x: SINE(x) * jax.lax.stop_gradient(x),
        None,
        (
            "custom rules: custom_vjp sin",
            "stop_gradient inside: the numerical oracle sees through it, autodiff does not",
        ),
    ),
}


@pytest.mark.parametrize("name", NOTES)
def test_what_is_inside_is_noted(name):
    f, reference, notes = NOTES[name]
    assert subject(f, X, reference=reference).notes == notes


def test_programs_are_alike_that_have_equal_constants():
    a, b = np.float32([1, 2]), np.float32([1, 3])
    times = lambda c: trace(lambda x: x * jnp.asarray(c), X)
    assert _alike(times(a), times(a.copy()))
    assert not _alike(times(a), times(b))
    assert _alike(times(np.float32([1, np.nan])), times(np.float32([1, np.nan])))
    assert not _alike(trace(jnp.sin, X), trace(jnp.cos, X))


def test_what_a_rule_returns_is_seen_before_jax_looks_at_it():
    integer = ruled(lambda x, i: x[i], lambda x, i: (x[i], None), lambda _, dy: (None, "a text"))
    y, pullback = _raw(integer)((X, np.arange(2)))
    np.testing.assert_array_equal(y, X)
    zeros, text = pullback(jnp.ones(2))
    np.testing.assert_array_equal(zeros, np.zeros(2))
    assert text == "a text"
    for grads, said in (([1, 2], "a list of 2"), ((1,), "a tuple of 1"), (3.0, "a float")):
        rule = ruled(lambda x, i: x[i], lambda x, i: (x[i], None), lambda _, dy, grads=grads: grads)
        with pytest.raises(TypeError, match=f"a tuple of 2 cotangents, one an argument, and returned {said}$"):
            _raw(rule)((X, np.arange(2)))[1](jnp.ones(2))
    assert _raw(jnp.sin) is None
    assert _raw(jax.custom_vjp(jnp.sin)) is None  # it has no rule yet


def in_order(x):
    jax.debug.print("{}", x, ordered=True)
    return x


counter = count()

REFUSED = {
    "no function": (3, ("f32[2]",), "a function"),
    "no arguments": (lambda: jnp.ones(3), (), "at least one floating argument"),
    "wrong arity": (lambda x: x, ("f32[2]", "f32[2]"), "too many positional arguments"),
    "integers only": (lambda x: 2 * x, ("i32[3]<5",), "at least one floating argument"),
    "an integer output": (jnp.argmax, ("f32[3]",), "at least one floating output"),
    "no output": (lambda x: None, ("f32[3]",), "at least one floating output"),
    "NumPy inside": (np.sin, ("f32[3]",), "a function that JAX can trace"),
    "a Python branch": (lambda x: x if x.sum() > 0 else -x, ("f32[3]",), "a function that JAX can trace"),
    "shapes that do not fit": (lambda x, y: x @ y, ("f32[3,2]", "f32[3,2]"), "contracting dimensions"),
    "a print in order": (in_order, ("f32[3]",), "without side effects"),
    "another function each time": (lambda x: x * next(counter), ("f32[3]",), "a pure function"),
    "a loop without reverse mode": (
        lambda x: jax.lax.while_loop(lambda c: c.sum() < 9, lambda c: 2 * c, x),
        ("f32[3]>0",),
        "that JAX can differentiate",
    ),
    "a layer": (fn.relu(), ("f32[3]",), "a function"),
    "a number": (lambda x: x * 2, (2.0,), "the number 2.0"),
    "a text that is none": (lambda x: x * 2, ("f32[",), "an array like"),
    "an integer shape": (lambda x: x * 2, (jax.ShapeDtypeStruct((2,), "int32"),), "which integers are valid"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_checked_is_refused_with_a_remedy(name):
    f, args, message = REFUSED[name]
    with pytest.raises(fn.InputError, match=message) as error:
        fn.check_vjp(f, *args)
    assert error.value.remedy


def test_a_reference_with_other_outputs_is_refused():
    with pytest.raises(fn.InputError, match="a reference with the outputs"):
        fn.check_vjp(jnp.sin, "f32[2]", reference=jnp.sum)
