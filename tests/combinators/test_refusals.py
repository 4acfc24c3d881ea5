"""What combinators refuse: the error names the layer by its path, what was expected, what came and the remedy."""

import re

import jax
import jax.numpy as jnp
import pytest

import funcnet as fn
from tests.trees import draw

S = jax.ShapeDtypeStruct
KEY = jax.random.key(0)
MODEL = fn.serial(block=fn.serial(fn.dense(4), fn.relu(), fn.dense(3)), head=fn.dense(2))


def pull(dy):
    def call(params, state, x):
        y, _, residuals = MODEL.fwd(params, state, x, None)
        return MODEL.bwd(params, residuals, dy(y))

    return call


def swap(params, value, *path):
    """params with `value` at `path`."""
    first, *rest = path
    return params | {first: swap(params[first], value, *rest) if rest else value}


REFUSED = {
    "too few features": (lambda p, s, x: MODEL.apply(p, s, x[:, :4]), "block/dense", "5 features", "init"),
    "integer input": (lambda p, s, x: MODEL.apply(p, s, x.astype(int)), "block/dense", "floating", "astype|convert"),
    "empty batch": (lambda p, s, x: MODEL.apply(p, s, x[:0]), "block/dense", "not empty", "empty batch"),
    "no axes": (lambda p, s, x: MODEL.apply(p, s, x[0, 0]), "block/dense", "floating", "axes"),
    "half precision": (lambda p, s, x: MODEL.apply(p, s, x.astype(jnp.bfloat16)), "block/dense", "bfloat16", "mixed"),
    "empty batch at init": (
        lambda p, s, x: MODEL.init(KEY, S((0, 5), jnp.float32)),
        "block/dense",
        "not empty",
        "batch",
    ),
    "integers at init": (lambda p, s, x: MODEL.init(KEY, S((2, 5), jnp.int32)), "block/dense", "floating", "convert"),
    "a kernel of another size": (
        lambda p, s, x: MODEL.apply(swap(p, jnp.ones((4, 9)), "block", "dense_1", "kernel"), s, x),
        "block/dense_1",
        r"kernel: float32\[4, 3\]",
        "init",
    ),
    "a missing bias": (
        lambda p, s, x: MODEL.fwd(swap(p, {"kernel": p["head"]["kernel"]}, "head"), s, x, None),
        "head",
        "bias",
        "init",
    ),
    "a missing layer": (
        lambda p, s, x: MODEL.apply(swap(p, {}, "block"), s, x),
        "block",
        r"\['dense', 'relu', 'dense_1'\]",
        "init",
    ),
    "params of another model": (
        lambda p, s, x: MODEL.fwd(fn.dense(3).init(KEY, x)[0], s, x, None),
        "input",
        r"\['block', 'head'\]",
        "init",
    ),
    "no params": (lambda p, s, x: MODEL.apply(None, s, x), "input", r"\['block', 'head'\]", "init"),
    "cotangent of another shape": (pull(lambda y: y[:, :1]), "head", r"float32\[3, 2\]", "shape"),
    "cotangent of one example": (pull(lambda y: y[0]), "head", r"float32\[3, 2\]", "shape"),
    "cotangent of another dtype": (pull(lambda y: y.astype(jnp.bfloat16)), "head", r"float32\[3, 2\]", "dtype"),
}


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("name", REFUSED)
def test_refusals_name_the_layer_what_was_expected_what_came_and_the_remedy(name, jit):
    call, path, expected, remedy = REFUSED[name]
    params, state, x = draw(MODEL, S((3, 5), jnp.float32))
    with pytest.raises(fn.InputError) as error:
        (jax.jit(call) if jit else call)(params, state, x)
    assert "/".join(error.value.path) == ("" if path == "input" else path)
    where, wanted, received, mend = str(error.value).splitlines()
    assert where == {"input": "serial", "block": "block (serial)", "head": "head (dense)"}.get(path, path)
    assert wanted.startswith("  expected  ")
    assert received.startswith("  received  ")
    assert mend.startswith("  remedy    ")
    assert re.search(expected, wanted)
    assert re.search(remedy, mend)


@pytest.mark.parametrize(
    ("wrap", "path"),
    [
        (lambda layer: fn.serial(body=fn.skip(layer)), "body/dense"),
        (lambda layer: fn.serial(body=fn.repeat(layer, 2)), "body/dense"),
        (lambda layer: fn.serial(fn.remat(layer)), "serial/dense"),
        (lambda layer: fn.serial(fn.mixed(layer)), "serial/dense"),
        (lambda layer: fn.serial(fn.freeze(layer)), "serial/dense"),
        (lambda layer: fn.serial(fn.named("a", layer)), "a/dense"),
        (lambda layer: fn.serial(fn.branch(layer)), "branch/serial/dense"),
        (lambda layer: fn.serial(fn.repeat(fn.skip(fn.remat(fn.serial(deep=layer))), 2)), "repeat/deep/dense"),
    ],
)
def test_the_path_goes_through_transparent_combinators(wrap, path):
    model = wrap(fn.serial(fn.dense(3)))
    params, state = model.init(KEY, S((2, 3), jnp.float32))
    with pytest.raises(fn.InputError) as error:
        model.apply(params, state, jnp.ones((2, 4)))
    assert "/".join(error.value.path) == path


@pytest.mark.parametrize(
    ("model", "x", "message"),
    [
        (fn.skip(fn.dense(2)), S((2, 3), jnp.float32), r"like the input, float32\[2, 3\]"),
        (fn.skip(fn.flatten()), S((2, 1, 1), jnp.float32), r"like the input, float32\[2, 1, 1\]"),
        (fn.repeat(fn.dense(2), 2), S((2, 3), jnp.float32), r"like the input, float32\[2, 3\]"),
        (fn.parallel(fn.relu(), fn.relu()), S((2, 3), jnp.float32), "a tuple of 2 inputs"),
        (fn.parallel(fn.relu(), fn.relu()), (S((2, 3), jnp.float32),), "a tuple of 2 inputs"),
        (fn.parallel(fn.relu()), [S((2, 3), jnp.float32)], "a tuple of 1 inputs"),
    ],
)
def test_init_refuses_an_input_that_does_not_suit_the_combinator(model, x, message):
    with pytest.raises(fn.InputError, match=message):
        model.init(KEY, x)


@pytest.mark.parametrize("combinator", [fn.serial, fn.parallel, fn.branch])
def test_what_is_no_layer_is_refused(combinator):
    for layers, named in (((fn.relu,), {}), ((), {"a": fn.tanh})):
        with pytest.raises(fn.InputError, match=r"call its constructor: (relu|tanh)"):
            combinator(*layers, **named)
    with pytest.raises(fn.InputError, match=r"fn.relu\(\), or fn.from_function\(lambda params, x: relu\(x\)\)"):
        combinator(jax.nn.relu)
    for no_layer in (None, 3, "relu"):
        with pytest.raises(fn.InputError, match="make one, such as dense"):
            combinator(fn.relu(), no_layer)


@pytest.mark.parametrize("state", [(), None, {}, {"block": {}}])
def test_the_state_of_another_model_is_refused(state):
    params, _, x = draw(MODEL, S((3, 5), jnp.float32))
    for call in (lambda: MODEL.apply(params, state, x), lambda: MODEL.fwd(params, state, x, None)):
        with pytest.raises(fn.InputError, match=r"state for the layers \['block', 'head'\]"):
            call()


NO_LAYERS = {
    "skip": fn.skip,
    "repeat": lambda layer: fn.repeat(layer, 2),
    "remat": fn.remat,
    "mixed": fn.mixed,
    "freeze": fn.freeze,
    "named": lambda layer: fn.named("a", layer),
    "branch": fn.branch,
    "tied": lambda layer: fn.tied(layer, {"a/b": "c/d"}),
    "summary": lambda layer: fn.summary(layer, S((2, 3), jnp.float32)),
    "check_layer": lambda layer: fn.check_layer(layer, S((2, 3), jnp.float32)),
}


@pytest.mark.parametrize("name", NO_LAYERS)
def test_a_constructor_instead_of_a_layer_is_refused(name):
    with pytest.raises(fn.InputError, match=r"call its constructor"):
        NO_LAYERS[name](fn.relu)


LONE = {
    "skip": lambda x: fn.skip(fn.dense(5)).init(KEY, x),
    "repeat": lambda x: fn.repeat(fn.dense(5), 2).init(KEY, x),
    "mixed": lambda x: fn.mixed(fn.dense(5), output="bfloat16").init(KEY, x),
    "parallel": lambda x: fn.parallel(fn.relu()).init(KEY, x),
    "serial": lambda x: fn.serial(fn.relu()).apply({}, {}, x),
    "dense": lambda x: fn.dense(5).init(0, x),
    "flatten": lambda x: fn.flatten().fwd({}, (), None, None),
    "layer_norm": lambda x: fn.layer_norm().bwd(
        {"scale": x[0, :1], "bias": x[0]}, fn.layer_norm().fwd({"scale": x[0], "bias": x[0]}, (), x, None)[2], x
    ),
    "mse": lambda x: fn.mse().fwd({}, (), x, None),
    "relu": lambda x: fn.relu().bwd({}, x, None),
}


@pytest.mark.parametrize("name", LONE)
def test_a_lone_layer_that_refuses_names_itself(name):
    with pytest.raises(fn.InputError) as error:
        LONE[name](jnp.ones((2, 3)))
    assert str(error.value).splitlines()[0] == name


def test_bwd_refuses_params_and_residuals_of_another_model():
    params, state, x = draw(MODEL, S((3, 5), jnp.float32))
    y, _, residuals = MODEL.fwd(params, state, x, None)
    for bad_params, bad_residuals in ((params["block"], residuals), (params, residuals["block"])):
        with pytest.raises(fn.InputError, match=r"for the layers \['block', 'head'\]"):
            MODEL.bwd(bad_params, bad_residuals, y)
    deep = fn.repeat(fn.dense(3), 3)
    params, state, x = draw(deep, S((2, 3), jnp.float32))
    y, _, residuals = deep.fwd(params, state, x, None)
    with pytest.raises(fn.InputError, match="a first axis of 3 layers"):
        deep.bwd(jax.tree.map(lambda p: p[:2], params), residuals, y)
