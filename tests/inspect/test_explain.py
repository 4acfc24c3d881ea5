"""What `explain` says about a pass, against the pass itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import funcnet as fn

RNG = np.random.default_rng(0)
MODEL = fn.serial(
    fn.dense(6),
    deep=fn.repeat(fn.skip(fn.serial(fn.layer_norm(), fn.dense(6), fn.relu())), 3),
    saving=fn.remat(fn.serial(fn.dense(6), fn.tanh())),
    head=fn.dense(5),
)
BATCH = RNG.standard_normal((4, 7)).astype(np.float32), np.array([0, 1, 2, 4], np.int32)
OBJECTIVE = fn.objective(MODEL, fn.cross_entropy())
TURN = ("layer_norm", "dense", "relu")
NAMES = ["dense", *(f"deep/{i}/{kind}" for i in range(3) for kind in TURN), "saving/dense", "saving/tanh", "head"]


@pytest.fixture(scope="module")
def explained():
    params, state = OBJECTIVE.init(jax.random.key(0), BATCH)
    return params, state, fn.explain(OBJECTIVE, params, state, BATCH)


def test_loss_and_gradient_norms_are_those_of_the_pass(explained):
    params, state, explanation = explained
    (loss, _), grads = fn.value_and_grad(OBJECTIVE)(params, state, BATCH)
    np.testing.assert_allclose(explanation.loss, loss, rtol=1e-6)
    assert [step.name for step in explanation.steps] == NAMES
    norms = {step.name: step.gradient for step in explanation.steps}

    def norm(tree):
        return np.sqrt(sum(float(np.sum(np.square(leaf))) for leaf in jax.tree.leaves(tree)))

    np.testing.assert_allclose(norms["head"], norm(grads["model"]["head"]), rtol=1e-5)
    for i in range(3):
        turn = jax.tree.map(lambda leaf, i=i: leaf[i], grads["model"]["deep"])
        np.testing.assert_allclose(norms[f"deep/{i}/dense"], norm(turn["dense"]), rtol=1e-4)
    assert norms["deep/0/relu"] is None


def test_activations_cotangents_and_bytes_are_those_of_the_layers(explained):
    params, state, explanation = explained
    head = explanation.steps[-1]
    y = MODEL.apply(params["model"], state["model"], BATCH[0])
    dy = (jax.nn.softmax(y) - jax.nn.one_hot(BATCH[1], 5)) / 4
    np.testing.assert_allclose(head.activation, np.sqrt(np.mean(np.square(y))), rtol=1e-5)
    np.testing.assert_allclose(head.cotangent, np.sqrt(np.mean(np.square(dy))), rtol=1e-5)
    assert (head.input, head.output, head.residual_bytes) == ("float32[4, 6]", "float32[4, 5]", 4 * 6 * 4)
    assert head.jacobians == {"bias": "[4, 5, 5]", "kernel": "[4, 5, 6, 5]", "x": "[4, 5, 4, 6]"}
    assert head.jacobian_bytes == 4 * 4 * 5 * (5 + 30 + 24)
    assert head.vjp_bytes == 4 * (24 + 20 + 5 + 30 + 24)


def marks(model, x, change=lambda params: params, loss=None, targets=None):
    objective = fn.objective(model, loss or fn.mse())
    params, state = model.init(jax.random.key(0), x)
    targets = jnp.ones_like(model.apply(params, state, x)) if targets is None else targets
    both = {"model": change(params), "loss": {}}, {"model": state, "loss": ()}
    explanation = fn.explain(objective, *both, (x, targets))
    return {step.name: step.marks for step in explanation.steps}, str(explanation)


def test_vanishing_exploding_dead_and_not_finite_are_marked():
    x = BATCH[0]
    flat = fn.serial(fn.dense(5), fn.sigmoid(), head=fn.dense(5))
    saturated = lambda params: params | {"dense": {"kernel": params["dense"]["kernel"], "bias": jnp.full(5, 12.0)}}
    found, text = marks(flat, x, saturated)
    assert (found["dense"], found["sigmoid"], found["head"]) == (("", "vanishing"), ("", ""), ("", ""))
    assert "vanishing" in text.split("2. and 3.")[1].splitlines()[-2]
    steep = lambda params: params | {"head": {"kernel": params["head"]["kernel"] * 1e6, "bias": jnp.zeros(5)}}
    assert marks(flat, x, steep)[0]["sigmoid"] == ("", "exploding")
    drowned = lambda params: params | {"dense": {"kernel": params["dense"]["kernel"], "bias": jnp.full(5, -90.0)}}
    found, text = marks(fn.serial(fn.dense(5), fn.relu(), head=fn.dense(5)), x, drowned)
    assert (found["dense"], found["relu"]) == (("", "dead"), ("dead", ""))
    assert text.splitlines()[4].endswith("dead")
    small = lambda params: jax.tree.map(lambda p: p * 1e-4, params)
    found, _ = marks(flat, x, small)
    assert (found["dense"], found["sigmoid"], found["head"][0]) == (("vanishing",) * 2, ("", "vanishing"), "vanishing")
    broken = lambda params: params | {"head": {"kernel": params["head"]["kernel"] * jnp.nan, "bias": jnp.zeros(5)}}
    assert marks(flat, x, broken)[0]["head"] == ("not finite", "not finite")


def test_it_works_for_a_lone_layer_integers_and_layers_that_draw():
    assert list(marks(fn.dense(2), BATCH[0])[0]) == ["dense"]
    model = fn.serial(fn.dropout(0.5), fn.repeat(fn.relu(), 2), fn.dense(5))
    objective = fn.objective(model, fn.cross_entropy())
    params, state = objective.init(jax.random.key(0), BATCH)
    explanation = fn.explain(objective, params, state, BATCH, jax.random.key(3))
    (loss, _), _ = fn.value_and_grad(objective)(params, state, BATCH, jax.random.key(3))
    np.testing.assert_allclose(explanation.loss, loss, rtol=1e-6)
    with pytest.raises(fn.InputError, match="a random key"):
        fn.explain(objective, params, state, BATCH)


def test_the_table_reads_forward_then_back(explained):
    lines = str(explained[2]).splitlines()
    names = [line.split()[0] for line in lines if line and line.split()[0] in NAMES]
    assert names == [*NAMES, *NAMES[::-1]]
    assert all(len(line) < 160 for line in lines)
    assert any(line.startswith("cross_entropy: ") for line in lines)


@pytest.mark.parametrize("wrap", [fn.skip, fn.remat, lambda layer: fn.mixed(layer, compute="float32")])
def test_a_repeat_inside_a_transparent_combinator_is_shown_turn_by_turn(wrap):
    model = fn.serial(wrap(fn.repeat(fn.serial(fn.dense(7), fn.tanh()), 2)), fn.dense(5))
    objective = fn.objective(model, fn.cross_entropy())
    params, state = objective.init(jax.random.key(0), BATCH)
    explanation = fn.explain(objective, params, state, BATCH)
    names = [step.name.split("/")[1:] for step in explanation.steps]
    assert names == [["0", "dense"], ["0", "tanh"], ["1", "dense"], ["1", "tanh"], []]
    (loss, _), _ = fn.value_and_grad(objective)(params, state, BATCH)
    np.testing.assert_allclose(explanation.loss, loss, rtol=1e-6)
    deep = next(iter(params["model"]))
    params["model"][deep] = jax.tree.map(lambda p: p[:1], params["model"][deep])
    with pytest.raises(fn.InputError, match="a first axis of 2 layers"):
        fn.explain(objective, params, state, BATCH)
    with pytest.raises(fn.InputError, match=r"fn.objective\(model, loss\)"):
        fn.explain(model, params, state, BATCH)


def test_a_loss_with_parameters_is_the_last_layer():
    model, loss = fn.serial(fn.dense(6), fn.tanh()), fn.linear_cross_entropy(5)
    objective = fn.objective(model, loss)
    params, state = objective.init(jax.random.key(0), BATCH)
    explanation = fn.explain(objective, params, state, BATCH)
    assert [step.name for step in explanation.steps] == ["dense", "tanh", "linear_cross_entropy"]
    (value, _), grads = fn.value_and_grad(objective)(params, state, BATCH)
    np.testing.assert_allclose(explanation.loss, value, rtol=1e-6)
    for step, own in zip(explanation.steps[::2], (grads["model"]["dense"], grads["loss"]), strict=True):
        wanted = np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(own)))
        np.testing.assert_allclose(step.gradient, wanted, rtol=1e-5)
    assert "linear_cross_entropy  [4]" in str(explanation)


def test_a_layer_of_several_inputs_has_a_jacobian_for_each():
    add = fn.stateless(
        "add", lambda key, x: {}, lambda params, x: (x[0] + x[1], x[0][:0]), lambda p, r, dy, contract: ({}, (dy, dy))
    )
    model = fn.serial(fn.parallel(fn.dense(5), fn.dense(5)), add)
    x = (BATCH[0], BATCH[0])
    objective = fn.objective(model, fn.cross_entropy())
    params, state = objective.init(jax.random.key(0), (x, BATCH[1]))
    last = fn.explain(objective, params, state, (x, BATCH[1])).steps[-1]
    assert last.jacobians == {"x0": "[4, 5, 4, 5]", "x1": "[4, 5, 4, 5]"}
    assert last.jacobian_bytes == 2 * 4 * 20 * 20
