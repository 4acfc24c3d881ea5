"""A small model, its objective, and batches for it without end."""

import itertools

import jax
import numpy as np
import optax

import funcnet as fn

MODEL = fn.serial(fn.dense(16), fn.relu(), fn.dropout(0.1), out=fn.dense(3))
OBJECTIVE = fn.objective(MODEL, fn.cross_entropy())
RNG = np.random.default_rng(0)
INPUTS = RNG.standard_normal((40, 6)).astype(np.float32)
LABELS = (INPUTS[:, :3]).argmax(1).astype(np.int32)
OPTIMIZER = optax.adam(1e-2)


def batches(bad_at=None, bad=lambda x, t: (x, t)):
    for i in itertools.count():
        rows = np.random.default_rng(i).integers(0, 40, 8)
        batch = INPUTS[rows], LABELS[rows]
        yield bad(*batch) if i == bad_at else batch


def fresh(objective=OBJECTIVE):
    return fn.init_train_state(objective, OPTIMIZER, jax.random.key(0), next(batches()))
