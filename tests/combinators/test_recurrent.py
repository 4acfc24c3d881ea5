"""bidirectional and stacked: against PyTorch's own; lengths, states, contractions, and what they refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import funcnet as fn
from tests.layers.test_recurrent import (
    ALL,
    KEY,
    LAYERS,
    LENGTHS,
    STATE,
    B,
    D,
    H,
    T,
    X,
    close,
    inputs_of,
    params_of,
    torch_grads,
    torch_layer,
    torch_pull,
)


@ALL
def test_bidirectional_is_pytorchs(name, x64):
    torch = pytest.importorskip("torch")
    params = {"forward": params_of(name), "backward": params_of(name, seed=5)}
    (x, one, dy), (_, other, dy_other) = inputs_of(name), inputs_of(name, seed=2)
    make = lambda **options: LAYERS[name](H, return_state=True, **options)
    layer = fn.bidirectional(make(), make(reverse=True))
    both = lambda a, b: jax.tree.map(lambda *leaves: jnp.stack(leaves), a, b)
    dys, dstates = jnp.concatenate([dy[0], dy_other[0]], -1), (dy[1], dy_other[1])

    def run(params, inputs, dy):
        y, _, residuals = layer.fwd(params, {"forward": (), "backward": ()}, inputs, None)
        return y, *layer.bwd(params, residuals, dy)

    inputs = {"x": x, "lengths": LENGTHS, "state": (one, other)}
    y, dparams, dx = jax.jit(run)(params, inputs, (dys, dstates))
    theirs = torch_layer(torch, name, tuple(params.values()), torch.float64, bidirectional=True)
    wanted_y, wanted_dx, wanted_dstate = torch_pull(torch, theirs, x, both(one, other), (dys, both(*dstates)), LENGTHS)
    close((y[0], both(*y[1])), wanted_y)
    close(dparams, {"forward": torch_grads(name, theirs), "backward": torch_grads(name, theirs, "l0_reverse")})
    close((dx["x"], both(*dx["state"])), (wanted_dx, wanted_dstate))
    assert dx["lengths"] is None


def test_bidirectional_refuses_what_does_not_fit():
    uneven = fn.bidirectional(fn.rnn(2), fn.rnn(3, reverse=True))
    with pytest.raises(fn.InputError, match="two outputs of the same shape"):
        jax.eval_shape(uneven.init, KEY, X)
    with pytest.raises(fn.InputError, match="pair of initial states"):
        fn.bidirectional(fn.rnn(2), fn.rnn(2)).init(KEY, {"x": X, "state": STATE})
    layer = fn.bidirectional(fn.rnn(2), fn.rnn(2))
    params, state = layer.init(KEY, X)
    with pytest.raises(fn.InputError, match="cotangent"):
        layer.bwd(params, layer.fwd(params, state, X, None)[2], jnp.ones((*X.shape[:-1], 5)))


Y = jnp.ones((*X.shape[:2], 2))


@pytest.mark.parametrize("dy", [None, 1.0, (Y,), (Y, (Y[:, 0],)), (Y, (Y[:, 0],) * 3), (Y, Y, Y), {"y": Y}, (Y, {})])
@pytest.mark.parametrize("combinator", [fn.bidirectional, fn.stacked])
@pytest.mark.parametrize("return_state", [True, False])
def test_a_cotangent_that_is_not_like_the_output_is_refused(combinator, return_state, dy):
    layer = combinator(fn.rnn(2, return_state=return_state), fn.rnn(2, return_state=return_state))
    params, state = layer.init(KEY, X)
    residuals = layer.fwd(params, state, X, None)[2]
    with pytest.raises(fn.InputError, match="cotangent"):
        layer.bwd(params, residuals, dy)


def test_ids_have_no_gradient_through_both_directions():
    layer = fn.bidirectional(*(fn.serial(fn.embedding(5, 3), fn.rnn(2, reverse=reverse)) for reverse in (False, True)))
    ids = jnp.zeros((2, 3), jnp.int32)
    params, state = layer.init(KEY, ids)
    y, _, residuals = layer.fwd(params, state, ids, None)
    assert layer.bwd(params, residuals, jnp.ones_like(y))[1] is None


@ALL
def test_stacked_is_pytorchs(name, x64):
    """Two layers, the upper one of the lower one's size, with lengths and states; every gradient."""
    torch = pytest.importorskip("torch")
    layer = fn.stacked(LAYERS[name](H, return_state=True), LAYERS[name](H, return_state=True))
    params = dict(zip(layer.parts, (params_of(name), params_of(name, inputs=H, seed=5)), strict=True))
    (x, one, dy), (_, other, dy_other) = inputs_of(name), inputs_of(name, seed=2)
    both = lambda a, b: jax.tree.map(lambda *leaves: jnp.stack(leaves), a, b)
    dstates = dy[1], dy_other[1]

    def run(params, inputs, dy):
        y, _, residuals = layer.fwd(params, dict.fromkeys(layer.parts, ()), inputs, None)
        return y, *layer.bwd(params, residuals, dy)

    y, dparams, dx = jax.jit(run)(params, {"x": x, "lengths": LENGTHS, "state": (one, other)}, (dy[0], dstates))
    theirs = getattr(torch.nn, name.upper())(D, H, num_layers=2, batch_first=True, dtype=torch.float64)
    arrays = fn.to_torch(layer, params)
    theirs.load_state_dict({field: torch.from_numpy(array.copy()) for field, array in arrays.items()})
    wanted_y, wanted_dx, wanted_dstate = torch_pull(
        torch, theirs, x, both(one, other), (dy[0], both(*dstates)), LENGTHS
    )
    close((y[0], both(*y[1])), wanted_y)
    close((dx["x"], both(*dx["state"])), (wanted_dx, wanted_dstate))
    assert dx["lengths"] is None
    close(dparams, {key: torch_grads(name, theirs, f"l{i}") for i, key in enumerate(layer.parts)})


def test_what_looks_into_a_model_looks_into_both_directions_and_all_levels():
    model = fn.stacked(fn.bidirectional(fn.gru(2), fn.gru(2, reverse=True)), fn.rnn(2))
    paths = ["bidirectional", "bidirectional/forward", "bidirectional/backward", "rnn"]
    assert ["/".join(row.path) for row in fn.summary(model, X).rows] == paths
    objective, target = fn.objective(model, fn.mse()), jnp.zeros((*X.shape[:-1], 2), X.dtype)
    params, state = objective.init(KEY, (X, target))
    told = fn.explain(objective, params, state, (X, target))
    assert {step.name for step in told.steps} == set(paths[1:])
    dparams = fn.value_and_grad(objective)(params, state, (X, target))[1]["model"]
    both = dparams["bidirectional"]
    for step, own in zip(told.steps, (both["forward"], both["backward"], dparams["rnn"]), strict=True):
        norm = np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(own)))
        np.testing.assert_allclose(step.gradient, norm, rtol=1e-5, err_msg=step.name)


def test_stacked_of_an_array_is_serial(x64):
    layers = fn.gru(3), fn.rnn(2, reverse=True)
    stacked, serial = fn.stacked(*layers), fn.serial(*layers)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(B, T, D)))
    params, state = stacked.init(KEY, x)
    dy = jnp.asarray(np.random.default_rng(1).normal(size=(B, T, 2)))

    def run(layer, contract=fn.total):
        y, _, residuals = layer.fwd(params, state, x, None)
        return layer.apply(params, state, x), y, layer.bwd(params, residuals, dy, contract)

    for contract in (fn.total, fn.per_example, fn.squared_norm):
        jax.tree.map(np.testing.assert_array_equal, run(stacked, contract), run(serial, contract))
    rebuilt = stacked.rebuild(stacked.parts)
    jax.tree.map(np.testing.assert_array_equal, run(rebuilt), run(stacked))


def test_stacked_refuses_what_does_not_fit():
    with pytest.raises(fn.InputError, match="a tuple of 2 initial states"):
        fn.stacked(fn.rnn(2), fn.rnn(2)).init(KEY, {"x": X, "state": STATE})
    with pytest.raises(fn.InputError, match="a tuple of 2 initial states"):
        fn.stacked(fn.rnn(2), fn.rnn(2)).init(KEY, {"x": X, "state": None})
    with pytest.raises(fn.InputError, match="a dict of it as x"):
        fn.stacked(fn.rnn(2)).init(KEY, {"sequences": X})
    with pytest.raises(fn.InputError, match="final states of all layers, or of none"):
        fn.stacked(fn.rnn(2), fn.rnn(2, return_state=True)).init(KEY, X)
    with pytest.raises(fn.InputError, match="at least one layer"):
        fn.stacked()
    model = fn.stacked(fn.rnn(2), fn.rnn(2))
    with pytest.raises(fn.InputError, match="params for the layers"):
        model.apply({}, model.init(KEY, X)[1], X)
