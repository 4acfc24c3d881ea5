"""A layer's state has to stay finite, or the step is not made."""

import itertools
from dataclasses import replace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import funcnet as fn
from funcnet.losses.loss import as_loss
from funcnet.train.finite import changed

pytestmark = pytest.mark.usefixtures("standard_promotion")


def peak():
    """y = x; its state is the largest square that it has seen, which overflows where x does not."""

    def fwd(params, state, x, key):
        return x, jnp.maximum(state, jnp.max(jnp.square(x.astype(jnp.float32)))), ()

    init = lambda key, x: ({}, jnp.zeros((), jnp.float32))
    return fn.Layer("peak", init, lambda p, s, x: x, fwd, lambda p, r, dy, c=fn.total: ({}, dy))


def losing(layer):
    """A loss with the state of `layer`, which sees the targets; its values are 0."""
    base = as_loss(layer)

    def fwd(params, state, pair, key):
        _, state, _ = layer.fwd({}, state, pair[1], key)
        return jnp.zeros(len(pair[1])), state, ()

    init = lambda key, pair: layer.init(key, pair[1])
    bwd = lambda params, residuals, dy, contract=fn.total: ({}, (jnp.zeros((len(dy), 3)), jnp.zeros((len(dy), 3))))
    return replace(base, name="losing", init=init, fwd=fwd, bwd=bwd)


STATEFUL = {
    "alone": (peak(), "", "peak"),
    "serial": (fn.serial(peak()), "['peak']", "peak"),
    "nested": (fn.serial(block=fn.serial(fn.relu(), deep=peak())), "['block']['deep']", "block/deep"),
    "skip": (fn.serial(fn.skip(fn.serial(peak()))), "['skip']['peak']", "skip/peak"),
    "repeat": (fn.serial(fn.repeat(fn.serial(peak()), 2)), "['repeat']['peak']", "repeat/peak"),
    "remat": (fn.serial(fn.remat(fn.serial(peak()))), "['serial']['peak']", "serial/peak"),
    "mixed": (fn.serial(fn.mixed(fn.serial(peak()))), "['serial']['peak']", "serial/peak"),
    "named": (fn.serial(fn.named("top", peak())), "['top']", "top"),
    "parallel": (fn.serial(fn.branch(a=peak(), b=fn.relu()), fn.add()), "['branch']['a']", "branch/a"),
    "freeze": (fn.serial(fn.freeze(fn.serial(peak()))), "['serial'].state['peak']", "serial/peak"),
    "batch_norm": (fn.serial(fn.batch_norm()), "['batch_norm']['var']", "batch_norm"),
    "batch_norm in repeat": (fn.serial(fn.repeat(fn.batch_norm(), 2)), "['repeat']['var']", "repeat"),
    "spectral_norm around one": (
        fn.serial(fn.spectral_norm(fn.serial(fn.dense(3), peak()))),
        "['spectral_norm']['layer']['peak']",
        "spectral_norm",
    ),
}  # fmt: skip


def big_at(step, scale):
    for i in itertools.count(1):
        rng = np.random.default_rng(i)
        x = rng.normal(size=(4, 3)).astype(np.float32)
        yield x * np.float32(scale if i == step else 1.0), np.zeros((4, 3), np.float32)


def bounded():
    """tanh, whatever comes: the loss and all gradients stay finite."""
    return fn.serial(fn.tanh())


CALLED = [(name, {}) for name in STATEFUL]
CALLED += [(name, {"steps_per_call": 3}) for name in ("serial", "repeat", "freeze", "batch_norm")]
CALLED += [(name, {"accumulate": 2}) for name in ("serial", "repeat", "freeze", "batch_norm")]


@pytest.mark.parametrize(("name", "options"), CALLED)
def test_a_step_that_spoils_a_state_is_not_made_and_named(name, options):
    model, leaf, layer = STATEFUL[name]
    objective = fn.objective(fn.serial(own=model, bounded=bounded()), fn.mse())
    optimizer, first = optax.sgd(0.1), next(big_at(0, 1.0))
    state = fn.init_train_state(objective, optimizer, jax.random.key(0), first)
    with pytest.raises(fn.NotFiniteError, match="step 3: loss") as caught:
        fn.fit(objective, optimizer, state, big_at(3, 1e20), 6, log_every=6, **options)
    said = str(caught.value).split("\n  ")
    layer = "own" if name == "alone" else f"own/{layer}"
    assert [f"state leaves not finite: ['model']['own']{leaf}", f"the layers of these: {layer}"] == said[-3:-1]
    assert int(caught.value.train_state.step) == 2
    chex.assert_tree_all_finite(caught.value.train_state.state)
    state = fn.init_train_state(objective, optimizer, jax.random.key(0), first)
    accumulate = options.get("accumulate", 1)
    wanted, _ = fn.fit(objective, optimizer, state, big_at(0, 1.0), 2, log_every=2, accumulate=accumulate)
    chex.assert_trees_all_close(caught.value.train_state.state, wanted.state, rtol=1e-5)


def test_the_state_of_a_loss_is_watched_too():
    objective = fn.objective(fn.serial(fn.dense(3)), losing(peak()))
    batch = np.ones((4, 3), np.float32), np.full((4, 3), 1e20, np.float32)
    state = fn.init_train_state(objective, optax.sgd(0.1), jax.random.key(0), batch)
    with pytest.raises(fn.NotFiniteError, match=r"state leaves not finite: \['loss'\]") as caught:
        fn.fit(objective, optax.sgd(0.1), state, [batch], 1)
    assert "the layers of these: losing" in str(caught.value)


def test_frozen_params_and_states_of_integers_are_passed_on_unwatched():
    frozen = fn.freeze(fn.serial(fn.dense(3, kernel_init=lambda *a: jnp.full((3, 3), 1e38)), fn.tanh()))
    objective = fn.objective(fn.serial(frozen), fn.mse())
    batch = next(big_at(0, 1.0))
    state = fn.init_train_state(objective, optax.sgd(0.1), jax.random.key(0), batch)
    jaxpr = jax.make_jaxpr(lambda s, x: changed(s, objective.model.fwd({"serial": {}}, s, x, None)[1]))
    assert not jaxpr(state.state["model"], batch[0]).out_avals
