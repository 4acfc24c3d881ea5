"""Side inputs through a whole model: what reads them has them, what does not passes them on."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import funcnet as fn

KEY = jax.random.key(0)
T, LENGTHS = 6, [6, 3, 1]
IDS = np.random.default_rng(0).integers(1, 11, (3, T)).astype(np.int32)
PADDED = {"x": np.where(np.arange(T) < np.array(LENGTHS)[:, None], IDS, 0), "lengths": np.int32(LENGTHS)}
BLOCK = fn.transformer_block(8, 2)
TOKENS = fn.serial(fn.embedding(11, 8), fn.position_embedding(T))

WRAPPED = {
    "plain": BLOCK,
    "repeat": fn.repeat(BLOCK, 2),
    "remat": fn.repeat(fn.remat(BLOCK), 2),
    "named": fn.named("other", BLOCK),
    "freeze": fn.freeze(BLOCK),
    "mixed": fn.mixed(BLOCK, compute="float32", keep=("mlp",)),
    "weight_norm": fn.weight_norm(fn.repeat(BLOCK, 2)),
    "spectral_norm": fn.spectral_norm(BLOCK),
    "skip": fn.skip(fn.serial(fn.layer_norm(), fn.attention(2))),
    "shortcut": fn.skip(fn.attention(2), fn.dense(8)),
    "branch": fn.serial(fn.branch(fn.attention(2), fn.dense(8)), fn.add()),
    "one layer": fn.remat(fn.attention(2)),
    "recurrent": fn.serial(
        fn.lstm(8), fn.layer_norm(), fn.bidirectional(fn.gru(4), fn.serial(fn.gru(4, reverse=True)))
    ),
    "stacked": fn.stacked(fn.serial(fn.gru(8), fn.dropout(0.0)), fn.lstm(8)),
}


def model_of(inner):
    return fn.serial(TOKENS, inner, fn.layer_norm(), fn.select(), fn.dense(3))


@pytest.mark.parametrize("name", WRAPPED)
def test_what_pads_a_batch_changes_nothing(name):
    """The valid positions of each example are those of the example alone, without padding; so are the gradients."""
    model = model_of(WRAPPED[name])
    params, state = model.init(KEY, PADDED)
    dy = np.random.default_rng(1).standard_normal((3, T, 3)).astype(np.float32)
    dy = np.where(np.arange(T)[:, None] < np.array(LENGTHS)[:, None, None], dy, 0)

    def run(x, dy):
        y, _, residuals = model.fwd(params, state, x, KEY)
        return y, model.apply(params, state, x), model.bwd(params, residuals, dy)

    y, applied, (dparams, dx) = jax.jit(run)(PADDED, dy)
    assert dx == {"x": None, "lengths": None}
    alone = [jax.jit(run)({"x": IDS[i : i + 1, :n]}, dy[i : i + 1, :n]) for i, n in enumerate(LENGTHS)]
    for i, (n, (own, own_applied, _)) in enumerate(zip(LENGTHS, alone, strict=True)):
        np.testing.assert_allclose(y[i, :n], own[0], rtol=2e-4, atol=2e-5)
        np.testing.assert_allclose(applied[i, :n], own_applied[0], rtol=2e-4, atol=2e-5)
    summed = jax.tree.map(lambda *grads: sum(grads), *(grads for *_, (grads, _) in alone))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-4), dparams, summed)


ATTEND = fn.skip(fn.serial(fn.layer_norm(), fn.attention(2)))


@pytest.mark.parametrize(
    ("model", "x"),
    [
        (fn.repeat(ATTEND, 2), {"x": "f32[2,3,4]", "bias": "f32[2,3,3]", "other": "f32[2,5]"}),
        (fn.serial(ATTEND, fn.remat(ATTEND)), {"x": "f32[2,3,4]", "context": "f32[2,5,4]", "lengths": "i32[2]<6"}),
        (fn.serial(fn.branch(fn.attention(2), ATTEND), fn.add()), {"x": "f32[2,3,4]", "bias": "f32[2,3,3]"}),
        (fn.skip(ATTEND, fn.attention(2)), {"x": "f32[2,3,4]", "bias": "f32[2,3,3]"}),
        (fn.serial(fn.dense(4), fn.select("mask"), fn.dense(2)), {"x": "f32[2,3]", "mask": "f32[2,5]"}),
    ],
    ids=["repeat", "cross attention twice", "branch", "shortcut", "select another"],
)
def test_a_side_that_several_layers_read_has_the_sum_of_their_cotangents(model, x):
    fn.check_layer(model, x).raise_for_failure()


def test_a_layer_of_ones_own_reads_what_it_says():
    def bwd(params, given, dy, contract):
        return {}, {"x": dy * given["gain"], "gain": jnp.sum(dy * given["x"], axis=1, keepdims=True)}

    scaled = fn.stateless("scaled", lambda key, x: {}, lambda params, x: (x["x"] * x["gain"], x), bwd, reads=("gain",))
    model = fn.serial(fn.dense(3), scaled, fn.repeat(fn.serial(fn.dense(3), scaled), 2), fn.select())
    assert model.reads == ("gain",)
    fn.check_layer(model, {"x": "f32[4,2]", "gain": "f32[4,1]"}).raise_for_failure()


def test_a_side_of_nearly_the_name_of_one_that_is_read_is_refused():
    model = model_of(BLOCK)
    with pytest.raises(fn.InputError, match=r"(?s)a side input named lengths.*one named lenghts"):
        model.init(KEY, {"x": IDS, "lenghts": PADDED["lengths"]})
    params, state = model.init(KEY, PADDED)
    for run in (model.apply, lambda params, state, x: model.fwd(params, state, x, None)):
        with pytest.raises(fn.InputError, match="named lengths"):
            run(params, state, {"x": IDS, "lengts": PADDED["lengths"]})
    other = model.apply(params, state, {**PADDED, "user": np.arange(3)})  # what nobody reads passes through
    np.testing.assert_array_equal(other, model.apply(params, state, PADDED))
    with pytest.raises(fn.InputError, match="a dict with x"):
        model.apply(params, state, IDS)


def test_a_name_that_a_layer_outside_reads_is_none_that_is_misspelt_inside():
    def bwd(params, given, dy, contract):
        return {}, {"x": dy + 0 * given["biases"], "biases": dy}

    adding = fn.stateless(
        "adding", lambda key, x: {}, lambda params, x: (x["x"] + x["biases"], x), bwd, reads=("biases",)
    )
    inner = fn.remat(fn.serial(fn.attention(2), fn.dense(4)))  # which reads bias
    model = fn.serial(adding, inner, fn.repeat(inner, 2), fn.select())
    fn.check_layer(model, {"x": "f32[2,3,4]", "biases": "f32[2,3,4]"}).raise_for_failure()


def test_training_layer_by_layer_and_whole_explained_and_summarised():
    objective, optimizer = (
        fn.objective(model_of(fn.repeat(BLOCK, 2)), fn.cross_entropy(ignore_index=-1)),
        optax.sgd(0.1),
    )
    batch = PADDED, np.where(PADDED["x"] > 0, IDS % 3, -1)
    steps = fn.train_step(objective, optimizer), fn.layerwise_step(objective, optimizer)
    one, other = (step(fn.init_train_state(objective, optimizer, KEY, batch), batch)[0] for step in steps)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), one.params, other.params)
    params, state = objective.init(KEY, batch)
    explained = fn.explain(objective, params, state, batch)
    assert "repeat/1/attention/attention" in {step.name for step in explained.steps}
    assert "lengths" in str(fn.summary(objective.model, PADDED))


def test_a_loss_of_a_model_that_was_not_ended_says_how_to():
    objective = fn.objective(fn.serial(fn.embedding(11, 3), fn.dense(3)), fn.cross_entropy())
    with pytest.raises(fn.InputError, match=r"fn.select\(\)"):
        objective.init(KEY, (PADDED, IDS % 3))


def test_reversible_layers_refuse_sides_rather_than_leave_them_out():
    layer = fn.repeat(fn.reversible(fn.attention(2), fn.dense(4)), 2)
    with pytest.raises(fn.InputError):
        layer.init(KEY, {"x": np.ones((2, 3, 8), np.float32), "lengths": np.int32([3, 1])})


def test_a_cotangent_without_the_sides_is_refused_with_a_remedy():
    model = fn.serial(fn.attention(2), fn.dense(8))
    x = {"x": np.ones((3, T, 8), np.float32), "lengths": PADDED["lengths"]}
    params, state = model.init(KEY, x)
    y, _, residuals = model.fwd(params, state, x, None)
    for dy in (y["x"], {"x": y["x"]}):
        with pytest.raises(fn.InputError, match=r"(?s)cotangents of x and of the sides.*fn.select"):
            model.bwd(params, residuals, dy)
    assert model.bwd(params, residuals, {"x": y["x"], "lengths": None})[1]["lengths"] is None


def test_names_are_looked_at_again_after_what_is_run_anew_in_a_backward_pass():
    model = model_of(fn.remat(BLOCK))
    params, state = model.init(KEY, PADDED)
    y, _, residuals = model.fwd(params, state, PADDED, None)
    model.bwd(params, residuals, y)
    with pytest.raises(fn.InputError, match="named lengths"):
        model.apply(params, state, {"x": IDS, "lenghts": PADDED["lengths"]})


# A layer of one's own that reads and writes a side

COUNTED = {"x": np.ones((2, 3, 4), np.float32), "count": np.float32([1, 2])}


def counting(fwd=lambda x: {"x": 2 * x["x"], "count": x["count"] + 1}, bwd=None, **sides):
    """y = 2 x, and 1 is added to the count."""
    back = bwd or (lambda dy: {**dy, "x": 2 * dy["x"]})
    functions = lambda key, x: {}, lambda p, x: (fwd(x), ()), lambda p, saved, dy, contract: ({}, back(dy))
    return fn.stateless("counting", *functions, **{"reads": ("count",), "writes": ("count",)} | sides)


def scaling(bwd=lambda x, dy: {"x": dy * x["count"][:, None, None], "count": jnp.sum(dy * x["x"], axis=(1, 2))}):
    """y = count x, which only reads it."""
    fwd = lambda params, x: (x["x"] * x["count"][:, None, None], x)
    return fn.stateless("scaling", lambda key, x: {}, fwd, lambda p, x, dy, c: ({}, bwd(x, dy)), reads=("count",))


def test_a_layer_of_ones_own_reads_and_writes_a_side(x64):
    model = fn.serial(fn.dense(4), counting(), fn.repeat(fn.serial(fn.dense(4), counting()), 2), scaling(), fn.tanh())
    x = {name: side.astype(np.float64) for name, side in COUNTED.items()}
    params, state = model.init(KEY, x)
    np.testing.assert_array_equal(model.apply(params, state, x)["count"], [4, 5])
    fn.check_layer(model, x, params=params, state=state).raise_for_failure()


X, COUNT = COUNTED["x"], COUNTED["count"]
WRONG_FORWARD = {
    "x alone": (counting(lambda x: x["x"]), "counting to return a dict of x and count"),
    "no x": (counting(lambda x: {"count": x["count"]}), "counting to return a dict of x and count"),
    "one more": (counting(lambda x: {**x, "other": x["count"]}), "counting to return a dict of x and count"),
    "not said": (counting(lambda x: dict(x), writes=()), "counting to return x alone"),
    "shape": (counting(lambda x: {**x, "count": x["count"][:1]}), r"count like the input's, float32\[2\]"),
    "dtype": (counting(lambda x: {**x, "count": x["count"].astype(int)}), r"count like the input's, float32\[2\]"),
}


@pytest.mark.parametrize("wrap", [fn.serial, fn.skip, lambda layer: fn.repeat(layer, 2)], ids=["serial", "skip", "2"])
@pytest.mark.parametrize("name", WRONG_FORWARD)
def test_what_a_layer_returns_beside_x_is_what_it_says(name, wrap):
    layer, message = WRONG_FORWARD[name]
    model = wrap(fn.serial(layer))
    with pytest.raises(fn.InputError, match=message):
        jax.eval_shape(lambda x: model.fwd(*model.init(KEY, x), x, None), COUNTED)


WRONG_BACKWARD = {
    "x alone": scaling(lambda x, dy: dy),
    "no count": scaling(lambda x, dy: {"x": dy}),
    "another": scaling(lambda x, dy: {"x": dy, "other": dy}),
    "of a writer": counting(bwd=lambda dy: dy["x"]),
    "None": scaling(lambda x, dy: {"x": dy, "count": None}),
    "shape": scaling(lambda x, dy: {"x": dy, "count": x["count"][:1]}),
}


@pytest.mark.parametrize("name", WRONG_BACKWARD)
def test_bwd_returns_the_cotangents_of_what_is_read(name):
    model = fn.serial(fn.dense(4), WRONG_BACKWARD[name])
    params, state = model.init(KEY, COUNTED)
    y, _, residuals = model.fwd(params, state, COUNTED, None)
    with pytest.raises(fn.InputError, match=r"bwd of \w+ to return a (dict of x and count|cotangent of count)"):
        model.bwd(params, residuals, y)


def test_integers_have_the_cotangent_none():
    model, x = fn.serial(fn.attention(2)), {"x": X, "lengths": np.int32([3, 1])}
    params, state = model.init(KEY, x)
    y, _, residuals = model.fwd(params, state, x, None)
    with pytest.raises(fn.InputError, match="None as the cotangent of lengths"):
        model.bwd(params, residuals, y)


@pytest.mark.parametrize("option", ["reads", "writes"])
@pytest.mark.parametrize("names", ["count", ["count"], None, (1,)])
def test_names_of_sides_are_a_tuple(option, names):
    with pytest.raises(fn.InputError, match=f"{option} as a tuple of names"):
        counting(**{option: names})


@pytest.mark.parametrize(
    "wrap",
    [fn.serial, fn.skip, fn.branch, lambda layer: fn.repeat(layer, 2), lambda layer: fn.skip(layer, fn.dense(4))],
    ids=["serial", "skip", "branch", "repeat", "shortcut"],
)
def test_nearly_a_sides_name_is_refused_in_every_combinator(wrap):
    with pytest.raises(fn.InputError, match="a side input named lengths"):
        wrap(fn.attention(2)).init(KEY, {"x": X, "length": np.int32([3, 1])})
