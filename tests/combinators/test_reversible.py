"""reversible: against the same block written out, its residuals, memory that does not grow with depth, and refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import funcnet as fn
from tests.trees import normal

KEY = jax.random.key(0)
S = jax.ShapeDtypeStruct
F = fn.serial(fn.layer_norm(), fn.dense(5), fn.tanh(), fn.dense(3))
BLOCK = fn.reversible(F, fn.dense(3))


def drawn(model, x):
    """Params, state and input."""
    params, state = jax.eval_shape(model.init, KEY, x)
    return normal(1, params), normal(2, state), normal(3, x)


def assert_close(got, wanted, **tolerance):
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, **({"rtol": 1e-9, "atol": 1e-11} | tolerance)), got, wanted
    )


def dense(p, x):
    return x @ p["kernel"] + p["bias"][None]


def block(p, x):
    x1, x2 = x if isinstance(x, tuple) else jnp.split(x, 2, axis=-1)
    inner = p["f"]
    centred = (x2 - x2.mean(-1, keepdims=True)) / jnp.sqrt(x2.var(-1, keepdims=True) + 1e-6)
    normed = centred * inner["layer_norm"]["scale"][None] + inner["layer_norm"]["bias"][None]
    y1 = x1 + dense(inner["dense_1"], jnp.tanh(dense(inner["dense"], normed)))
    y2 = x2 + dense(p["g"], y1)
    return (y1, y2) if isinstance(x, tuple) else jnp.concatenate([y1, y2], axis=-1)


def in_turn(p, x):
    for i in range(3):
        x = block(jax.tree.map(lambda leaf, i=i: leaf[i], p), x)
    return x


X = jnp.zeros((4, 6))
CHAIN = fn.serial(a=BLOCK, b=fn.named("renamed", BLOCK))
MODELS = {
    "halves": (BLOCK, X, block),
    "a pair": (BLOCK, (X[:, :3], X[:, :3]), block),
    "repeat": (fn.repeat(BLOCK, 3), X, in_turn),
    "serial": (CHAIN, X, lambda p, x: block(p["b"], block(p["a"], x))),
    "repeat of a serial": (fn.repeat(CHAIN, 1), X, lambda p, x: block(*of(p, "b", block(*of(p, "a", x))))),
}


def of(stacked, name, x):
    return jax.tree.map(lambda leaf: leaf[0], stacked[name]), x


@pytest.mark.parametrize("name", MODELS)
def test_values_and_gradients_are_those_of_the_block_written_out(name, x64):
    model, x, plain = MODELS[name]
    params, state, x = drawn(model, jax.tree.map(lambda leaf: leaf.astype(float), x))

    @jax.jit
    def both(params, x):
        y, _, residuals = model.fwd(params, state, x, None)
        wanted, pull = jax.vjp(plain, params, x)
        dy = jax.tree.map(lambda y: jnp.cos(3 * y), y)
        return (y, model.apply(params, state, x), *model.bwd(params, residuals, dy)), (wanted, wanted, *pull(dy))

    assert_close(*both(params, x))


def floats(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating))


@pytest.mark.parametrize("depth", [1, 5])
def test_a_chain_keeps_one_output_whatever_its_depth(depth):
    """Beside it the state, which is empty here, and keys."""
    x = jnp.ones((4, 6))
    for model in (
        fn.repeat(BLOCK, depth),
        fn.serial(*[BLOCK] * depth),
        fn.repeat(fn.repeat(BLOCK, 2), depth),
        fn.serial(fn.repeat(BLOCK, depth), BLOCK),
        fn.serial(fn.named("a", fn.repeat(fn.named("b", BLOCK), depth)), BLOCK),
    ):
        params, state = jax.eval_shape(model.init, KEY, x)
        assert floats(jax.eval_shape(model.fwd, params, state, x, KEY)[2]) == x.size
        keys = 8 * 2 * (depth + 1)  # at most
        assert fn.summary(model, x).residual_bytes <= 4 * x.size + keys
    mixture = fn.serial(BLOCK, fn.relu(), BLOCK)  # each keeps its own
    params, state = jax.eval_shape(mixture.init, KEY, x)
    assert floats(jax.eval_shape(mixture.fwd, params, state, x, KEY)[2]) == 3 * x.size


def test_compiled_its_memory_does_not_grow_with_depth():
    def temporary(depth):
        model = fn.repeat(fn.reversible(fn.serial(fn.dense(64), fn.tanh(), fn.dense(8)), fn.tanh()), depth)
        x = jax.ShapeDtypeStruct((512, 16), jnp.float32)
        params, state = jax.eval_shape(model.init, KEY, x)

        def gradients(params, x):
            y, _, residuals = model.fwd(params, state, x, None)
            return model.bwd(params, residuals, y)

        return jax.jit(gradients).lower(params, x).compile().memory_analysis().temp_size_in_bytes

    few, many = temporary(2), temporary(12)
    assert many - few < 12 * 4 * 512 * 16 / 4  # a quarter of what the outputs of the ten more blocks would take


def test_what_is_drawn_is_drawn_again_and_a_state_is_updated_once():
    counting = fn.Layer(
        "counting",
        lambda key, x: ({}, jnp.ones(())),
        lambda params, n, x: n * x,
        lambda params, n, x, key: (n * x, n + 1, n),
        lambda params, n, dy, contract=fn.total: ({}, n * dy),
    )
    model = fn.repeat(fn.reversible(fn.serial(fn.dense(3), fn.dropout(0.5)), fn.serial(counting, fn.tanh())), 3)
    params, state, x = drawn(model, X)
    fn.check_layer(model, x, params=params, state=state, oracles=("autodiff", "laws")).raise_for_failure()
    new = model.fwd(params, state, x, KEY)[1]
    np.testing.assert_allclose(new["g"]["counting"], state["g"]["counting"] + 1)


def test_contractions_and_hessian_vector_products_go_through(x64):
    model = fn.repeat(BLOCK, 3)
    params, state, x = drawn(model, X.astype(float))

    def gradient(params, contract=fn.total):
        y, _, residuals = model.fwd(params, state, x, None)
        return model.bwd(params, residuals, jnp.sin(y), contract)[0]

    alone = lambda params, x: jax.grad(lambda p: -jnp.sum(jnp.cos(in_turn(p, x[None]))))(params)
    each = jax.jit(jax.vmap(alone, (None, 0)))(params, x)
    hows = (fn.per_example, fn.squared_norm)
    per_example, squared_norm = jax.jit(lambda params: [gradient(params, how) for how in hows])(params)
    assert_close(per_example, each)
    assert_close(squared_norm, jax.tree.map(lambda leaf: jnp.sum(leaf.reshape(4, -1) ** 2, axis=1), each))
    wanted = jax.grad(lambda p: -jnp.sum(jnp.cos(in_turn(p, x))))
    product = lambda f: jax.jit(lambda params: jax.jvp(f, (params,), (jax.tree.map(jnp.cos, params),))[1])(params)
    assert_close(product(gradient), product(wanted), rtol=1e-8)


def test_it_trains_by_step_and_layerwise_and_can_be_explained():
    small = fn.reversible(fn.dense(2), fn.tanh())
    model = fn.serial(fn.dense(4), fn.repeat(small, 2), fn.serial(small), fn.identity())
    objective, optimizer = fn.objective(model, fn.cross_entropy()), optax.sgd(0.1, momentum=0.9)
    batch = normal(4, jnp.zeros((8, 5))), jnp.arange(8) % 4
    fresh = lambda: fn.init_train_state(objective, optimizer, KEY, batch)
    by_step = fn.train_step(objective, optimizer)(fresh(), batch)[0]
    by_layer = fn.layerwise_step(objective, optimizer)(fresh(), batch)[0]
    assert_close(by_layer.params, by_step.params, rtol=1e-4, atol=1e-6)
    told = fn.explain(objective, by_step.params, by_step.state, batch)
    turns = ["repeat/0/f", "repeat/0/g", "repeat/1/f", "repeat/1/g"]
    assert [step.name for step in told.steps] == [
        "dense",
        *turns,
        "serial/reversible/f",
        "serial/reversible/g",
        "identity",
    ]


REFUSED = {
    "an odd last axis": (lambda: BLOCK.init(KEY, jnp.ones((4, 5))), "whose last axis can be halved"),
    "integers": (lambda: BLOCK.init(KEY, jnp.ones((4, 6), int)), "floating-point array"),
    "three arrays": (lambda: BLOCK.init(KEY, (X, X, X)), "floating-point array"),
    "an f of another size": (lambda: fn.reversible(fn.dense(2), fn.dense(3)).init(KEY, X), "an output of f like"),
    "a g of another size": (lambda: fn.reversible(fn.dense(3), fn.dense(2)).init(KEY, X), "an output of g like"),
    "a g of another rank": (lambda: fn.reversible(fn.tanh(), fn.flatten()).init(KEY, X[None]), "an output of g like"),
    "no layer": (lambda: fn.reversible(fn.relu, fn.relu()), "call its constructor"),
    "params of another model": (
        lambda: BLOCK.apply({"f": {}}, {"f": (), "g": ()}, X),
        r"params for the layers \['f', 'g'\]",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name):
    call, message = REFUSED[name]
    with pytest.raises(fn.InputError, match=message):
        call()


def test_bwd_refuses_other_cotangents_params_and_residuals():
    for model, x in ((BLOCK, X), (BLOCK, (X[:, :3], X[:, :3])), (fn.repeat(BLOCK, 2), X), (CHAIN, X)):
        params, state = model.init(KEY, x)
        y, _, residuals = model.fwd(params, state, x, None)
        with pytest.raises(fn.InputError, match="cotangent"):
            model.bwd(params, residuals, y[:1])
        with pytest.raises(fn.InputError, match="params"):
            model.bwd({}, residuals, y)


def test_errors_inside_name_their_place():
    params, state = BLOCK.init(KEY, X)
    with pytest.raises(fn.InputError) as error:
        fn.serial(body=BLOCK).apply({"body": params}, {"body": state}, jnp.ones((4, 8)))
    assert error.value.path == ("body", "f", "layer_norm")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_does_not_come_back_and_is_refused(dtype):
    for x in (S((4, 6), dtype), (S((4, 3), dtype), S((4, 3), "float32"))):
        with pytest.raises(fn.InputError, match="float32 or float64"):
            fn.reversible(fn.dense(3), fn.dense(3)).init(KEY, x)
    model, x = fn.mixed(fn.reversible(fn.dense(3), fn.dense(3)), compute=dtype), jnp.ones((4, 6))
    with pytest.raises(fn.InputError, match=r"reversible\(mixed\(f\), mixed\(g\)\)"):
        model.fwd(*model.init(KEY, x), x, KEY)
    assert model.apply(*model.init(KEY, x), x).shape == x.shape  # keeps nothing, needs nothing back


def test_of_half_precision_inside_gradients_are_as_of_the_block_that_keeps_its_inputs():
    """x comes back to the rounding of float32, and f and g, run again there, to theirs."""
    inner = fn.mixed(fn.serial(fn.dense(3), fn.tanh()))
    model = fn.repeat(fn.reversible(inner, inner), 3)
    params, state, x = drawn(model, S((4, 6), jnp.float32))
    y, _, residuals = model.fwd(params, state, x, KEY)
    assert {leaf.dtype for leaf in jax.tree.leaves(y)} == {jnp.dtype("float32")}
    got = model.bwd(params, residuals, jnp.cos(y))
    wanted = jax.vjp(lambda params, x: model.apply(params, state, x), params, x)[1](jnp.cos(y))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=0.05 * np.abs(b).max())
