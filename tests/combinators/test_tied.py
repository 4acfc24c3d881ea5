"""tied: against `jax.grad` of a model that uses one array twice, by every contraction, and what it refuses."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import funcnet as fn
from tests.trees import normal

KEY = jax.random.key(0)
V, D = 7, 4
IDS = jnp.array([[1, 4, 1], [0, 6, 6], [3, 3, 3]])
PLAIN = fn.serial(fn.embedding(V, D, dtype=float), fn.skip(fn.serial(fn.dense(D), fn.tanh())), head=fn.dense(V))
LANGUAGE = fn.tied(PLAIN, {"head/kernel": "embedding/embedding.T"})


def drawn(model, x):
    params, state = jax.eval_shape(model.init, KEY, x)
    return normal(1, params), normal(2, state)


def assert_close(got, wanted, **tolerance):
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, **({"rtol": 1e-10, "atol": 1e-12} | tolerance)), got, wanted
    )


def language(params, ids):
    table = params["embedding"]["embedding"]
    h = table[ids]
    inner = params["skip"]["dense"]
    return (h + jnp.tanh(h @ inner["kernel"] + inner["bias"])) @ table.T + params["head"]["bias"]


KERNELS = fn.serial(fn.dense(D), fn.tanh(), fn.dense(D), fn.tanh(), fn.dense(D))
MODELS = {
    "a head": (LANGUAGE, IDS, language),
    "three kernels": (
        fn.tied(KERNELS, {"dense_1/kernel": "dense/kernel.T", "dense_2/kernel": "dense/kernel"}),
        jnp.zeros((3, 2, D)),
        lambda p, x: (
            jnp.tanh(
                jnp.tanh(x @ p["dense"]["kernel"] + p["dense"]["bias"]) @ p["dense"]["kernel"].T + p["dense_1"]["bias"]
            )
            @ p["dense"]["kernel"]
            + p["dense_2"]["bias"]
        ),
    ),
    "many positions": (
        fn.tied(fn.serial(fn.dense(2), fn.dense(2)), {"dense_1/kernel": "dense/kernel", "dense_1/bias": "dense/bias"}),
        jnp.zeros((2, 5, 2)),
        lambda p, x: (
            (x @ p["dense"]["kernel"] + p["dense"]["bias"]) @ p["dense"]["kernel"] + p["dense"]["bias"]
        ),
    ),
    "two lookups": (
        fn.tied(
            fn.serial(fn.branch(a=fn.embedding(V, D, dtype=float), b=fn.embedding(V, D, dtype=float)), fn.concat()),
            {"branch/b/embedding": "branch/a/embedding"},
        ),
        IDS,
        lambda p, ids: jnp.concatenate([p["branch"]["a"]["embedding"][ids]] * 2, axis=-1),
    ),
    "inside a repeat": (
        fn.repeat(fn.tied(fn.serial(fn.dense(D), fn.dense(D)), {"dense_1/kernel": "dense/kernel.T"}), 2),
        jnp.zeros((3, D)),
        lambda p, x: twice(p, x),
    ),
    "within a repeat, from without": (
        fn.tied(
            fn.serial(fn.repeat(fn.serial(fn.dense(D), fn.dense(D)), 2)),
            {"repeat/dense_1/kernel": "repeat/dense/kernel.T"},
        ),
        jnp.zeros((3, D)),
        lambda p, x: twice(p["repeat"], x),
    ),
}  # fmt: skip


def twice(params, x):
    for i in range(2):
        kernel = params["dense"]["kernel"][i]
        x = (x @ kernel + params["dense"]["bias"][i]) @ kernel.T + params["dense_1"]["bias"][i]
    return x


@pytest.mark.parametrize("name", MODELS)
def test_values_gradients_and_those_of_each_example_are_autodiffs(name, x64, standard_promotion):
    model, x, plain = MODELS[name]
    x = normal(3, x.astype(float)) if jnp.issubdtype(x.dtype, jnp.floating) else x
    params, state = drawn(model, x)

    @jax.jit
    def run(params, x):
        y, _, residuals = model.fwd(params, state, x, None)
        dy = jnp.cos(3 * y)
        by = lambda contract: model.bwd(params, residuals, dy, contract)
        pulled = lambda x, dy: jax.vjp(lambda params: plain(params, x[None]), params)[1](dy[None])[0]
        each = jax.vmap(pulled)(x, dy)
        wanted = jax.vjp(lambda params: plain(params, x), params)[1](dy)[0]
        kept = jax.tree.map(fn.total, by(fn.keep)[0], params, is_leaf=fn.is_factor)
        return (y, by(fn.total)[0], kept, by(fn.per_example)[0], by(fn.squared_norm)[0]), (
            plain(params, x),
            wanted,
            wanted,
            each,
        )

    (y, grads, kept, each, squares), wanted = run(params, x)
    assert_close((y, grads, kept, each), wanted)
    norms = lambda leaf: jnp.sum(leaf.reshape(len(leaf), -1) ** 2, axis=1)
    assert_close(squares, jax.tree.map(norms, each), rtol=1e-9)


def test_the_copy_is_not_among_the_params_and_the_source_is_the_embeddings_own_draw():
    params, _ = LANGUAGE.init(KEY, IDS)
    whole, _ = PLAIN.init(KEY, IDS)
    assert params["head"].keys() == {"bias"}
    np.testing.assert_array_equal(params["embedding"]["embedding"], whole["embedding"]["embedding"])
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == fn.summary(LANGUAGE, IDS).parameters


def test_uses_that_cancel_have_a_squared_norm_of_no_less_than_nothing():
    """y = x @ W - x @ W, by two dense layers and a sign: the gradient is 0, and rounding is not below it."""
    negative = fn.elementwise("negative", lambda x: -x, lambda x: -jnp.ones_like(x))
    model = fn.tied(
        fn.serial(fn.branch(a=fn.dense(40), b=fn.serial(fn.dense(40), negative)), fn.add()),
        {"branch/b/dense/kernel": "branch/a/kernel"},
    )
    x = normal(4, jnp.zeros((16, 2, 50), jnp.float32))
    params, state = drawn(model, x)
    y, _, residuals = model.fwd(params, state, x, None)
    squares = model.bwd(params, residuals, normal(5, y), fn.squared_norm)[0]["branch"]["a"]["kernel"]
    assert np.all(squares >= 0)
    assert np.all(squares < 1e-2)


def test_rows_of_a_table_that_is_looked_up_twice_and_of_one_that_is_a_head(x64):
    model, ids, _ = MODELS["two lookups"]
    params, state = drawn(model, ids)
    y, _, residuals = model.fwd(params, state, ids, None)
    table = params["branch"]["a"]["embedding"]
    touched = model.bwd(params, residuals, y, fn.rows)[0]["branch"]["a"]["embedding"]
    assert touched.ids.shape == (2 * ids.size,)
    total = model.bwd(params, residuals, y)[0]["branch"]["a"]["embedding"]
    np.testing.assert_allclose(jnp.zeros_like(table).at[touched.ids].add(touched.rows), total, rtol=1e-12)
    params, state = drawn(LANGUAGE, ids)
    y, _, residuals = LANGUAGE.fwd(params, state, ids, None)
    dense = LANGUAGE.bwd(params, residuals, y, fn.rows)[0]["embedding"]["embedding"]
    np.testing.assert_array_equal(dense, LANGUAGE.bwd(params, residuals, y)[0]["embedding"]["embedding"])


def test_half_precision_uses_are_added_wide():
    """Three uses with the gradient 1 + 2^-8: rounded first, each is 1 in bfloat16; the sum, 3 + 3 2^-8, is 3 + 2^-6."""
    layers = {name: fn.dense(1, use_bias=False) for name in "abc"}
    ties = {"branch/b/kernel": "branch/a/kernel", "branch/c/kernel": "branch/a/kernel"}
    model = fn.tied(fn.serial(fn.branch(**layers), fn.concat()), ties)
    x = jnp.array([[1.0], [2**-8]], jnp.bfloat16)
    params, state = model.init(KEY, x)
    y, _, residuals = model.fwd(params, state, x, None)
    got = model.bwd(params, residuals, jnp.ones_like(y))[0]["branch"]["a"]["kernel"]
    assert got.dtype == jnp.bfloat16
    assert float(got[0, 0]) == 3 + 2**-6


def test_it_trains_with_one_table(standard_promotion):
    model = fn.tied(
        fn.serial(fn.embedding(V, D), fn.layer_norm(), head=fn.dense(V, use_bias=False)),
        {"head/kernel": "embedding/embedding.T"},
    )
    objective = fn.objective(model, fn.cross_entropy())
    optimizer = optax.adamw(1e-1)
    batch = IDS, (IDS + 1) % V
    state = fn.init_train_state(objective, optimizer, KEY, batch)
    step = fn.train_step(objective, optimizer)
    losses = []
    for _ in range(30):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.5 * losses[0]
    assert state.params["model"]["head"] == {}


def test_explain_and_layerwise_step_take_it_whole():
    objective = fn.objective(LANGUAGE, fn.cross_entropy())
    optimizer, batch = optax.sgd(0.1), (IDS, IDS)
    state = fn.init_train_state(objective, optimizer, KEY, batch)
    told = fn.explain(objective, state.params, state.state, batch)
    assert [step.name for step in told.steps] == ["embedding", "skip/dense", "skip/tanh", "head"]
    by_layer = fn.layerwise_step(objective, optimizer)(state, batch)[0].params
    state = fn.init_train_state(objective, optimizer, KEY, batch)
    assert_close(by_layer, fn.train_step(objective, optimizer)(state, batch)[0].params, rtol=1e-5, atol=1e-7)


REFUSED = {
    "no ties": ({}, "ties as a dict"),
    "no dict": (["head/kernel"], "ties as a dict"),
    "no path": ({"head/kernel": 3}, "ties as a dict"),
    "no such layer": ({"tail/kernel": "embedding/embedding.T"}, "begin with a layer's name"),
    "no such parameter": ({"head/weight": "embedding/embedding.T"}, "a parameter head/weight"),
    "a layer": ({"head": "embedding/embedding.T"}, "a parameter head"),
    "other shapes": ({"head/kernel": "embedding/embedding"}, r"a source for head/kernel that is float32\[4, 7\]"),
    "a chain": (
        {"head/kernel": "skip/dense/kernel", "skip/dense/kernel": "embedding/embedding.T"},
        "copies that are no sources",
    ),
    "a transposed bias": ({"skip/dense/bias": "head/bias.T"}, "a matrix at head/bias"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_tied_is_refused_at_the_latest_by_init(name):
    ties, message = REFUSED[name]
    with pytest.raises(fn.InputError, match=message):
        fn.tied(PLAIN, ties).init(KEY, IDS)


def test_a_table_cannot_be_the_copy_of_a_transposed_kernel():
    model = fn.tied(fn.serial(fn.embedding(V, D), head=fn.dense(V)), {"embedding/embedding": "head/kernel.T"})
    params, state = model.init(KEY, IDS)
    y, _, residuals = model.fwd(params, state, IDS, None)
    with pytest.raises(fn.InputError, match="multiplied by at embedding/embedding"):
        model.bwd(params, residuals, y)


def test_a_rule_that_gives_no_factor_is_refused():
    kernel = lambda key, x: {"kernel": jnp.ones((4, 4))}
    careless = fn.stateless("careless", kernel, lambda p, x: (x @ p["kernel"], x), lambda p, x, dy, contract: (p, dy))
    model = fn.tied(fn.serial(a=careless, b=careless), {"b/kernel": "a/kernel"})
    x = jnp.ones((2, 4))
    params, state = model.init(KEY, x)
    with pytest.raises(fn.InputError, match="a factor as the gradient of a/kernel"):
        model.bwd(params, model.fwd(params, state, x, None)[2], x)


def test_params_of_the_model_that_is_not_tied_are_not_lost_silently():
    with pytest.raises(fn.InputError, match="a parameter embedding/embedding"):
        LANGUAGE.apply({"embedding": {}, "skip": {}, "head": {}}, LANGUAGE.init(KEY, IDS)[1], IDS)


def test_params_that_still_hold_the_copy_are_refused():
    params, state = PLAIN.init(KEY, IDS)
    for call in (
        lambda: LANGUAGE.apply(params, state, IDS),
        lambda: LANGUAGE.fwd(params, state, IDS, None),
        lambda: fn.to_torch(LANGUAGE, params, state),
    ):
        with pytest.raises(fn.InputError, match="params without head/kernel, which is embedding/embedding"):
            call()


def test_a_copy_whose_rule_gives_no_factor_is_refused_too():
    kernel = lambda key, x: {"kernel": jnp.ones((4, 4))}
    careless = fn.stateless("careless", kernel, lambda p, x: (x @ p["kernel"], x), lambda p, x, dy, contract: (p, dy))
    model = fn.tied(fn.serial(a=fn.dense(4), b=careless), {"b/kernel": "a/kernel"})
    x = jnp.ones((2, 4))
    params, state = model.init(KEY, x)
    with pytest.raises(fn.InputError, match="a factor as the gradient of b/kernel"):
        model.bwd(params, model.fwd(params, state, x, None)[2], x)


def test_a_use_inside_a_repeat_and_one_outside_are_refused():
    model = fn.serial(fn.dense(8, use_bias=False), fn.repeat(fn.dense(8), 3))
    tied = fn.tied(model, {"repeat/bias": "dense/kernel"})
    x = jnp.ones((4, 3))
    params, state = tied.init(jax.random.key(0), x)
    y, _, residuals = tied.fwd(params, state, x, None)
    with pytest.raises(fn.InputError, match="inside the same repeat"):
        tied.bwd(params, residuals, y)


def test_a_rule_that_was_replaced_is_the_one_that_runs():
    right = fn.serial(a=fn.dense(3, use_bias=False), b=fn.dense(3, use_bias=False))

    def bwd(*args):
        dparams, dx = right.bwd(*args)
        return dparams, -dx

    dxs = []
    for model in (right, replace(right, bwd=bwd)):
        tied = fn.tied(fn.serial(r=model), {"r/b/kernel": "r/a/kernel"})
        params, state = tied.init(jax.random.key(0), jnp.ones((2, 3)))
        y, _, residuals = tied.fwd(params, state, jnp.ones((2, 3)), None)
        dxs.append(tied.bwd(params, residuals, y)[1])
    np.testing.assert_array_equal(dxs[0], -dxs[1])


def test_ties_inside_a_repeat_can_be_explained():
    block = fn.serial(a=fn.dense(6, use_bias=False), b=fn.dense(6, use_bias=False))
    objective = fn.objective(fn.tied(fn.repeat(block, 2), {"b/kernel": "a/kernel.T"}), fn.mse())
    batch = jnp.ones((3, 6)), jnp.zeros((3, 6))
    params, state = objective.init(jax.random.key(0), batch)
    explanation = fn.explain(objective, params, state, batch)
    np.testing.assert_allclose(explanation.loss, fn.value_and_grad(objective)(params, state, batch)[0][0], rtol=1e-6)


@pytest.mark.parametrize("wrap", [fn.skip, fn.remat, fn.mixed, lambda layer: fn.named("other", layer)])
def test_what_is_tied_inside_a_wrapped_repeat_has_its_gradient(wrap):
    block = fn.serial(fn.dense(4), fn.tanh(), fn.dense(4))
    inside = {"b/dense_1/bias": "b/dense/bias", "b/dense_1/kernel": "b/dense/kernel"}
    fn.check_layer(
        fn.tied(fn.serial(b=wrap(fn.repeat(block, 2))), inside), "f32[3,4]", dtype="float32"
    ).raise_for_failure()


def projected(layer):
    """f(x) @ kernel, a combinator with a parameter of its own beside its layer's."""

    def init(key, x):
        params, state = layer.init(key, x)
        return {"layer": params, "kernel": jnp.ones((4, 6), x.dtype)}, {"layer": state}

    def fwd(params, state, x, key):
        h, inner, saved = layer.fwd(params["layer"], state["layer"], x, key)
        return h @ params["kernel"], {"layer": inner}, {"h": h, "layer": saved}

    def bwd(params, saved, dy, contract=fn.total):
        dkernel = contract(fn.Outer(saved["h"], dy), params["kernel"])
        dlayer, dx = layer.bwd(params["layer"], saved["layer"], dy @ params["kernel"].T, contract)
        return {"layer": dlayer, "kernel": dkernel}, dx

    apply = lambda params, state, x: fwd(params, state, x, None)[0]
    made = fn.Composed({"layer": layer}, lambda parts: projected(parts["layer"]))
    return fn.Layer("projected", init, apply, fwd, bwd, made)


def test_a_combinators_own_parameter_can_be_tied():
    model = fn.serial(projected(fn.dense(4)), head=fn.dense(4, use_bias=False))
    fn.check_layer(fn.tied(model, {"head/kernel": "projected/kernel.T"}), "f32[3,5]").raise_for_failure()
