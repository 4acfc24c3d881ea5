"""Layers' Jacobians, formed in full, against `bwd`; and what `explain` says about a pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import funcnet as fn
from funcnet._internal.casting import cast
from funcnet._internal.expect import is_floating
from funcnet.check.cases import CASES
from funcnet.check.spec import drawn, settled, specs

RNG = np.random.default_rng(0)
X = RNG.standard_normal((3, 4))
BLOCK = fn.serial(fn.layer_norm(), fn.dense(4), fn.tanh())
# The first case of each constructor; where it computes in float32 whatever it is given, another one.
LAYERS = {case.constructor: (case.layer, case.x) for case in reversed(CASES)} | {
    "embedding": (fn.embedding(7, 5, dtype="float64"), "i32[4,3]<7"),
    "mixed": (fn.mixed(BLOCK, "float64", "float64", "float64"), "f32[3,4]"),
}
QUICK = "dense embedding layer_norm conv lstm dropout prelu cross_entropy serial parallel skip repeat remat mixed"


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name not in QUICK.split())) for name in LAYERS]
)
def test_the_jacobians_multiplied_by_the_cotangent_are_what_bwd_returns(name):
    layer, x = LAYERS[name]
    with jax.enable_x64(True):
        key = jax.random.key(1)
        x = cast(drawn(settled(specs(x), 0), 0), "float64")
        params, state = cast(jax.jit(layer.init)(key, x), "float64")
        y = jax.eval_shape(layer.fwd, params, state, x, key)[0]
        draw = lambda leaf: jnp.asarray(RNG.standard_normal(leaf.shape), leaf.dtype) if is_floating(leaf) else None
        dy = jax.tree.map(draw, y)

        @jax.jit
        def both(params, state, x, dy):
            residuals = layer.fwd(params, state, x, key)[2]
            return layer.bwd(params, residuals, dy), fn.layer_jacobians(layer, params, state, x, key)

        (dparams, dx), jacobians = both(params, state, x, dy)

        def product(cotangent, jacobian):
            return np.tensordot(cotangent, jacobian, axes=cotangent.ndim)

        def products(of):
            outer = jax.tree.structure(dy).flatten_up_to(of)  # the tree of the output is the outer one
            parts = [
                jax.tree.map(lambda j, cotangent=cotangent: product(cotangent, j), jacobian)
                for cotangent, jacobian in zip(jax.tree.leaves(dy), outer, strict=True)
            ]
            return jax.tree.map(lambda *terms: sum(terms), *parts)

        for hand, wanted in ((dparams, products(jacobians.params)), (dx, products(jacobians.x))):
            assert jax.tree.structure(hand) == jax.tree.structure(wanted)
            for got, want in zip(jax.tree.leaves(hand), jax.tree.leaves(wanted), strict=True):
                np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-12)


def test_jacobians_have_the_axes_of_the_output_in_front():
    params, state = fn.dense(2).init(jax.random.key(0), X[:, :3])
    jacobians = fn.layer_jacobians(fn.dense(2), params, state, X[:, :3].astype(np.float32))
    assert {name: leaf.shape for name, leaf in jacobians.params.items()} == {"kernel": (3, 2, 3, 2), "bias": (3, 2, 2)}
    assert jacobians.x.shape == (3, 2, 3, 3)


def test_jacobians_that_are_too_large_are_refused_before_they_are_formed():
    layer, x = fn.dense(1024), jnp.ones((64, 1024))
    params, state = layer.init(jax.random.key(0), x)
    with pytest.raises(fn.InputError, match="at most 268 MB") as error:
        fn.layer_jacobians(layer, params, state, x)
    assert "292 GB" in error.value.received


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


def test_jacobians_of_an_output_with_integers_are_those_of_its_floats():
    x = {"x": np.ones((1, 2, 2), np.float32), "lengths": np.int32([2])}
    layer = fn.serial(fn.dense(3))
    params, state = layer.init(jax.random.key(0), x)
    found = fn.layer_jacobians(layer, params, state, x)
    assert found.x["lengths"] is None
    assert found.x["x"]["x"].shape == (1, 2, 3, 1, 2, 2)
    assert found.x["x"]["lengths"] is None
