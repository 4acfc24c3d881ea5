"""Six labelled examples, an objective for them, and its losses by optax."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import funcnet as fn

MODEL = fn.serial(fn.layer_norm(), fn.dense(8), fn.gelu(), fn.dense(5))
OBJECTIVE = fn.objective(MODEL, fn.cross_entropy(ignore_index=-1))


def setup(seed=0, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    inputs = rng.standard_normal((6, 4)).astype(dtype)
    batch = inputs, rng.integers(0, 5, 6).astype(np.int32)
    return *OBJECTIVE.init(jax.random.key(seed), batch), batch


def plain_values(params, state, batch):
    """The loss of each example, by optax and the model's forward pass."""
    return optax.softmax_cross_entropy_with_integer_labels(
        MODEL.apply(params["model"], state["model"], batch[0]), batch[1]
    )
