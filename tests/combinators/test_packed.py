"""Several sequences in one row: each is what it is alone, in the output and in every quantity of single examples."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import funcnet as fn

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
# Of two lengths, 1 and 3, so that what they are alone compiles twice; one is missing, and what pads is at both ends.
SEGMENTS = np.int32([[1, 1, 1, 2, 0, 0], [1, 2, 2, 2, 0, 0], [0, 0, 1, 2, 0, 0], [0, 0, 0, 2, 2, 2]])
IDS = RNG.integers(0, 11, SEGMENTS.shape).astype(np.int32)
X = {"x": IDS, "segments": SEGMENTS}
SEQUENCES = [(b, s, np.flatnonzero(SEGMENTS[b] == s)) for b in range(4) for s in (1, 2)]  # row, number, positions
DRAWN = jax.nn.initializers.normal(1.0)
BLOCK = fn.transformer_block(8, 2, causal=True, rotary=True)
ROUGH = fn.skip(fn.serial(fn.layer_norm(), fn.attention(2, bias_init=DRAWN), fn.gelu(), fn.dense(8)))

INNER = {
    "block": BLOCK,
    "repeat": fn.repeat(BLOCK, 2),
    "window": fn.attention(2, window=2, block=2),
    "remat": fn.remat(ROUGH),
    "mixed": fn.mixed(ROUGH, compute="float32"),
    "weight_norm": fn.weight_norm(fn.repeat(ROUGH, 2)),
    "spectral_norm": fn.spectral_norm(ROUGH),
    "tied": fn.tied(fn.serial(a=fn.dense(8), b=fn.dense(8)), {"b/kernel": "a/kernel.T"}),
    "branch": fn.serial(fn.branch(fn.attention(2), fn.dense(8)), fn.add()),
    "use": fn.stateless(
        "use",
        lambda key, x: {"scale": jax.random.normal(key, x.shape[-1:])},
        lambda params, x: (scaled(params["scale"], x), x),
        lambda params, x, dy, contract: (
            {"scale": contract(fn.Use(scaled, x, dy), params["scale"])},
            dy * params["scale"][None, None],
        ),
        positionwise=True,
    ),
}


def scaled(scale, x):
    return scale.reshape(*(1,) * (x.ndim - 1), -1) * x


def model_of(inner, positions=fn.position_embedding(5)):
    return fn.serial(fn.embedding(11, 8), positions, inner, fn.rms_norm(), fn.select(), fn.dense(5))


@pytest.mark.parametrize("name", INNER)
def test_each_sequence_is_what_it_is_alone(name):
    model = model_of(INNER[name])
    packed = fn.packed(model, 2, longest=5)
    params, state = packed.init(KEY, X)
    dy = RNG.standard_normal((*IDS.shape, 5)).astype(np.float32)

    @jax.jit
    def run(inputs, dy):
        y, _, residuals = packed.fwd(params, state, inputs, None)
        answers = [packed.bwd(params, residuals, dy, how)[0] for how in (fn.total, fn.per_example, fn.squared_norm)]
        kept = packed.bwd(params, residuals, dy, fn.keep)[0]
        later = jax.tree.map(lambda p, factor: fn.squared_norm(factor, p), params, kept)
        return y, packed.apply(params, state, inputs), answers, later

    @jax.jit
    def run_alone(inputs, dy):
        y, _, residuals = model.fwd(params, state, inputs, None)
        return y, model.bwd(params, residuals, dy)[0]

    y, applied, (total, each, norms), later = run(X, dy)
    np.testing.assert_allclose(applied, y, rtol=1e-6, atol=1e-6)
    assert not np.any(np.asarray(y)[SEGMENTS == 0])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(np.sum(a, 0), b, rtol=1e-3, atol=1e-4), each, total)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-7), norms, later)
    for b, s, at in SEQUENCES:
        own = jax.tree.map(lambda leaf, i=2 * b + s - 1: leaf[i], (each, norms))
        if len(at) == 0:
            assert not any(map(np.any, jax.tree.leaves(own)))
            continue
        alone, gradient = run_alone({"x": IDS[b : b + 1, at]}, dy[b : b + 1, at])
        np.testing.assert_allclose(y[b, at], alone[0], rtol=1e-4, atol=1e-5)
        for got, norm, wanted in zip(*map(jax.tree.leaves, (*own, gradient)), strict=True):
            np.testing.assert_allclose(got, wanted, rtol=2e-3, atol=2e-5)
            np.testing.assert_allclose(norm, np.sum(np.square(wanted)), rtol=5e-3, atol=1e-7)


@pytest.mark.parametrize("positions", [fn.position_embedding(5), fn.sinusoidal_positions()], ids=["learned", "waves"])
def test_positions_restart(positions):
    x = np.zeros((1, 6, 4), np.float32)
    params, state = positions.init(KEY, x[:, :3])
    y = positions.apply(params, state, {"x": x, "segments": np.int32([[1, 1, 2, 2, 2, 0]])})
    alone = positions.apply(params, state, x[:, :3])
    np.testing.assert_array_equal(y[:, 5], alone[:, 0])  # what pads
    for begin, end in ((0, 2), (2, 5)):
        np.testing.assert_array_equal(y[:, begin:end], alone[:, : end - begin])


def test_a_training_step_is_that_of_the_sequences_one_by_one():
    model, optimizer = model_of(BLOCK), optax.sgd(0.1)
    objective = fn.objective(fn.packed(model, 2), fn.cross_entropy(ignore_index=-1))
    labels = np.where(SEGMENTS > 0, IDS % 5, -1)
    begun = fn.init_train_state(objective, optimizer, KEY, (X, labels))
    after, metrics = fn.train_step(objective, optimizer)(begun, (X, labels))
    layerwise, _ = fn.layerwise_step(objective, optimizer)(
        fn.init_train_state(objective, optimizer, KEY, (X, labels)), (X, labels)
    )
    begun = fn.init_train_state(objective, optimizer, KEY, (X, labels))
    sequences = [(IDS[b, at], labels[b, at]) for b, _, at in SEQUENCES if len(at)]
    rows = [np.stack([np.pad(part, (0, 6 - len(part))) for part in column]) for column in zip(*sequences, strict=True)]
    lengths = np.int32([len(ids) for ids, _ in sequences])
    padded = {"x": rows[0], "lengths": lengths}, np.where(np.arange(6) < lengths[:, None], rows[1], -1)
    alone = fn.objective(model_of(BLOCK, fn.position_embedding(6)), objective.loss)
    wider = jax.tree.map(jnp.array, begun.params)
    table = wider["model"]["position_embedding"]["embedding"]
    wider["model"]["position_embedding"]["embedding"] = jnp.pad(table, ((0, 1), (0, 0)))
    (loss, _), grads = fn.value_and_grad(alone)(wider, begun.state, padded)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    positions = grads["model"]["position_embedding"]
    positions["embedding"] = positions["embedding"][:5]
    for moved in (after, layerwise):
        jax.tree.map(
            lambda p, q, g: np.testing.assert_allclose(p, q - 0.1 * g, rtol=1e-3, atol=1e-6),
            moved.params, begun.params, grads,
        )  # fmt: skip
    assert "segments" in str(fn.summary(objective.model, X))
    fn.explain(objective, begun.params, begun.state, (X, labels))


@pytest.mark.parametrize(
    "layer",
    [fn.lstm(4), fn.lru(3, 4), fn.conv(4, 3), fn.max_pool(2), fn.flatten(), fn.batch_norm(), fn.group_norm(2),
     fn.instance_norm(), fn.spatial_dropout(0.1), fn.moe(fn.dense(4), 2), fn.concat(1),
     fn.bidirectional(fn.gru(4), fn.gru(4, reverse=True)),
     fn.stateless("mine", lambda key, x: {}, lambda params, x: (x, x), lambda params, x, dy, contract: ({}, dy))],
    ids=lambda layer: layer.name,
)  # fmt: skip
def test_layers_that_would_mix_sequences_are_refused(layer):
    x = {"x": np.ones((2, 3, 4), np.float32), "segments": np.int32([[1, 1, 2], [1, 2, 2]])}
    with pytest.raises(fn.InputError, match="keep the segments of a row apart"):
        fn.packed(fn.serial(fn.dense(4), layer), 2).init(KEY, x)
    with pytest.raises(fn.InputError, match="keep the segments of a row apart"):
        fn.repeat(fn.skip(fn.serial(layer)), 2).init(KEY, x)


def test_segments_may_not_be_lost_in_front_of_what_reads_them():
    x = {"x": np.ones((2, 3, 4), np.float32), "segments": np.int32([[1, 1, 2], [1, 2, 2]])}
    lost = fn.skip(fn.serial(fn.select(), fn.attention(2)))
    for model in (fn.serial(fn.select(), fn.attention(2)), fn.repeat(fn.serial(fn.skip(lost), fn.select()), 1)):
        with pytest.raises(fn.InputError, match="segments beside x, which attention keeps apart"):
            fn.packed(model, 2).init(KEY, x)
    summing = lambda params, x: jnp.cumsum(x, axis=1)
    for mixing in (fn.gru(4), fn.reversible(fn.gru(2), fn.dense(2)), fn.from_function(summing)):
        with pytest.raises(fn.InputError, match="keep the segments of a row apart"):
            fn.packed(fn.serial(fn.select(), mixing), 2).init(KEY, x)
    fn.packed(fn.serial(fn.select(), fn.from_function(lambda params, x: 2 * x, positionwise=True)), 2).init(KEY, x)
    after = fn.packed(fn.serial(fn.attention(2), fn.select(), fn.dense(2)), 2)
    assert after.apply(*after.init(KEY, x), x).shape == (2, 3, 2)
    fn.serial(fn.select(), fn.attention(2)).init(KEY, x)  # outside of packed it is as it is written


def test_positions_have_an_axis_of_features():
    x = {"x": np.ones((2, 3), np.float32), "segments": np.int32([[1, 1, 2], [1, 2, 2]])}
    with pytest.raises(fn.InputError, match="an axis of features"):
        fn.packed(fn.softmax(), 2).init(KEY, x)
    for given in ({}, np.float32(1), np.ones(3, np.float32), [[1.0]]):
        with pytest.raises(fn.InputError, match=r"packed\n  expected  (x \[B, T, ..\]|arrays)"):
            fn.packed(fn.softmax(), 2).init(KEY, {**x, "x": given})


def test_rows_that_are_touched_are_those_of_the_sequences():
    """Row 0, which no position has, is where an empty place would point."""
    layer, x = fn.packed(fn.embedding(12, 3), 2), {**X, "x": IDS + 1}
    params, state = layer.init(KEY, x)
    dy = RNG.standard_normal((*IDS.shape, 3)).astype(np.float32)
    y, _, residuals = layer.fwd(params, state, x, None)
    rows = layer.bwd(params, residuals, {**y, "x": dy, "segments": None}, fn.rows)[0]["embedding"]
    assert set(np.asarray(rows.ids)) - {12} == set((IDS + 1)[SEGMENTS > 0])


def test_tied_around_packed_is_packed_around_tied():
    model = fn.serial(fn.embedding(11, 8), fn.attention(2), fn.select(), head=fn.dense(11, use_bias=False))
    ties = {"head/kernel": "embedding/embedding.T"}
    dy = RNG.standard_normal((*IDS.shape, 11)).astype(np.float32)
    params, state = fn.tied(model, ties).init(KEY, X)
    answers = []
    for layer in (fn.packed(fn.tied(model, ties), 2), fn.tied(fn.packed(model, 2), ties)):
        residuals = layer.fwd(params, state, X, None)[2]
        answers.append(
            [layer.bwd(params, residuals, dy, how)[0] for how in (fn.total, fn.per_example, fn.squared_norm)]
        )
    assert answers[0][1]["embedding"]["embedding"].shape == (8, 11, 8)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), *answers)


@pytest.mark.parametrize(
    ("segments", "received"),
    [
        ([[2, 2, 1]], r"row 0: \[2, 2, 1\]"),
        ([[1, 2, 3]], "row 0"),
        ([[1, 1, 1], [1, 2, 1]], "row 1"),
        ([[1, 0, 1]], "row 0"),
        ([[-1, 1, 1]], "row 0"),
        ([[1, 1, 1, 1]], "row 0"),
    ],
)
def test_segments_that_are_none_are_refused_or_nan(segments, received):
    layer = fn.packed(fn.dense(2), 2, longest=3)
    segments = np.int32(segments)
    x = {"x": np.ones((*segments.shape, 4), np.float32), "segments": segments}
    with pytest.raises(fn.InputError, match=received):
        layer.init(KEY, x)
    params, state = fn.dense(2).init(KEY, x["x"])

    @jax.jit
    def run(x, dy):
        y, _, residuals = layer.fwd(params, state, x, None)
        return y["x"], [layer.bwd(params, residuals, {**y, "x": dy}, how)[0] for how in (fn.total, fn.squared_norm)]

    y, (gradients, norms) = run(x, np.ones((*segments.shape, 2), np.float32))
    bad = np.isnan(y).any(axis=(1, 2))
    assert bad.any()
    assert np.isnan(gradients["kernel"]).all()
    assert np.isnan(norms["kernel"].reshape(-1, 2)).any(axis=1)[bad].all()


def test_what_does_not_fit_is_refused():
    x = {"x": np.ones((2, 3, 4), np.float32), "segments": np.int32([[1, 1, 2], [1, 2, 2]])}
    layer = fn.packed(fn.dense(2), 2)
    with pytest.raises(fn.InputError, match="segments that fit int32"):
        layer.init(KEY, {**x, "segments": x["segments"].astype(np.int64) + 2**32})
    for given in (x["x"], {"x": x["x"]}, {**x, "segments": x["segments"][0]}, {**x, "segments": x["x"][..., 0]}):
        with pytest.raises(fn.InputError, match="segments"):
            layer.init(KEY, given)
    with pytest.raises(fn.InputError, match="without a context"):
        fn.attention(2).init(KEY, {**x, "context": x["x"]})
    with pytest.raises(fn.InputError, match="at most 1 positions"):
        fn.position_embedding(1).init(KEY, x)
    summed = fn.from_function(lambda params, x: scaled(params["a"], x["x"]), lambda key, x: {"a": jnp.ones(4)})
    layer = fn.packed(fn.serial(summed), 2)
    params, state = layer.init(KEY, x)
    y, _, residuals = layer.fwd(params, state, x, None)
    with pytest.raises(fn.InputError, match="to tell its sequences apart"):
        layer.bwd(params, residuals, y, fn.per_example)
