"""A sparse mixture of experts against a loop over positions, and the totals that its router writes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import funcnet as fn

KEY = jax.random.key(0)
D, F, E = 4, 3, 3
RNG = np.random.default_rng(0)
X = RNG.standard_normal((3, 6, D)).astype(np.float32)
LENGTHS = np.int32([6, 3, 0])
TOTALS = fn.RouterTotals(np.float32([1, 2, 3]), np.float32([0, 0, 1]), np.int32([0, 5, 0]))
BLOCK = fn.skip(fn.serial(fn.layer_norm(), fn.moe(fn.mlp(8, D), E, top_k=2)))


def softmax(z):
    e = np.exp(z - z.max())
    return e / e.sum()


def by_loops(params, x, length, top_k, capacity_factor):
    """One example [T, D], position by position: y, and its balance, z and number of dropped choices."""
    router, kernels, biases = params["router"]["kernel"], params["experts"]["kernel"], params["experts"]["bias"]
    y, z = np.zeros((len(x), F)), x[:length] @ router
    p = np.array([softmax(row) for row in z]).reshape(length, E)
    order = np.argsort(-p, axis=1, kind="stable")[:, :top_k]
    room = np.full(E, length if capacity_factor is None else np.ceil(capacity_factor * top_k * length / E))
    dropped, chosen = 0, np.zeros(E)
    for k in range(top_k):
        for t in range(length):
            e = order[t, k]
            chosen[e] += 1
            if room[e] == 0:
                dropped += 1
                continue
            room[e] -= 1
            gate = p[t, e] if top_k == 1 else p[t, e] / p[t, order[t]].sum()
            y[t] += gate * (x[t] @ kernels[e] + biases[e])
    share = chosen / max(top_k * length, 1)
    n = max(length, 1)
    return y, E * np.sum(share * p.sum(0) / n), np.sum(np.log(np.exp(z).sum(1)) ** 2) / n, dropped


@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["whole", "lengths"])
@pytest.mark.parametrize(("top_k", "capacity_factor"), [(1, 1.25), (1, 0.5), (2, 0.7), (3, None)])
def test_it_is_a_loop_over_positions(top_k, capacity_factor, lengths):
    layer = fn.moe(
        fn.dense(F, bias_init=jax.nn.initializers.normal(1.0)), E, top_k=top_k, capacity_factor=capacity_factor
    )
    inputs = {"x": X, "router": TOTALS} | ({} if lengths is None else {"lengths": lengths})
    params, state = layer.init(KEY, inputs)
    out = jax.jit(layer.apply)(params, state, inputs)
    assert out.keys() == {"x", "router"}
    wanted = [
        by_loops(jax.tree.map(np.asarray, params), x, int(n), top_k, capacity_factor)
        for x, n in zip(X, [6] * 3 if lengths is None else lengths, strict=True)
    ]
    assert capacity_factor != 0.5 or any(dropped for *_, dropped in wanted)
    ys, balance, z, dropped = map(np.array, zip(*wanted, strict=True))
    np.testing.assert_allclose(out["x"], ys, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(out["router"].balance, TOTALS.balance + balance, rtol=1e-5)
    np.testing.assert_allclose(out["router"].z, TOTALS.z + z, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(out["router"].dropped, TOTALS.dropped + dropped)
    alone = layer.apply(params, state, {name: side for name, side in inputs.items() if name != "router"})
    np.testing.assert_array_equal(alone, out["x"])


def test_as_many_choices_as_experts_is_the_weighted_sum_of_all():
    layer = fn.moe(fn.dense(F), E, top_k=E, capacity_factor=None)
    params, state = layer.init(KEY, X)
    p = jax.nn.softmax(X @ params["router"]["kernel"])
    each = jnp.einsum("btd,edf->btef", X, params["experts"]["kernel"]) + params["experts"]["bias"][None, None]
    np.testing.assert_allclose(
        layer.apply(params, state, X), jnp.einsum("bte,btef->btf", p, each), rtol=1e-4, atol=1e-6
    )


def test_positions_behind_the_length_and_other_examples_change_nothing():
    layer = fn.moe(fn.dense(F), E, capacity_factor=0.6)
    params, state = layer.init(jax.random.key(5), X)

    def run(x, lengths, dy):
        inputs = {"x": x, "lengths": lengths, "router": jax.tree.map(lambda leaf: leaf[: len(x)], TOTALS)}
        y, _, residuals = layer.fwd(params, state, inputs, None)
        dtotals = fn.RouterTotals(jnp.ones(len(x)), jnp.ones(len(x)), None)
        return y, *layer.bwd(params, residuals, {"x": dy, "router": dtotals}, fn.per_example)

    dy = RNG.standard_normal((3, 6, F)).astype(np.float32)
    spoilt = np.where(np.arange(6)[:, None] < LENGTHS[:, None, None], X, 7).astype(np.float32)
    y, dparams, dx = run(spoilt, LENGTHS, dy)
    assert not np.any(np.concatenate([y["x"][1, 3:], dx["x"][1, 3:]], axis=-1))
    own, alone, _ = run(X[1:2, :3], LENGTHS[1:2], dy[1:2, :3])
    np.testing.assert_allclose(y["x"][1, :3], own["x"][0], rtol=1e-6)
    assert y["router"].dropped[1] - TOTALS.dropped[1] == own["router"].dropped[0] - TOTALS.dropped[0] > 0
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[1], b[0], rtol=1e-5, atol=1e-6), dparams, alone)


MODELS = {
    "plain": BLOCK,
    "repeat": fn.repeat(BLOCK, 2),
    "remat": fn.repeat(fn.remat(BLOCK), 2),
    "mixed": fn.mixed(BLOCK, *["float64"] * 3),
    "weight_norm": fn.weight_norm(fn.repeat(BLOCK, 2)),
    "spectral_norm": fn.spectral_norm(BLOCK),
    "freeze": fn.freeze(BLOCK),
    "shortcut": fn.skip(fn.moe(fn.dense(D), E), fn.dense(D)),
    "tied": fn.tied(fn.serial(a=BLOCK, b=BLOCK), {"b/moe/experts/out/kernel": "a/moe/experts/out/kernel"}),
    "stateful": fn.moe(fn.spectral_norm(fn.serial(fn.dense(D), fn.dropout(0.2))), 2, capacity_factor=None),
}


@pytest.mark.parametrize("name", MODELS)
def test_it_stands_in_every_combinator(name):
    oracles = ("autodiff", "residuals", "laws")  # of the rule itself all of them have cases
    fn.check_layer(fn.serial(fn.router_totals(), MODELS[name]), "f32[2,5,4]", oracles=oracles).raise_for_failure()


def model_of(block):
    return fn.serial(fn.embedding(11, D), fn.router_totals(), fn.repeat(block, 2), fn.dense(5))


def test_trained_layer_by_layer_explained_and_summarised():
    objective, optimizer = (
        fn.objective(model_of(BLOCK), fn.router_losses(fn.cross_entropy(), balance=0.1)),
        optax.sgd(0.1),
    )
    batch = RNG.integers(0, 11, (3, 6)).astype(np.int32), RNG.integers(0, 5, (3, 6)).astype(np.int32)
    steps = fn.train_step(objective, optimizer), fn.layerwise_step(objective, optimizer)
    (one, metrics), (other, _) = (step(fn.init_train_state(objective, optimizer, KEY, batch), batch) for step in steps)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), one.params, other.params)
    assert metrics.keys() >= {"loss", "accuracy", "router_balance", "router_z", "dropped"}

    begun = fn.init_train_state(objective, optimizer, KEY, batch)
    params, state = begun.params, begun.state
    prediction = objective.model.apply(params["model"], state["model"], batch[0])
    totals = prediction["router"]
    np.testing.assert_allclose(metrics["router_balance"], np.mean(totals.balance), rtol=1e-5)
    np.testing.assert_allclose(metrics["dropped"], np.mean(totals.dropped), rtol=1e-5)
    plain, _ = fn.value_and_grad(fn.objective(model_of(BLOCK), fn.router_losses(fn.cross_entropy(), balance=0, z=0)))(
        params, state, batch
    )
    added = 0.1 * np.mean(totals.balance) + 0.001 * np.mean(totals.z)
    np.testing.assert_allclose(metrics["loss"], plain[0] + added, rtol=1e-5)

    explained = fn.explain(objective, params, state, batch)
    assert [step.name for step in explained.steps][2:4] == ["repeat/0/layer_norm", "repeat/0/moe"]
    rows = {row.path: row for row in fn.summary(objective.model, batch[0]).rows}
    assert ("repeat", "moe", "experts", "hidden") in rows
    assert rows[("repeat",)].parameters == sum(leaf.size for leaf in jax.tree.leaves(params["model"]["repeat"]))


def test_per_example_gradients_go_through_the_routing():
    """Each example's own, also of the router's losses, are those of that example alone."""
    objective = fn.objective(model_of(BLOCK), fn.router_losses(fn.cross_entropy(), balance=0.5, z=0.1))
    batch = RNG.integers(0, 11, (3, 6)).astype(np.int32), RNG.integers(0, 5, (3, 6)).astype(np.int32)
    params, state = objective.init(KEY, batch)
    grad = jax.jit(fn.value_and_grad(objective), static_argnames="contract")
    ones = jnp.ones((3, 6))
    _, each = grad(params, state, batch, weights=ones, contract=fn.per_example)
    _, norms = grad(params, state, batch, weights=ones, contract=fn.squared_norm)
    for i in range(3):
        _, alone = grad(params, state, jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], batch), weights=ones[:1])
        for many, norm, one in zip(*map(jax.tree.leaves, (each, norms, alone)), strict=True):
            np.testing.assert_allclose(many[i], one, rtol=1e-3, atol=1e-5)
            np.testing.assert_allclose(norm[i], np.sum(np.square(one)), rtol=1e-3, atol=1e-8)


def test_training_evens_the_load():
    objective, optimizer = (
        fn.objective(model_of(BLOCK), fn.router_losses(fn.cross_entropy(), balance=1.0)),
        optax.sgd(0.3),
    )
    batch = RNG.integers(0, 11, (8, 6)).astype(np.int32), RNG.integers(0, 5, (8, 6)).astype(np.int32)
    train_state = fn.init_train_state(objective, optimizer, KEY, batch)
    step, losses = fn.train_step(objective, optimizer), []
    for _ in range(60):
        train_state, metrics = step(train_state, batch)
        losses.append(metrics)
    assert losses[-1]["loss"] < losses[0]["loss"] - 0.5
    assert losses[-1]["router_balance"] < losses[0]["router_balance"]


TWO = fn.branch(fn.moe(fn.dense(3), 2), fn.moe(fn.dense(3), 2))


def test_two_mixtures_of_one_input_are_fine_where_nothing_is_counted():
    params, state = TWO.init(KEY, X)
    a, b = TWO.fwd(params, state, X, None)[0]
    for y, name in ((a, "moe"), (b, "moe_1")):
        np.testing.assert_array_equal(y, TWO.parts[name].apply(params[name], state[name], X))


def test_slots_are_counted_from_the_factor_as_it_is_written():
    """1.1 * 2 * 100 / 4 is 55, and in floats a little more."""
    layer = fn.moe(fn.dense(3), 4, top_k=2, capacity_factor=1.1)
    x = jax.ShapeDtypeStruct((1, 100, 5), np.float32)
    params, state = jax.eval_shape(layer.init, KEY, x)
    assert jax.eval_shape(layer.fwd, params, state, x, None)[2].holds.shape == (1, 4 * 55)
    least = fn.moe(fn.dense(3), 4, capacity_factor=1e-10)
    assert jax.eval_shape(least.fwd, params, state, x, None)[2].holds.shape == (1, 4 * 1)


@pytest.mark.parametrize("wrap", [fn.mixed, lambda layer: fn.mixed(layer, keep=("repeat/skip/moe",))], ids=["", "keep"])
def test_mixed_does_not_round_the_totals(wrap):
    model = fn.serial(fn.router_totals(), wrap(fn.serial(fn.repeat(fn.serial(BLOCK), 2))))
    params, state = model.init(KEY, X)
    y, _, residuals = model.fwd(params, state, X, None)
    totals = y["router"]
    assert totals.balance.dtype == np.float32
    assert (totals.balance != totals.balance.astype("bfloat16").astype(np.float32)).all()
    dy = {
        "x": np.zeros_like(X),
        "router": fn.RouterTotals(np.full(3, 1 / 3, np.float32), np.zeros(3, np.float32), None),
    }
    dparams, dx = model.bwd(params, residuals, dy)
    assert dx.dtype == np.float32
    kernel = dparams["serial"]["repeat"]["skip"]["moe"]["router"]["kernel"]
    assert np.abs(kernel).max() > 0


STATES = {
    "no state": (lambda p, s: (p, ()), r"state for the layers \['experts'\]"),
    "no params": (lambda p, s: ({}, s), "params for the layers"),
    "fewer experts": (
        lambda p, s: ({**p, "experts": jax.tree.map(lambda leaf: leaf[:2], p["experts"])}, s),
        "stacked along a first axis of 3 experts",
    ),
}


@pytest.mark.parametrize("name", STATES)
def test_params_and_state_of_another_mixture_are_refused(name):
    change, message = STATES[name]
    layer = fn.moe(fn.dense(D), E)
    params, state = change(*layer.init(KEY, X))
    for call in (lambda: layer.apply(params, state, X), lambda: layer.fwd(params, state, X, None)):
        with pytest.raises(fn.InputError, match=message):
            call()


@pytest.mark.parametrize("dy", [X, {"x": X}, {"x": X, "router": 0.0}], ids=["an array", "no totals", "a number"])
def test_a_cotangent_without_those_of_the_totals_is_refused(dy):
    layer = fn.moe(fn.dense(D), E)
    params, state = layer.init(KEY, X)
    residuals = layer.fwd(params, state, {"x": X, "router": TOTALS}, None)[2]
    with pytest.raises(fn.InputError, match="the cotangents of x and router"):
        layer.bwd(params, residuals, dy)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fn.moe(fn.dense(3), 2, top_k=3), "top_k of at most"),
        (lambda: fn.moe(fn.dense(3), 0), "experts"),
        (lambda: fn.moe(fn.dense(3), 2, capacity_factor=0), "capacity_factor"),
        (lambda: fn.moe(fn.flatten(), 2).init(KEY, X), r"(?s)experts.*an expert of layers that look at each position"),
        (lambda: fn.moe(fn.attention(1), 2).init(KEY, X), "an expert of layers that look at each position"),
        (lambda: fn.moe(fn.skip(fn.serial(fn.gru(5))), 2).init(KEY, X), "an expert of layers that look"),
        (lambda: fn.moe(fn.moe(fn.dense(5), 2), 2).init(KEY, X), "an expert of layers that look"),
        (lambda: fn.moe(fn.batch_norm(), 2).init(KEY, X), "an expert of layers that look"),
        (lambda: fn.moe(fn.reversible(fn.gru(2), fn.dense(2)), 2).init(KEY, X), "an expert of layers that look"),
        (lambda: fn.moe(fn.from_function(lambda p, x: x), 2).init(KEY, X), "an expert of layers that look"),
        (lambda: fn.moe(fn.dense(3), 2).init(KEY, np.float32([1, 2])), "moe"),
        (lambda: fn.moe(fn.dense(3), 2).init(KEY, {"x": X, "router": 3}), r"fn.router_totals\(\) in front"),
        (lambda: fn.moe(fn.dense(3), 2).init(KEY, {"x": X, "mask": X}), "lengths and router"),
        (lambda: fn.serial(fn.router_totals(), TWO).init(KEY, X), "at most one layer that writes"),
        (lambda: fn.serial(fn.router_totals(), fn.router_totals()).init(KEY, X), "once"),
        (
            lambda: fn.objective(fn.moe(fn.dense(3), 2), fn.router_losses(fn.cross_entropy())).init(
                KEY, (X, X[..., 0])
            ),
            r"(?s)routers' totals.*fn.router_totals\(\) into the model",
        ),
        (lambda: fn.router_losses(fn.mse(), balance=-1), "balance"),
    ],
)
def test_what_does_not_fit_is_refused(make, message):
    with pytest.raises(fn.InputError, match=message):
        make()
