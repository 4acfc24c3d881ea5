"""What is said of a step that is not finite: the first layer, the leaves, and what is not to blame."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import funcnet as fn
from funcnet.train.finite import not_finite

pytestmark = pytest.mark.usefixtures("standard_promotion")

OBJECTIVE = fn.objective(fn.serial(fn.dense(4), out=fn.dense(3)), fn.cross_entropy())
BATCH = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32), np.array([0, 1, 2, 0, 1], np.int32)
ROW = {"loss": 1.0, "grad_norm": 1.0, "update_norm": 1.0}
SGD = optax.sgd(0.1)
STATE = fn.init_train_state(OBJECTIVE, SGD, jax.random.key(0), BATCH)


def facts(batch=BATCH, objective=OBJECTIVE, state=STATE, optimizer=SGD, accumulate=1, **row):
    """What is said of a step with these numbers, a line a fact, less the first and the remedy."""
    error = not_finite(objective, optimizer, accumulate, state, batch, 7, ROW | row)
    assert isinstance(error, FloatingPointError)
    first, *lines, remedy = str(error).split("\n  ")
    assert first == "step 7: " + ", ".join(f"{name} {value}" for name, value in (ROW | row).items())
    assert remedy.startswith("a smaller learning rate")
    return lines


def test_the_first_layer_that_is_not_finite_is_named_and_every_leaf():
    x = BATCH[0].copy()
    x[0] = 3e38
    further = jax.tree_util.tree_map_with_path(
        lambda path, p: p + np.float32(2) * ("['dense']['kernel']" in jax.tree_util.keystr(path)), STATE.params
    )
    first, leaves = facts((x, BATCH[1]), state=replace(STATE, params=further), loss=np.inf)
    assert first == "the first layer with an output that is not finite: dense"
    assert leaves.startswith("gradient leaves not finite: ")
    assert "['out']['kernel']" in leaves


def spoiled(path, value, state=STATE):
    """The state with one entry of a parameter set."""
    change = lambda p, leaf: leaf.at[(0,) * leaf.ndim].set(value) if jax.tree_util.keystr(p) == path else leaf
    return replace(state, params=jax.tree_util.tree_map_with_path(change, state.params))


def test_parameters_that_were_not_finite_before_are_named_first():
    before, layer, leaves = facts(state=spoiled("['model']['out']['bias']", np.nan), loss=np.nan)
    assert before == "parameters not finite before this step: ['model']['out']['bias']"
    assert layer == "the first layer with an output that is not finite: out"
    assert "gradient leaves not finite" in leaves


def test_a_repeat_counts_as_one_layer():
    objective = fn.objective(fn.serial(deep=fn.repeat(fn.dense(4), 2)), fn.cross_entropy())
    state = fn.init_train_state(objective, optax.sgd(0.1), jax.random.key(0), BATCH)
    lines = facts(objective=objective, state=spoiled("['model']['deep']['kernel']", np.inf, state), loss=np.nan)
    assert lines[1] == "the first layer with an output that is not finite: deep"


def test_a_norm_that_overflows_is_blamed_on_the_largest_leaf():
    """Squares beyond float32 of gradients that are within: the kernel's are as large as the input."""
    x = np.full((5, 4), 1e19, np.float32)
    objective = fn.objective(fn.serial(fn.dense(3)), fn.cross_entropy())
    state = fn.init_train_state(objective, optax.sgd(0.1), jax.random.key(0), BATCH)
    (line,) = facts((x, BATCH[1]), objective, state, grad_norm=np.inf)
    (_, _), grads = fn.value_and_grad(objective)(state.params, state.state, (x, BATCH[1]))
    largest = np.abs(grads["model"]["dense"]["kernel"]).max()
    assert largest**2 < np.finfo(np.float32).max
    wanted = f"the largest is {largest:.3g} at ['model']['dense']['kernel']"
    assert line == f"all entries of the gradients are finite, their norm overflows; {wanted}"


def test_an_update_whose_norm_overflows_is_told_from_one_that_is_not_finite():
    (line,) = facts(optimizer=optax.sgd(1e20), update_norm=np.inf)
    assert line.startswith("all entries of the update are finite, their norm overflows; the largest is ")
    (line,) = facts(optimizer=optax.sgd(float("inf")), update_norm=np.inf)
    assert line.startswith("loss and gradients are finite, the optimizer's update is not: ['model']['dense']['bias']")


def test_parameters_without_entries_are_passed_over():
    nothing = {"w": jnp.zeros(0)}
    empty = fn.stateless("empty", lambda key, x: nothing, lambda p, x: (x, None), lambda p, r, dy, c: (nothing, dy))
    objective = fn.objective(fn.serial(empty, out=fn.dense(3)), fn.cross_entropy())
    state = fn.init_train_state(objective, SGD, jax.random.key(0), BATCH)
    for norm, optimizer in (("grad_norm", SGD), ("update_norm", optax.sgd(1e20))):
        (line,) = facts(BATCH, objective, state, optimizer, **{norm: np.inf})
        assert "the largest is " in line
        assert "['out']" in line


@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_step_is_made_again_as_it_was_made_in_micro_batches_too(accumulate):
    """1e20 beside itself, as in these micro-batches, has variance 0; beside 0 it is infinite."""
    x = np.array([[1e20], [0], [0], [1e20], [0], [0]], np.float32)
    batch = x, np.zeros((6, 1), np.float32)
    objective = fn.objective(fn.serial(fn.batch_norm()), fn.mse())
    state = fn.init_train_state(objective, SGD, jax.random.key(0), batch)
    said = facts(batch, objective, state, accumulate=accumulate)
    assert ("state leaves not finite: ['model']['batch_norm']['var']" in said) == (accumulate == 1)


def test_states_that_are_not_finite_are_named_with_their_layers():
    model = fn.serial(fn.dense(4), block=fn.skip(fn.serial(fn.batch_norm(), fn.relu())), out=fn.dense(3))
    objective = fn.objective(model, fn.cross_entropy())
    batch = BATCH[0] * np.float32(1e20), BATCH[1]
    state = fn.init_train_state(objective, SGD, jax.random.key(0), batch)
    *_, leaves, layers = facts(batch, objective, state)
    assert leaves == "state leaves not finite: ['model']['block']['batch_norm']['var']"
    assert layers == "the layers of these: block/batch_norm"
    bad = replace(state, state=jax.tree.map(lambda s: jnp.full_like(s, jnp.inf), state.state))
    first, *_ = facts(BATCH, objective, bad)
    names = "['model']['block']['batch_norm']['mean'], ['model']['block']['batch_norm']['var']"
    assert first == f"state not finite before this step: {names}"


def test_a_loss_alone_is_told():
    assert facts(loss=np.inf) == ["the gradients are finite, the loss is not"]


def test_a_layer_is_named_before_a_loss_with_parameters():
    head = fn.objective(fn.serial(fn.dense(4), fn.tanh()), fn.linear_cross_entropy(3))
    state = fn.init_train_state(head, optax.sgd(0.1), jax.random.key(0), BATCH)
    bad = spoiled("['model']['dense']['bias']", np.inf, state)
    lines = facts(objective=head, state=bad, loss=np.nan)
    assert "the first layer with an output that is not finite: dense" in lines


def test_the_step_s_own_key_is_used_again():
    """A layer that fails for one draw only is found again: the state's key, folded with its step."""
    drawn = []

    def fwd(params, state, x, key):
        drawn.append(jax.random.key_data(key))
        return x, state, ()

    layer = fn.Layer("draws", lambda key, x: ({}, ()), lambda p, s, x: x, fwd, lambda p, r, dy, c=fn.total: ({}, dy))
    objective = fn.objective(layer, fn.cross_entropy())
    state = replace(
        STATE, params={"model": {}, "loss": {}}, state={"model": (), "loss": ()}, step=jnp.asarray(3, STATE.step.dtype)
    )
    facts((BATCH[0][:, :3], BATCH[1]), objective, state, loss=np.inf)
    wanted = jax.random.key_data(jax.random.fold_in(STATE.key, 3))
    np.testing.assert_array_equal(drawn[-1], wanted)
