"""Predictions and targets, and what the tests of all losses do with them."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

import funcnet as fn

RNG = np.random.default_rng(0)
LOGITS = 3 * RNG.normal(size=(6, 5))
SOFT = scipy.special.softmax(RNG.normal(size=(6, 5)), axis=-1)
LABELS = np.array([0, 4, 2, 2, 1, 3])
SIGNS = np.sign(LOGITS + RNG.normal(size=(6, 5)))
LOG_P = scipy.special.log_softmax(LOGITS, axis=-1)
Z = jnp.float32(LOGITS)
CROSS_ENTROPY, SMOOTHED, BINARY = fn.cross_entropy(), fn.cross_entropy(label_smoothing=0.1), fn.binary_cross_entropy()
REGRESSIONS = [fn.mse(), fn.mae(), fn.huber()]
OTHERS = [fn.focal(), fn.hinge(), fn.kl_divergence(), fn.cosine()]


@partial(jax.jit, static_argnums=0)
def pull(loss, prediction, target, dy=None):
    """(values, the prediction's gradient, the target's gradient) for the cotangent dy, by default ones."""
    values, _, residuals = loss.fwd({}, (), (prediction, target), None)
    dparams, (dprediction, dtarget) = loss.bwd({}, residuals, jnp.ones_like(values) if dy is None else dy)
    assert dparams == {}
    return values, dprediction, dtarget


def value(loss, prediction, target):
    return pull(loss, prediction, target)[0]


def refused(loss, prediction, target, message):
    for call in (
        loss.fwd,
        lambda params, state, x, key: loss.apply(params, state, x),
        lambda p, s, x, k: loss.check(*x),
    ):
        with pytest.raises(fn.InputError, match=message):
            call({}, (), (prediction, target), None)
