"""Means over several batches are those over all of their values, weighed."""

from dataclasses import replace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import funcnet as fn
from funcnet.losses.loss import as_loss
from tests.train.small import INPUTS, LABELS, OPTIMIZER

pytestmark = pytest.mark.usefixtures("standard_promotion")


def scaled():
    """c (y - t)^2 for the target {"t", "c"}, in a mean divided by the sum of c; a negative t does not count."""

    def fwd(params, pair):
        (y, target), c = pair, jnp.where(pair[1]["t"] < 0, 0.0, pair[1]["c"])
        return c * jnp.square(y[:, 0] - target["t"]), (y[:, 0] - target["t"], c)

    def bwd(params, residuals, dy, contract):
        return {}, (2 * (dy * residuals[1] * residuals[0])[:, None], {"t": None, "c": None})

    loss = as_loss(fn.stateless("scaled", lambda key, x: {}, fwd, bwd))
    counted = lambda target: target["t"] >= 0
    of_class = lambda target: jnp.where(target["t"] < 0, 0.0, target["c"])
    return replace(loss, counted=counted, mass=of_class, metrics={"t": lambda y, target: target["t"]})


SCALED = fn.objective(fn.serial(fn.dense(1, use_bias=False)), scaled())
SIZES = {"ragged": [9, 1], "alike": [4, 4, 4, 4]}


def scaled_batches(sizes, weighted, seed=0):
    rng = np.random.default_rng(seed)
    for n in sizes:
        t = rng.integers(0, 9, n).astype(np.float32)
        t[1:2] = -1  # of ragged batches of 9 and 1 the second counts whole
        target = {"t": t, "c": rng.uniform(1, 9, n).astype(np.float32)}
        batch = rng.normal(size=(n, 3)).astype(np.float32), target
        yield (*batch, rng.uniform(0, 2, n).astype(np.float32)) if weighted else batch


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    ("sizes", "options"),
    [("ragged", {}), ("alike", {}), ("alike", {"accumulate": 2}), ("alike", {"steps_per_call": 2})],
)
def test_records_and_scores_are_means_over_what_counts_whatever_the_batches(sizes, options, weighted):
    data, still = list(scaled_batches(SIZES[sizes], weighted)), optax.sgd(0.0)
    state = fn.init_train_state(SCALED, still, jax.random.key(0), data[0])
    kernel = np.asarray(state.params["model"]["dense"]["kernel"], np.float64)
    x, t, c, *w = (
        np.concatenate(parts) for parts in zip(*((b[0], b[1]["t"], b[1]["c"], *b[2:]) for b in data), strict=True)
    )
    a = np.where(t < 0, 0.0, w[0] if weighted else 1.0)
    wanted = {"loss": np.sum(a * c * (x @ kernel[:, 0] - t) ** 2) / np.sum(a * c), "t": np.sum(a * t) / np.sum(a)}
    norms = [
        np.linalg.norm(fn.value_and_grad(SCALED)(state.params, state.state, batch)[1]["model"]["dense"]["kernel"])
        for batch in data
    ]
    scores = fn.evaluate(SCALED, state.params, state.state, data)
    assert scores == pytest.approx(wanted, rel=1e-5)
    _, (record,) = fn.fit(SCALED, still, state, data, len(data), log_every=len(data), validation=data, **options)
    assert {name: record[name] for name in wanted} == pytest.approx(wanted, rel=1e-5)
    assert {name: record["val_" + name] for name in wanted} == pytest.approx(wanted, rel=1e-5)
    assert record["grad_norm"] == pytest.approx(np.mean(norms), rel=1e-5)


def test_a_weighted_fit_moves_as_one_over_each_example_as_often_as_it_weighs():
    often = np.array([3, 0, 1, 2, 1, 1, 0, 4])
    weighted = INPUTS[:8], LABELS[:8], often.astype(np.float32) / 7
    repeated = np.repeat(INPUTS[:8], often, axis=0), np.repeat(LABELS[:8], often)
    objective = fn.objective(fn.serial(fn.dense(3)), fn.cross_entropy())
    ends = []
    for batch, options in ((weighted, {}), (weighted, {"accumulate": 4, "steps_per_call": 2}), (repeated, {})):
        state = fn.init_train_state(objective, OPTIMIZER, jax.random.key(0), batch)
        ends.append(fn.fit(objective, OPTIMIZER, state, [batch] * 4, 4, log_every=4, **options))
    for state, (record,) in ends[:2]:
        chex.assert_trees_all_close(state.params, ends[2][0].params, rtol=1e-4, atol=1e-6)
        assert record == pytest.approx(ends[2][1][0], rel=1e-4)


@pytest.mark.parametrize("scale", [1e-34, 1e-10, 1e10, 3e37])
def test_only_ratios_of_the_weights_matter(scale):
    """Also where products with values of the loss, or the sum of the weights, leave float32's range."""
    data = [(*batch[:2], batch[2] * 2) for batch in scaled_batches(SIZES["ragged"], True)]
    data = [(x, {"t": t["t"] / 1e3, "c": t["c"] / 1e3}, w) for x, t, w in data]
    scaled_data = [(x, t, w * np.float32(scale)) for x, t, w in data]
    state = fn.init_train_state(SCALED, optax.sgd(0.0), jax.random.key(0), data[0])
    wanted = fn.evaluate(SCALED, state.params, state.state, data)
    assert fn.evaluate(SCALED, state.params, state.state, scaled_data) == pytest.approx(wanted, rel=1e-5)
    _, (record,) = fn.fit(SCALED, optax.sgd(0.0), state, scaled_data, 2)
    assert {name: record[name] for name in wanted} == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("exponents", [(1023, 1023), (1023, -1000), (-1022, 0), (-1022, -1022), (1023, 0, -1022)])
def test_only_ratios_of_the_weights_matter_in_64_bits_too(exponents, x64):
    """Whole batches by powers of two: of those within the range of a sum the largest alone count."""
    own = np.arange(1.0, 9) / 8
    data = [(INPUTS[i : i + 8].astype(float), LABELS[i : i + 8], np.ldexp(own, e)) for i, e in enumerate(exponents)]
    if -1022 in exponents:
        data = [(x, t, np.maximum(w, np.finfo(float).tiny)) for x, t, w in data]
    objective = fn.objective(fn.dense(3), fn.cross_entropy())
    state = fn.init_train_state(objective, optax.sgd(0.0), jax.random.key(0), data[0])
    least = [(x, t, np.ldexp(w, -max(exponents))) for x, t, w in data]
    most = [(x, t, w) for x, t, w in least if w.max() >= 0.5]
    wanted = fn.evaluate(objective, state.params, state.state, most)
    assert fn.evaluate(objective, state.params, state.state, data) == pytest.approx(wanted, rel=1e-12)
    _, (record,) = fn.fit(objective, optax.sgd(0.0), state, data, len(data))
    assert {name: record[name] for name in wanted} == pytest.approx(wanted, rel=1e-12)
