"""`evaluate`: one mean over all examples; what it refuses."""

from dataclasses import replace

import jax
import numpy as np
import pytest

import funcnet as fn
from tests.train.small import INPUTS, LABELS, MODEL, OBJECTIVE, OPTIMIZER, batches, fresh

pytestmark = pytest.mark.usefixtures("standard_promotion")


def test_evaluate_is_the_mean_over_examples_whatever_the_batches():
    state = fresh()
    whole = fn.evaluate(OBJECTIVE, state.params, state.state, [(INPUTS, LABELS)])
    parts = [(INPUTS[:7], LABELS[:7]), (INPUTS[7:], LABELS[7:])]
    assert fn.evaluate(OBJECTIVE, state.params, state.state, parts) == pytest.approx(whole, rel=1e-5)
    predicted = np.argmax(MODEL.apply(state.params["model"], state.state["model"], INPUTS), 1)
    assert whole["accuracy"] == pytest.approx(np.mean(predicted == LABELS))
    with pytest.raises(fn.InputError, match="at least one batch"):
        fn.evaluate(OBJECTIVE, state.params, state.state, [])


def test_evaluate_and_steps_refuse_metrics_and_losses_of_another_shape():
    wrong_metric = fn.objective(MODEL, fn.cross_entropy(), {"right": lambda p, t: (p.argmax(-1) == t)[:, None]})
    params, state = OBJECTIVE.init(jax.random.key(0), (INPUTS, LABELS))
    with pytest.raises(fn.InputError, match=r"metric 'right' of shape \[40\]"):
        fn.evaluate(wrong_metric, params, state, [(INPUTS, LABELS)])
    with pytest.raises(fn.InputError, match=r"metric 'right' of shape \[8\]"):
        fn.fit(wrong_metric, OPTIMIZER, fresh(), batches(), 1)
    loss = fn.cross_entropy()
    column = replace(loss, fwd=lambda *args: (loss.fwd(*args)[0][:, None], *loss.fwd(*args)[1:]),
                     apply=lambda *args: loss.apply(*args)[:, None])  # fmt: skip
    with pytest.raises(fn.InputError, match=r"values of the loss \[40\]"):
        fn.evaluate(fn.objective(MODEL, column, {}), params, state, [(INPUTS, LABELS)])
