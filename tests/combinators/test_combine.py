"""Combinators against the plain composition written out, by `jax.vjp`; names, keys, state and refusals."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import funcnet as fn
from tests.trees import normal

S = jax.ShapeDtypeStruct
KEY = jax.random.key(0)


def draw(model, x):
    """Params, state and an input like x."""
    params, state = jax.eval_shape(model.init, KEY, x)
    return normal(1, params), normal(2, state), normal(3, x)


def assert_equal(got, wanted):
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    jax.tree.map(np.testing.assert_array_equal, got, wanted)


def assert_close(got, wanted, **tolerance):
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), got, wanted)


# The chain rule


def dense(p, x):
    return x @ p["kernel"] + p["bias"][None]


def block(p, x):
    return jnp.tanh(dense(p["dense"], x))


def turns(p, n):
    return [jax.tree.map(lambda leaf, i=i: leaf[i], p) for i in range(n)]


def in_turn(f, p, n, x):
    for turn in turns(p, n):
        x = f(turn, x)
    return x


BLOCK = fn.serial(fn.dense(5), fn.tanh())
X = S((3, 5), jnp.float64)
# name: (model, input, the same function in plain JAX)
PLAIN = {
    "serial": (
        fn.serial(fn.dense(4), fn.tanh(), fn.dense(2)),
        X,
        lambda p, x: dense(p["dense_1"], jnp.tanh(dense(p["dense"], x))),
    ),
    "serial of one": (fn.serial(fn.dense(1)), S((1, 1), jnp.float64), lambda p, x: dense(p["dense"], x)),
    "skip": (fn.skip(BLOCK), X, lambda p, x: x + block(p, x)),
    "skip of a skip": (fn.skip(fn.skip(fn.dense(5))), X, lambda p, x: x + (x + dense(p, x))),
    "parallel": (
        fn.parallel(fn.dense(4), BLOCK, last=fn.identity()),
        (X, X, S((2, 7), jnp.float64)),
        lambda p, x: (dense(p["dense"], x[0]), block(p["serial"], x[1]), x[2]),
    ),
    "branch": (
        fn.branch(fn.dense(4), BLOCK, last=fn.identity()),
        X,
        lambda p, x: (dense(p["dense"], x), block(p["serial"], x), x),
    ),
    "branch of a pair": (
        fn.branch(fn.parallel(fn.dense(4), fn.tanh()), b=fn.parallel(fn.tanh(), fn.identity())),
        (X, S((2, 7), jnp.float64)),
        lambda p, x: ((dense(p["parallel"]["dense"], x[0]), jnp.tanh(x[1])), (jnp.tanh(x[0]), x[1])),
    ),
    "repeat": (fn.repeat(BLOCK, 3), X, lambda p, x: in_turn(block, p, 3, x)),
    "repeat once": (fn.repeat(fn.dense(5), 1), X, lambda p, x: in_turn(dense, p, 1, x)),
    "repeat without params": (fn.repeat(fn.tanh(), 2), X, lambda p, x: jnp.tanh(jnp.tanh(x))),
    "repeat of repeat": (
        fn.repeat(fn.skip(fn.repeat(BLOCK, 2)), 3),
        X,
        lambda p, x: in_turn(lambda p, x: x + in_turn(block, p, 2, x), p, 3, x),
    ),
    "repeat of parallel": (
        fn.repeat(fn.parallel(a=fn.dense(5), b=fn.tanh()), 2),
        (X, X),
        lambda p, x: in_turn(lambda p, x: (dense(p["a"], x[0]), jnp.tanh(x[1])), p, 2, x),
    ),
}


@pytest.mark.parametrize("name", PLAIN)
def test_values_and_gradients_are_those_of_the_plain_composition(name, x64):
    model, x, plain = PLAIN[name]
    params, state, x = draw(model, x)

    @jax.jit
    def both(params, x):
        y, new_state, residuals = model.fwd(params, state, x, None)
        wanted, pullback = jax.vjp(plain, params, x)
        dy = normal(4, wanted)
        return (
            (y, model.apply(params, state, x), *model.bwd(params, residuals, dy)),
            (wanted, wanted, *pullback(dy)),
            new_state,
        )

    got, wanted, new_state = both(params, x)
    assert jax.tree.structure(new_state) == jax.tree.structure(state)
    assert_close(got, wanted, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("where", ["front", "back", "both"])
def test_nesting_serial_changes_nothing_but_names(where, x64):
    a, b, c = fn.dense(4), fn.gelu(), fn.dense(2)
    flat = fn.serial(a=a, b=b, c=c)
    nested = {
        "front": fn.serial(ab=fn.serial(a=a, b=b), c=c),
        "back": fn.serial(a=a, bc=fn.serial(b=b, c=c)),
        "both": fn.serial(all=fn.serial(a=fn.serial(a=a), bc=fn.serial(b=b, c=c))),
    }[where]
    params, state, x = draw(flat, X)

    def renamed(p):
        front, back = {"a": p["a"], "b": p["b"]}, {"b": p["b"], "c": p["c"]}
        return {
            "front": {"ab": front, "c": p["c"]},
            "back": {"a": p["a"], "bc": back},
            "both": {"all": {"a": {"a": p["a"]}, "bc": back}},
        }[where]

    y, _, residuals = flat.fwd(params, state, x, None)
    z, _, nested_residuals = nested.fwd(renamed(params), renamed(state), x, None)
    assert_equal(z, y)
    dparams, dx = flat.bwd(params, residuals, jnp.cos(y))
    assert_equal(nested.bwd(renamed(params), nested_residuals, jnp.cos(y)), (renamed(dparams), dx))


EVERYTHING = fn.serial(
    fn.dense(4),
    fn.layer_norm(),
    fn.repeat(fn.skip(fn.serial(fn.rms_norm(), fn.dense(4), fn.gelu(), fn.dropout(0.3))), 2),
    fn.remat(fn.serial(fn.dense(6), fn.silu(), fn.dropout(0.2))),
    out=fn.dense(3),
)


def test_a_model_of_every_combinator_holds_to_the_laws():
    params, state, x = draw(EVERYTHING, S((3, 5), jnp.float32))
    fn.check_layer(EVERYTHING, x, params=params, state=state).raise_for_failure()


def test_forward_mode_through_the_backward_pass_gives_hessian_vector_products(x64):
    params, state, x = draw(EVERYTHING, X)
    params, state = {"model": params, "loss": {}}, {"model": state, "loss": ()}
    run = fn.value_and_grad(fn.objective(EVERYTHING, fn.cross_entropy()))
    batch = x, jnp.array([0, 2, 1])
    by_hand = lambda params: run(params, state, batch, KEY)[1]
    automatic = jax.grad(lambda params: run(params, state, batch, KEY)[0][0])

    @jax.jit
    def products(params, v):
        return [jax.jvp(gradient, (params,), (v,))[1] for gradient in (by_hand, automatic)]

    got, wanted = products(params, normal(5, params))
    assert_close(got, wanted, rtol=1e-9, atol=1e-12)
    assert all(np.abs(leaf).max() > 1e-6 for leaf in jax.tree.leaves(wanted))


# Names and parts


@pytest.mark.parametrize("combinator", [fn.serial, fn.parallel, fn.branch])
@pytest.mark.parametrize(
    ("layers", "named", "expected"),
    [
        ([fn.dense(3)], {}, ["dense"]),
        ([fn.dense(3), fn.relu(), fn.dense(3)], {}, ["dense", "relu", "dense_1"]),
        ([fn.dense(3)] * 12, {}, ["dense", *(f"dense_{i}" for i in range(1, 12))]),
        ([fn.dense(3), fn.skip(fn.dense(3))], {"head": fn.dense(3)}, ["dense", "skip", "head"]),
        ([], {"b": fn.dense(3), "a": fn.dense(3)}, ["b", "a"]),
        ([fn.repeat(fn.relu(), 2), fn.serial(fn.relu()), fn.serial(fn.relu())], {}, ["repeat", "serial", "serial_1"]),
        ([fn.remat(fn.dense(3)), fn.mixed(fn.dense(3))], {}, ["dense", "dense_1"]),
    ],
)
def test_names_are_the_kinds_numbered_when_repeated_and_then_the_given_ones(combinator, layers, named, expected):
    model = combinator(*layers, **named)
    assert list(model.parts) == expected
    x = S((2, 3), jnp.float32)
    params, state = jax.eval_shape(model.init, KEY, (x,) * len(expected) if combinator is fn.parallel else x)
    assert set(params) == set(state) == set(expected)


@pytest.mark.parametrize("combinator", [fn.serial, fn.parallel, fn.branch])
@pytest.mark.parametrize(
    ("layers", "named", "message"),
    [
        ([], {}, "at least one layer"),
        ([fn.dense(3)], {"dense": fn.dense(3)}, r"\['dense'\] twice"),
        ([fn.dense(3)] * 2, {"dense_1": fn.dense(3)}, r"\['dense_1'\] twice"),
    ],
)
def test_no_layers_and_clashing_names_are_refused(combinator, layers, named, message):
    with pytest.raises(fn.InputError, match=message):
        combinator(*layers, **named)


TWO = (S((3, 5), jnp.float32),) * 2


def everything(model, params, state, x):
    """What each function of a model returns."""
    y, new_state, residuals = model.fwd(params, state, x, KEY)
    return model.init(KEY, x), model.apply(params, state, x), y, new_state, residuals, model.bwd(params, residuals, y)


@pytest.mark.parametrize(
    ("model", "x"),
    [
        (fn.serial(fn.dense(4), fn.dense(3)), TWO[0]),
        (fn.parallel(fn.dense(4), tanh=fn.tanh()), TWO),
        (fn.branch(fn.dense(4), tanh=fn.tanh()), TWO[0]),
        (fn.skip(BLOCK), TWO[0]),
        (fn.skip(BLOCK, fn.dense(5)), TWO[0]),
        (fn.repeat(BLOCK, 2), TWO[0]),
        (fn.remat(BLOCK), TWO[0]),
        (fn.mixed(BLOCK), TWO[0]),
        (fn.freeze(BLOCK), TWO[0]),
        (fn.named("a", BLOCK), TWO[0]),
        (fn.reversible(fn.dense(5), fn.tanh()), TWO),
        (fn.tied(fn.serial(a=fn.dense(5), b=fn.dense(5)), {"b/kernel": "a/kernel"}), TWO[0]),
    ],
    ids=(
        [
            "serial",
            "parallel",
            "branch",
            "skip",
            "skip_with_a_shortcut",
            "repeat",
            "remat",
            "mixed",
            "freeze",
            "named",
            "reversible",
            "tied",
        ]
    ),
)
def test_rebuilt_of_its_own_parts_a_combinator_is_the_same(model, x):
    rebuilt = model.rebuild(model.parts)
    assert (rebuilt.name, list(rebuilt.parts)) == (model.name, list(model.parts))
    params, state, x = draw(model, x)
    program = lambda model: str(jax.make_jaxpr(lambda *args: everything(model, *args))(params, state, x))
    assert program(rebuilt) == program(model)


@pytest.mark.parametrize(
    "wrap",
    [fn.skip, fn.remat, fn.mixed, fn.freeze, lambda layer: fn.named("a", layer), lambda layer: fn.repeat(layer, 2)],
)
def test_rebuilt_of_other_parts_a_combinator_runs_those(wrap):
    others = {"dense": fn.dense(5, use_bias=False), "tanh": fn.gelu()}
    rebuilt, wanted = wrap(BLOCK).rebuild(others), wrap(fn.serial(**others))
    assert dict(rebuilt.parts) == others
    params, state, x = draw(wanted, TWO[0])
    program = lambda model: str(jax.make_jaxpr(lambda *args: everything(model, *args))(params, state, x))
    assert program(rebuilt) == program(wanted) != program(wrap(fn.serial(dense=others["dense"], tanh=fn.tanh())))
    assert wrap(fn.dense(5)).rebuild is None


# Keys and state


def recording():
    """y = x, keeping the key that fwd was given."""
    return fn.Layer(
        "recording",
        lambda key, x: ({}, ()),
        lambda p, s, x: x,
        lambda p, s, x, key: (x, s, key),
        lambda p, r, dy, c=None: ({}, dy),
    )


def counting():
    """y = (1 + n) x, n the state, which grows by one with each call."""
    factor = lambda n, x: (1 + n).astype(x.dtype)
    return fn.Layer(
        "counting",
        lambda key, x: ({}, jnp.zeros((), jnp.int32)),
        lambda params, n, x: factor(n, x) * x,
        lambda params, n, x, key: (factor(n, x) * x, n + 1, factor(n, x)),
        lambda params, saved, dy, contract=fn.total: ({}, saved * dy),
    )


def folded(*path):
    key = KEY
    for i in path:
        key = jax.random.fold_in(key, i)
    return jax.random.key_data(key).tolist()


@pytest.mark.parametrize(
    ("model", "inputs", "expected"),
    [
        (fn.serial(a=recording(), b=recording()), 1, {"a": folded(0), "b": folded(1)}),
        (fn.serial(fn.dense(2), b=fn.serial(fn.relu(), c=recording())), 1, {"c": folded(1, 1)}),
        (fn.parallel(a=recording(), b=recording()), 2, {"a": folded(0), "b": folded(1)}),
        (fn.branch(a=recording(), b=recording()), 1, {"a": folded(0), "b": folded(1)}),
        (fn.skip(fn.serial(a=recording())), 1, {"a": folded(0)}),
        (fn.repeat(recording(), 2), 1, {"": [folded(0), folded(1)]}),
        (fn.serial(a=fn.repeat(fn.serial(b=recording()), 2)), 1, {"b": [folded(0, 0, 0), folded(0, 1, 0)]}),
        (fn.remat(recording()), 1, {".key": folded()}),
        (fn.mixed(fn.serial(a=recording())), 1, {"a": folded(0)}),
    ],
)
def test_child_i_draws_from_the_ith_fold_of_the_key(model, inputs, expected):
    x = jnp.ones((3, 2)) if inputs == 1 else (jnp.ones((3, 2)),) * inputs
    residuals = model.fwd(*model.init(KEY, x), x, KEY)[2]
    keys = {
        jax.tree_util.keystr(path).split("['")[-1].removesuffix("']"): jax.random.key_data(leaf).tolist()
        for path, leaf in jax.tree.leaves_with_path(residuals)
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    }
    assert keys == expected


def test_init_draws_each_child_from_its_own_fold_of_the_key():
    x = S((2, 3), jnp.float32)
    params = fn.serial(a=fn.dense(3), b=fn.dense(3), c=fn.repeat(fn.dense(3), 2)).init(KEY, x)[0]
    alone = lambda *path: fn.dense(3).init(jax.random.wrap_key_data(jnp.array(folded(*path), jnp.uint32)), x)[0]
    assert_equal(params["a"], alone(0))
    assert_equal(params["b"], alone(1))
    assert_equal(turns(params["c"], 2), [alone(2, 0), alone(2, 1)])


def test_appending_a_layer_leaves_earlier_draws_alone():
    layers = fn.dense(4), fn.dropout(0.5)
    short, long = fn.serial(*layers), fn.serial(*layers, fn.identity(), fn.dropout(0.0))
    x = jnp.ones((8, 3))
    params, state = short.init(KEY, x)
    long_params, long_state = long.init(KEY, x)
    assert_equal({name: long_params[name] for name in params}, params)
    assert_equal(long.fwd(long_params, long_state, x, KEY)[0], short.fwd(params, state, x, KEY)[0])


def test_adding_a_turn_to_repeat_leaves_earlier_turns_alone():
    x = S((2, 3), jnp.float32)
    two, three = (fn.repeat(fn.dense(3), times).init(KEY, x)[0] for times in (2, 3))
    assert_equal(turns(three, 2), turns(two, 2))


STATEFUL = {
    "serial": (fn.serial(counting(), fn.tanh(), counting()), TWO[0]),
    "skip": (fn.skip(fn.serial(fn.dense(5), counting())), TWO[0]),
    "repeat": (fn.repeat(fn.serial(counting(), fn.tanh()), 3), TWO[0]),
    "parallel": (fn.parallel(counting(), counting()), TWO),
    "remat": (fn.remat(fn.serial(counting(), fn.tanh(), counting())), TWO[0]),
    "branch": (fn.branch(counting(), fn.serial(fn.tanh(), counting())), TWO[0]),
}


@pytest.mark.parametrize("name", STATEFUL)
def test_state_is_threaded_and_bwd_differentiates_at_the_state_that_fwd_had(name):
    model, x = STATEFUL[name]
    params, state, x = draw(model, x)
    state = jax.tree.map(lambda n: n + 2, state)
    fn.check_layer(model, x, params=params, state=state).raise_for_failure()
    y, new_state, _ = model.fwd(params, state, x, None)
    assert_equal(new_state, jax.tree.map(lambda n: n + 1, state))
    assert_close(model.apply(params, state, x), y, rtol=1e-6)


def test_repeat_stacks_params_state_and_residuals_along_a_first_axis():
    model = fn.repeat(fn.serial(fn.dense(5), counting(), fn.tanh()), 3)
    params, state, x = draw(model, S((2, 5), jnp.float32))
    residuals = model.fwd(params, state, x, None)[2]
    assert params["dense"]["kernel"].shape == (3, 5, 5)
    assert state["counting"].shape == (3,)
    assert residuals["tanh"].shape == (3, 2, 5)


def test_repeat_keeps_an_array_once_that_two_layers_save():
    """tanh saves its output, which is the next layer's input."""
    model = fn.repeat(fn.serial(fn.tanh(), fn.dense(5)), 3)
    params, state, x = draw(model, S((2, 5), jnp.float32))
    residuals = model.fwd(params, state, x, None)[2]
    assert residuals["tanh"] is residuals["dense"]


def test_repeat_compiles_one_copy_of_its_layer():
    """A scan: the program is the same however often the layer is repeated."""

    def operations(times):
        model = fn.repeat(BLOCK, times)
        params, state, x = draw(model, S((2, 5), jnp.float32))

        def gradients(params, x):
            y, _, residuals = model.fwd(params, state, x, None)
            return model.bwd(params, residuals, y)

        return str(jax.make_jaxpr(gradients)(params, x)).count("dot_general")

    assert operations(7) == operations(2) == 3


# Refusals

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


def test_the_path_in_parallel():
    model = fn.parallel(a=fn.relu(), b=fn.dense(2))
    params, state = model.init(KEY, (S((2, 3), jnp.float32),) * 2)
    with pytest.raises(fn.InputError) as error:
        model.apply(params, state, (jnp.ones((2, 3)), jnp.ones((2, 4))))
    assert error.value.path == ("b",)


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


def test_skip_refuses_integers():
    with pytest.raises(fn.InputError, match="floating"):
        fn.skip(fn.flatten()).apply({}, (), jnp.ones((2, 3), jnp.int32))


def test_skip_takes_numpys_float64_for_jaxs_float32():
    model = fn.skip(fn.serial(fn.layer_norm(), fn.dense(3)))
    params, state = model.init(KEY, np.ones((2, 3)))
    assert model.apply(params, state, np.ones((2, 3))).dtype == jnp.float32


@pytest.mark.parametrize("call", ["apply", "fwd", "bwd"])
def test_parallel_refuses_another_number_of_entries(call):
    model = fn.parallel(fn.relu(), fn.relu())
    params, state = model.init(KEY, (S((2, 3), jnp.float32),) * 2)
    one = (jnp.ones((2, 3)),)
    calls = {
        "apply": lambda: model.apply(params, state, one),
        "fwd": lambda: model.fwd(params, state, one, None),
        "bwd": lambda: model.bwd(params, model.fwd(params, state, one * 2, None)[2], one),
    }
    with pytest.raises(fn.InputError, match="a tuple of 2 " + ("cotangents" if call == "bwd" else "inputs")):
        calls[call]()


@pytest.mark.parametrize("times", [0, -1, 2.0])
def test_repeat_refuses_no_times(times):
    with pytest.raises(fn.InputError, match="times as a positive whole number"):
        fn.repeat(fn.relu(), times)


def test_repeat_refuses_the_params_of_another_number_of_turns():
    x = jnp.ones((2, 3))
    params, state = fn.repeat(fn.dense(3), 2).init(KEY, x)
    for call in (
        lambda: fn.repeat(fn.dense(3), 3).apply(params, state, x),
        lambda: fn.repeat(fn.dense(3), 3).fwd(params, state, x, None),
    ):
        with pytest.raises(fn.InputError, match="a first axis of 3 layers"):
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


def test_a_shortcut_is_added_in_the_place_of_the_input(x64):
    model = fn.skip(fn.serial(fn.dense(4), fn.tanh()), fn.dense(4, use_bias=False))
    params, state, x = draw(model, S((3, 5), jnp.float64))
    y, _, residuals = model.fwd(params, state, x, None)
    wanted = x @ params["shortcut"]["kernel"] + model.parts["main"].apply(params["main"], state["main"], x)
    np.testing.assert_allclose(y, wanted, rtol=1e-12)
    dparams, dx = model.bwd(params, residuals, y)
    assert set(dparams) == {"main", "shortcut"}
    grads = jax.grad(lambda params, x: jnp.vdot(model.apply(params, state, x), y), (0, 1))(params, x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10), (dparams, dx), grads)
    with pytest.raises(fn.InputError, match=r"(?s)output like the shortcut's output, float64\[3, 4\].*float64\[3, 5\]"):
        fn.skip(fn.dense(5), fn.dense(4)).init(KEY, x)


def test_a_state_of_another_depth_is_refused():
    x = jnp.ones((2, 6))
    _, of_two = fn.repeat(fn.freeze(fn.dense(6)), 2).init(KEY, x)
    with pytest.raises(fn.InputError, match="state stacked along a first axis of 3 layers"):
        fn.repeat(fn.freeze(fn.dense(6)), 3).apply({}, of_two, x)
