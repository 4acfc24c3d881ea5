"""What a weight of 0, or an ignored label, silences: a loss that is infinite or NaN, in every way a loss is run."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import funcnet as fn

INF, NAN = np.inf, np.nan
LABELS = np.array([1, 0], np.int32)
MASKED = np.float32([[1, 2, 0.5], [-INF, 1, 2]])
SOFT = np.float32([[0.2, 0.5, 0.3], [0.4, 0.6, 0]])
SECOND = np.arange(2)[:, None, None]
STEPS = np.float32([[[0, 1, 2], [1, 0, 0], [0, 2, 1]]] * 2)


def aligned(labels, logit_lengths):
    return {
        "labels": np.array(labels, np.int32),
        "label_lengths": np.array([2, 2], np.int32),
        "logit_lengths": np.array(logit_lengths, np.int32),
    }


def head(**options):
    """A head whose class 0 is forbidden."""
    return fn.linear_cross_entropy(3, bias_init=lambda *_: jnp.array([-INF, 0.5, 0.0], jnp.float32), **options)


# name: (loss, predictions of two examples, targets): the second value is infinite or NaN, the first one is not.
CASES = {
    "cross_entropy, a forbidden class": (fn.cross_entropy(), MASKED, LABELS),
    "cross_entropy, out of range": (fn.cross_entropy(), np.float32(STEPS[0, :2]), np.array([1, 3], np.int32)),
    "cross_entropy, smoothed": (fn.cross_entropy(label_smoothing=0.1), MASKED, np.array([1, 1], np.int32)),
    "cross_entropy, soft": (fn.cross_entropy(), MASKED, SOFT),
    "cross_entropy, soft and huge": (fn.cross_entropy(), STEPS[0, :2], np.float32([[0.2, 0.5, 0.3], [3e38, 3e38, 0]])),
    "cross_entropy, no class": (fn.cross_entropy(), np.float32([[1, 2, 0], [-INF, -INF, -INF]]), LABELS),
    "cross_entropy, class weights": (fn.cross_entropy(class_weights=[1, 2, 3]), MASKED, LABELS),
    "linear, a forbidden class": (head(), STEPS[0, :2], LABELS),
    "linear, out of range": (fn.linear_cross_entropy(3), STEPS[0, :2], np.array([1, 3], np.int32)),
    "linear, features": (fn.linear_cross_entropy(3, z_loss=0.1), np.float32([[1, 2, 0], [INF, 0, -INF]]), LABELS),
    "linear, class weights": (head(class_weights=[1, 2, 3], chunk=2), STEPS[0, :2], LABELS),
    "ctc, too few steps": (fn.ctc(), STEPS, aligned([[1, 2], [1, 1]], [3, 2])),
    "ctc, out of range": (fn.ctc(), STEPS, aligned([[1, 2], [1, 3]], [3, 3])),
    "ctc, a forbidden class": (fn.ctc(), np.where(SECOND * [0, 1, 0], -INF, STEPS), aligned([[1, 2]] * 2, [3, 3])),
    "ctc, nan": (fn.ctc(), np.where(SECOND, NAN, STEPS), aligned([[1, 2]] * 2, [3, 3])),
    "kl_divergence": (fn.kl_divergence(), MASKED, SOFT),
    "binary_cross_entropy": (fn.binary_cross_entropy(), MASKED, np.float32([[0, 1, 0], [1, 0, 1]])),
    "focal": (fn.focal(), MASKED, np.float32([[0, 1, 0], [1, 0, 1]])),
    "mse": (fn.mse(), MASKED, SOFT),
    "mae": (fn.mae(), MASKED, SOFT),
    "huber": (fn.huber(), MASKED, SOFT),
    "cosine": (fn.cosine(), np.float32([[1, 2, 0.5], [NAN, 1, 2]]), SOFT),
    "cosine, infinite": (fn.cosine(), np.float32([[1, 2, 0.5], [INF, 1, 2]]), SOFT),
    "triplet": (fn.triplet(), np.float32([[1, 2, 0.5], [NAN, 1, 2]]), (SOFT, 2 * SOFT)),
    "hinge": (fn.hinge(), MASKED, np.float32([[1, -1, 1], [1, 1, 1]])),
}  # fmt: skip
SEEN = {name for name in CASES if name.startswith("ctc, too") or "out of range" in name}  # refused where they are read


def shifted():
    """y = x + bias, a model whose gradient is what the loss hands it."""

    def bwd(params, residuals, dy, contract):
        return {"bias": contract(fn.Shift(dy), params["bias"])}, dy

    init = lambda key, x: {"bias": jnp.zeros(x.shape[-1], x.dtype)}
    forward = lambda params, x: (x + params["bias"].reshape((1,) * (x.ndim - 1) + (-1,)), ())
    return fn.stateless("shifted", init, forward, bwd)


def setup(name):
    """The objective, the batch, its first example alone, that example's loss and gradients, and params and state."""
    loss, prediction, target = CASES[name]
    objective, batch = fn.objective(shifted(), loss, metrics={}), (prediction, target)
    first = jax.tree.map(lambda a: a[:1], batch)
    params, state = objective.init(jax.random.key(0), first)
    (value, _), grads = jax.jit(fn.value_and_grad(objective))(params, state, first, weights=jnp.ones(1))
    assert np.isfinite(value)
    return objective, batch, value, grads, params, state


def same(got, wanted):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, wanted)


@pytest.mark.parametrize("name", CASES)
def test_a_weight_of_0_leaves_the_first_value_and_its_gradient(name):
    """With both passes at once, if the loss has that, and with `fwd` and `bwd`, also eagerly if nothing is refused."""
    objective, batch, value, grads, params, state = setup(name)
    split = replace(objective, loss=replace(objective.loss, ahead=None))
    ways = [jax.jit(fn.value_and_grad(split))]
    ways += [jax.jit(fn.value_and_grad(objective))] * (objective.loss.at_once is not None)
    ways += [fn.value_and_grad(objective)] * (name not in SEEN)
    for way in ways:
        (got, _), got_grads = way(params, state, batch, weights=jnp.array([1.0, 0.0]))
        same((got, got_grads), (value, grads))
    (infinite, _), _ = ways[0](params, state, batch, weights=jnp.ones(2))
    assert not np.isfinite(infinite), "the second value of a case is not finite"


@pytest.mark.parametrize("name", CASES)
def test_no_gradient_of_the_prediction_or_the_target_is_left_of_a_value_without_weight(name):
    loss, prediction, target = CASES[name]

    @jax.jit
    def pull(prediction, target):
        params, state = loss.init(jax.random.key(0), (prediction, target))
        values, _, residuals = loss.fwd(params, state, (prediction, target), None)
        return loss.bwd(params, residuals, jnp.array([1, 0], values.dtype))

    for leaf in jax.tree.leaves(pull(prediction, target)[1]):
        assert np.isfinite(leaf).all()
        assert not np.any(leaf[1])


@pytest.mark.parametrize("name", ["cross_entropy, a forbidden class", "linear, out of range", "ctc, too few steps"])
@pytest.mark.parametrize(
    "make", [partial(fn.train_step, accumulate=2), fn.layerwise_step], ids=["accumulate", "layerwise"]
)
def test_steps_are_those_of_the_first_example(name, make, standard_promotion):
    objective, batch, value, grads, params, _ = setup(name)
    optimizer = optax.sgd(1.0)
    train_state = fn.init_train_state(objective, optimizer, jax.random.key(0), jax.tree.map(lambda a: a[:1], batch))
    train_state = replace(train_state, params=jax.tree.map(jnp.array, params))
    moved, metrics = make(objective, optimizer)(train_state, batch, jnp.array([1.0, 0.0]))
    same(metrics["loss"], value)
    same(moved.params, jax.tree.map(lambda p, g: p - g, params, grads))


@pytest.mark.parametrize("loss", [fn.cross_entropy, partial(fn.linear_cross_entropy, 3)])
def test_an_ignored_label_silences_whatever_its_prediction_is(loss):
    """In steps, in `evaluate`, and in the gradients of the loss's own parameters."""
    loss = loss(ignore_index=-1)
    objective, target = fn.objective(shifted(), loss, metrics={}), np.array([1, -1], np.int32)
    good = np.float32([[1, 2, 0]])
    params, state = objective.init(jax.random.key(0), (good, target[:1]))
    pull = jax.jit(fn.value_and_grad(objective))
    wanted = pull(params, state, (good, target[:1]))
    for row in ([-INF, -INF, -INF], [INF, 0, 0], [NAN, 0, 0]):
        batch = np.concatenate([good, np.float32([row])]), target
        same(pull(params, state, batch), wanted)
        with jax.debug_nans(NAN not in row):
            same(fn.value_and_grad(objective)(params, state, batch), wanted)


@pytest.mark.parametrize("loss", [fn.cross_entropy(ignore_index=-1), fn.linear_cross_entropy(3, ignore_index=-1)])
def test_evaluate_leaves_out_what_is_ignored(loss):
    model = fn.elementwise("reciprocal", lambda x: 1 / x, lambda x: -1 / x**2)  # infinite at 0
    objective = fn.objective(model, loss, metrics={})
    batch = np.float32([[1, 2, 0.5], [0, 1, 2]]), np.array([1, -1], np.int32)
    first = jax.tree.map(lambda a: a[:1], batch)
    params, state = objective.init(jax.random.key(0), batch)
    same(fn.evaluate(objective, params, state, [batch]), fn.evaluate(objective, params, state, [first]))


@pytest.mark.parametrize("name", ["cross_entropy, class weights", "linear, class weights", "kl_divergence"])
def test_the_derivative_in_a_weight_of_0_is_the_value(name):
    """As in learning to weigh examples, Ren et al. 2018, arXiv:1803.09050: it is taken at weights of 0."""
    loss, prediction, target = CASES[name]
    prediction, target = jax.tree.map(lambda a: a[:1], (prediction, target))
    params, state = loss.init(jax.random.key(0), (prediction, target))
    residuals = jax.jit(loss.fwd)(params, state, (prediction, target), None)[2]
    pull = jax.jit(lambda dy: loss.bwd(params, residuals, dy)[1][0])
    one, zero = jnp.ones(1), jnp.zeros(1)
    np.testing.assert_allclose(jax.jvp(pull, (zero,), (one,))[1], pull(one), rtol=1e-6)
