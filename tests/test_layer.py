"""The record of four functions, and the two ways to write one without repeating oneself."""

from dataclasses import FrozenInstanceError, fields

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import funcnet as fn
from funcnet.check.cases import CASES
from funcnet.check.spec import drawn, specs
from funcnet.layer import no_params, output

X = jax.random.normal(jax.random.key(0), (4, 3))


def affine():
    """y = a x + b with one a and b an entry: a layer as a user would write it."""

    def init(key, x):
        return {"scale": jnp.ones(x.shape[-1], x.dtype), "bias": jnp.zeros(x.shape[-1], x.dtype)}

    def bwd(params, x, dy, contract):
        scale, bias = params["scale"], params["bias"]
        return {"scale": contract(fn.Scale(x, dy), scale), "bias": contract(fn.Shift(dy), bias)}, dy * scale[None]

    return fn.stateless("affine", init, lambda params, x: (params["scale"][None] * x + params["bias"][None], x), bwd)


def cube(saves="input"):
    if saves == "input":
        return fn.elementwise("cube", lambda x: x * x * x, lambda x: 3 * x * x)
    return fn.elementwise("cube", lambda x: x * x * x, lambda y: 3 * jnp.cbrt(y) ** 2, "output")


@pytest.mark.parametrize("layer", [affine(), cube(), cube("output")], ids=["affine", "cube of x", "cube of y"])
@pytest.mark.parametrize("shape", [(4, 3), (1, 1)])
def test_a_layer_of_a_users_own_holds_to_the_laws(layer, shape):
    fn.check_layer(layer, jax.ShapeDtypeStruct(shape, jnp.float32)).raise_for_failure()


@pytest.mark.parametrize("name", ["init", "apply", "fwd", "bwd", "parts"])
def test_a_layer_is_behaviour_frozen_and_no_pytree(name):
    layer = affine()
    assert jax.tree.leaves(layer) == [layer]
    assert {layer: name}[layer] == name
    with pytest.raises(FrozenInstanceError):
        setattr(layer, name, None)


def test_a_layer_has_no_parts_and_no_way_to_rebuild_unless_it_says_so():
    layer = affine()
    assert dict(layer.parts) == {}
    assert layer.rebuild is None
    assert layer.structure is None
    assert [field.name for field in fields(layer)] == [
        "name",
        "init",
        "apply",
        "fwd",
        "bwd",
        "made",
        "call",
        "unrounded",
        "reads",
        "writes",
        "passes",
        "positionwise",
    ]


def test_stateless_threads_state_draws_nothing_and_evaluates_as_it_trains():
    layer = affine()
    params, state = layer.init(jax.random.key(0), X)
    y, new_state, _ = layer.fwd(params, state, X, None)
    assert state == new_state == ()
    np.testing.assert_array_equal(layer.apply(params, state, X), y)
    np.testing.assert_array_equal(layer.fwd(params, state, X, jax.random.key(1))[0], y)


def test_stateless_takes_numpy_arrays():
    layer = affine()
    params, state = layer.init(jax.random.key(0), np.asarray(X))
    y, _, residuals = layer.fwd(params, state, np.asarray(X), None)
    assert all(isinstance(leaf, jax.Array) for leaf in (y, residuals))


def test_bwd_contracts_totally_unless_told_otherwise():
    layer = affine()
    params, state = layer.init(jax.random.key(0), X)
    y, _, residuals = layer.fwd(params, state, X, None)
    plain, told = layer.bwd(params, residuals, y)[0], layer.bwd(params, residuals, y, fn.total)[0]
    assert jax.tree.map(jnp.shape, plain) == {"scale": (3,), "bias": (3,)}
    jax.tree.map(np.testing.assert_array_equal, plain, told)
    assert jax.tree.map(jnp.shape, layer.bwd(params, residuals, y, fn.per_example)[0]) == {
        "scale": (4, 3),
        "bias": (4, 3),
    }


@pytest.mark.parametrize(("saves", "saved"), [("input", X), ("output", X**3)])
def test_elementwise_saves_what_it_says(saves, saved):
    y, _, residuals = cube(saves).fwd({}, (), X, None)
    np.testing.assert_allclose(residuals, saved, rtol=1e-6)
    np.testing.assert_allclose(y, X**3, rtol=1e-6)


def test_elementwise_refuses_what_is_not_floating_and_foreign_cotangents():
    with pytest.raises(fn.InputError, match="floating-point"):
        cube().apply({}, (), jnp.arange(3))
    for dy in (jnp.ones((3, 4)), jnp.ones((4, 3), jnp.bfloat16)):
        with pytest.raises(fn.InputError, match="cotangent"):
            cube().bwd({}, X, dy)


def test_no_params():
    assert no_params(None, X) == {}


def test_output_says_shapes_without_computing():
    model = fn.serial(fn.dense(10**6), fn.relu(), fn.dense(10**6))
    x = jax.ShapeDtypeStruct((10**6, 10), jnp.float32)
    params, state = jax.eval_shape(model.init, jax.random.key(0), x)
    y = output(model, params, state, x)
    assert (y.shape, y.dtype) == ((10**6, 10**6), jnp.float32)


def test_integers_that_jax_would_wrap_around_are_refused():
    params, _ = fn.embedding(10, 2).init(jax.random.key(0), jnp.zeros(3, jnp.int32))
    assert fn.embedding(10, 2).apply(params, (), np.array([3])).shape == (1, 2)
    with pytest.raises(fn.InputError, match="integers that fit int32"):
        fn.embedding(10, 2).apply(params, (), np.array([2**32 + 3]))


def test_layers_in_a_list_and_constructors_are_refused_by_name():
    with pytest.raises(fn.InputError, match=r"serial\(\*layers\)"):
        fn.serial([fn.relu(), fn.relu()])
    with pytest.raises(fn.InputError, match=r"dense\(\.\.\), not dense"):
        fn.serial(fn.dense)


class Tensor:
    """An array of another library, which NumPy could convert: its dtype is its own."""

    def __init__(self, like):
        self.shape, self.ndim, self.like = like.shape, len(like.shape), like
        self.dtype = type("dtype", (), {"__str__": lambda self: "torch.float32"})()

    def __array__(self, *args, **kwargs):
        return np.asarray(self.like)


KINDS = {case.constructor: case for case in reversed(CASES) if case.constructor != "batch_norm"}  # it converts them


@pytest.mark.parametrize("kind", KINDS)
def test_every_layer_refuses_the_arrays_of_another_library_with_the_remedy(kind):
    case = KINDS[kind]
    x = jax.tree.map(jnp.asarray, drawn(specs(case.x), 0))
    shapes = jax.eval_shape(case.layer.init, jax.random.key(0), x)
    params, state = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), shapes)
    tensors = jax.tree.map(Tensor, x)
    for use in (lambda: case.layer.apply(params, state, tensors), lambda: case.layer.fwd(params, state, tensors, None)):
        with pytest.raises(fn.InputError, match=r"convert it with x\.numpy"):
            use()


def test_integers_that_a_compiled_function_closes_over_are_looked_at_too():
    ids, layer = np.array([[0, 2]], np.int64), fn.reshape(2, 1)
    np.testing.assert_array_equal(jax.jit(lambda: layer.apply({}, (), ids))(), ids[..., None])
    with pytest.raises(fn.InputError, match="integers that fit int32"):
        jax.jit(lambda: layer.apply({}, (), ids + 2**40))()


@pytest.mark.parametrize("out", [X, (X,), (X, X, X)], ids=["y alone", "one", "three"])
def test_a_fwd_that_returns_no_pair_is_named(out):
    layer = fn.stateless("mine", no_params, lambda params, x: out, lambda *args: ({}, X))
    with pytest.raises(fn.InputError, match=r"(?s)mine.*fwd\(params, x\) -> \(y, residuals\)"):
        layer.apply({}, (), X)


def test_a_record_that_is_none_is_refused():
    with pytest.raises(fn.InputError, match=r"fn\.Composed"):
        fn.Layer("mine", *(lambda *args: None,) * 4, {"a": fn.relu()})
