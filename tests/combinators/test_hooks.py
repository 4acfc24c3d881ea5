"""A look inside: every part is seen, with its path, and nothing is changed by it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import funcnet as fn
from funcnet.combinators.hooks import observe, paths

INNER = fn.serial(fn.dense(3), fn.relu())
MODELS = {
    "dense": (fn.dense(3), [()]),
    "serial": (fn.serial(a=INNER, b=fn.dense(3)), [("a", "dense"), ("a", "relu"), ("a",), ("b",), ()]),
    "skip": (fn.skip(INNER), [("dense",), ("relu",), ()]),
    "skip of one": (fn.skip(fn.dense(3)), [()]),
    "repeat": (fn.repeat(INNER, 2), [("dense",), ("relu",), ()]),
    "remat": (fn.remat(INNER), [("dense",), ("relu",), ()]),
    "mixed": (fn.mixed(INNER), [("dense",), ("relu",), ()]),
    "deep": (
        fn.remat(fn.serial(fn.repeat(fn.skip(INNER), 2))),
        [("repeat", "dense"), ("repeat", "relu"), ("repeat",), ()],
    ),
}
X = jax.random.normal(jax.random.key(0), (4, 3))


def run(model, see=None):
    """Output, residuals and gradients, and what was seen on the way forward."""
    watched = model if see is None else observe(model, see)
    params, state = watched.init(jax.random.key(1), X)
    y, _, residuals = watched.fwd(params, state, X, None)
    return y, residuals, model.bwd(params, residuals, jnp.cos(y))


@pytest.mark.parametrize("name", MODELS)
def test_every_part_is_seen_once_after_its_own_parts(name):
    model, expected = MODELS[name]
    seen = []
    jax.eval_shape(lambda: run(model, lambda path, layer, params, x, out: seen.append(path)))
    assert seen == expected
    assert set(paths(model)) == set(expected)


@pytest.mark.parametrize("name", MODELS)
def test_watching_changes_nothing(name):
    model, _ = MODELS[name]
    program = lambda see: str(jax.make_jaxpr(lambda: run(model, see))())
    assert program(lambda *_: None) == program(None)


def test_what_is_seen_is_each_layers_own_call():
    model, _ = MODELS["serial"]
    seen = {}
    y, residuals, _ = run(model, lambda path, layer, params, x, out: seen.setdefault(path, (layer, params, x, out)))
    layer, params, x, (out, state, saved) = seen["b",]
    assert layer is model.parts["b"]
    assert seen["a",][0] is model.parts["a"]
    np.testing.assert_array_equal(x, seen["a",][3][0])
    np.testing.assert_array_equal(out, y)
    np.testing.assert_array_equal(saved, residuals["b"])
    np.testing.assert_allclose(out, x @ params["kernel"] + params["bias"][None], rtol=1e-6)
    assert state == ()


def test_paths_name_a_layer_before_its_parts():
    assert list(paths(MODELS["serial"][0])) == [(), ("a",), ("a", "dense"), ("a", "relu"), ("b",)]


def test_under_eval_shape_only_shapes_are_seen():
    seen = []
    jax.eval_shape(lambda: run(fn.serial(fn.dense(7)), lambda path, layer, params, x, out: seen.append(out[0])))
    assert [(y.shape, isinstance(y, jax.core.Tracer)) for y in seen] == [((4, 7), True)] * 2
