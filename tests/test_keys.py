"""Random keys: every draw of `init` and of training has one of its own, and what is drawn again says so."""

import inspect
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import funcnet as fn
from funcnet._internal.casting import cast
from funcnet.check.cases import CASES
from funcnet.check.spec import drawn, specs

KEY = jax.random.key(0)
X, SEQUENCES = jnp.ones((4, 3)), jnp.ones((2, 3, 4))
NORMAL = jax.nn.initializers.normal(1.0)
BOTH = {"kernel_init": NORMAL, "bias_init": NORMAL}
RECURRENT = {"kernel_init": NORMAL, "recurrent_init": NORMAL}
LABELS = jnp.zeros(4, jnp.int32)
# of every constructor that takes an initializer
DRAWING = {
    "attention": (fn.attention(2, **BOTH), SEQUENCES),
    "bilinear": (fn.bilinear(3, **BOTH), (X, X)),
    "conv": (fn.conv(4, 3, **BOTH), SEQUENCES),
    "conv_transpose": (fn.conv_transpose(4, 3, **BOTH), SEQUENCES),
    "dense": (fn.dense(5, **BOTH), X),
    "depthwise_conv": (fn.depthwise_conv(3, multiplier=2, **BOTH), SEQUENCES),
    "embedding": (fn.embedding(7, 5, embedding_init=NORMAL), LABELS),
    "gru": (fn.gru(4, **RECURRENT), SEQUENCES),
    "linear_cross_entropy": (fn.linear_cross_entropy(5, **BOTH), (X, LABELS)),
    "lstm": (fn.lstm(4, **RECURRENT), SEQUENCES),
    "moe": (fn.moe(fn.dense(3, **BOTH), 2, kernel_init=NORMAL), SEQUENCES),
    "position_embedding": (fn.position_embedding(5, embedding_init=NORMAL), SEQUENCES),
    "residual_block": (fn.residual_block(4, 2, kernel_init=NORMAL), jnp.ones((2, 4, 4, 3))),
    "rnn": (fn.rnn(4, **RECURRENT), SEQUENCES),
}
DENSE = fn.dense(3, **BOTH)
COMBINED = {
    "serial": (fn.serial(DENSE, fn.serial(DENSE, DENSE), DENSE), X),
    "parallel": (fn.parallel(DENSE, DENSE), (X, X)),
    "branch": (fn.branch(DENSE, DENSE), X),
    "repeat": (fn.repeat(DENSE, 3), X),
    "repeat of repeats": (fn.repeat(fn.repeat(DENSE, 2), 2), X),
    "skip": (fn.skip(DENSE, fn.dense(3, **BOTH)), X),
    "stacked": (fn.stacked(fn.gru(4, **RECURRENT), fn.gru(4, **RECURRENT)), SEQUENCES),
    "bidirectional": (fn.bidirectional(fn.rnn(4, **RECURRENT), fn.rnn(4, reverse=True, **RECURRENT)), SEQUENCES),
    "reversible": (fn.reversible(fn.dense(2, **BOTH), fn.dense(2, **BOTH)), jnp.ones((2, 4))),
    "frozen": (fn.freeze(fn.serial(DENSE, DENSE)), X),
    "mixed": (fn.mixed(fn.serial(DENSE, DENSE), "float32", "float32", "float32"), X),
    "spectral_norm": (fn.spectral_norm(fn.serial(DENSE, DENSE)), X),
    "lru": (fn.lru(3, 4), SEQUENCES),
}


def takes_an_initializer(name):
    make = getattr(fn, name)
    return inspect.isfunction(make) and any(p.endswith("_init") for p in inspect.signature(make).parameters)


def test_every_constructor_that_takes_an_initializer_is_here():
    assert set(DRAWING) == {name for name in fn.__all__ if takes_an_initializer(name)}


@pytest.mark.parametrize("name", DRAWING | COMBINED)
def test_no_draw_is_another_ones(name):
    """All from one distribution, so that what is drawn twice, in whatever shape, has equal numbers."""
    layer, x = (DRAWING | COMBINED)[name]
    numbers = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(layer.init(KEY, x))])
    numbers = numbers[(numbers != 0) & (numbers != 1)]  # those are not drawn
    assert len(numbers)
    assert len(np.unique(numbers)) == len(numbers)


@pytest.mark.parametrize(
    ("with_bias", "without"),
    [
        (fn.dense(3, **BOTH), fn.dense(3, use_bias=False, **BOTH)),
        (fn.conv(4, 3, **BOTH), fn.conv(4, 3, use_bias=False, **BOTH)),
        (fn.conv_transpose(4, 3, **BOTH), fn.conv_transpose(4, 3, use_bias=False, **BOTH)),
    ],
    ids=["dense", "conv", "conv_transpose"],
)
def test_a_kernel_is_the_same_with_and_without_a_bias(with_bias, without):
    a, b = (layer.init(KEY, SEQUENCES)[0]["kernel"] for layer in (with_bias, without))
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_no_key_is_used_twice_within_a_step(case, x64):
    """`jit` asks when it traces: nothing is compiled. Parameters, a step and its gradients, each from a key."""
    layer = case.layer
    x = cast(jax.tree.map(jnp.asarray, drawn(specs(case.x), 0)), case.dtypes[0])

    def step(init_key, key, x):
        params, state = layer.init(init_key, x)
        y, state, residuals = layer.fwd(params, state, x, key)
        floating = lambda y: jnp.ones_like(y) if jnp.issubdtype(y.dtype, jnp.floating) else None
        return params, state, layer.bwd(params, residuals, jax.tree.map(floating, y))

    with jax.debug_key_reuse(True):
        jax.jit(step).trace(KEY, jax.random.key(1), x)


DROPPING = fn.serial(
    fn.dense(4), fn.dropout(0.5), fn.remat(fn.serial(fn.dense(4), fn.dropout(0.5))), fn.repeat(fn.drop_path(0.5), 2)
)
MODELS = {
    "dropout": DROPPING,
    "dropout alone": fn.serial(fn.spatial_dropout(0.5), fn.dense(3)),
    "spectral norm": fn.serial(fn.spectral_norm(fn.serial(fn.dense(4), fn.tanh(), fn.dense(3)))),
    "reversible": fn.serial(fn.dense(4), fn.reversible(fn.dropout(0.5), fn.serial(fn.dense(2), fn.dropout(0.5)))),
    "weight norm around dropout": fn.weight_norm(fn.serial(fn.dense(4), fn.dropout(0.5), fn.dense(3))),
    "embedding": fn.serial(fn.embedding(5, 4), fn.dropout(0.5)),
    "one layer": fn.dropout(0.5),
}


@pytest.fixture
def watched():
    with jax.debug_key_reuse(True):
        yield


@pytest.mark.parametrize("name", MODELS)
def test_training_uses_no_key_twice(name, watched):
    """A step, one of two micro-batches, two in one call, layer by layer, and examples' gradients: traced alone."""
    x = jnp.zeros(4, jnp.int32) if name == "embedding" else jnp.ones((4, 3))
    objective, optimizer, batch = fn.objective(MODELS[name], fn.cross_entropy()), optax.sgd(0.1), (x, LABELS)
    state = jax.jit(lambda key: fn.init_train_state(objective, optimizer, key, batch)).eval_shape(KEY)
    fn.train_step(objective, optimizer).lower(state, batch)
    fn.train_step(objective, optimizer, accumulate=2).lower(state, batch)
    fn.train_step(objective, optimizer, steps=2).lower(state, jax.tree.map(lambda a: jnp.stack([a, a]), batch))
    if MODELS[name].parts:
        fn.layerwise_step(objective, optimizer).lower(state, batch)
    run = fn.value_and_grad(objective)
    jax.jit(partial(run, contract=fn.per_example)).trace(state.params, state.state, batch, KEY)


def test_a_step_can_be_taken_with_the_train_state_of_the_last(watched, standard_promotion):
    """Outside of `jit` a key remembers that it was used."""
    model = fn.serial(fn.dropout(0.5), fn.spectral_norm(fn.dense(3)))
    objective, optimizer, batch = fn.objective(model, fn.cross_entropy()), optax.sgd(0.1), (X, LABELS)
    state, step = (
        fn.init_train_state(objective, optimizer, jax.random.key(0), batch),
        fn.train_step(objective, optimizer),
    )
    for _ in range(2):
        state, _ = step(state, batch)
    fn.value_and_grad(objective)(state.params, state.state, batch, jax.random.fold_in(state.key, 2))


@pytest.mark.parametrize("layer", [fn.dropout(0.5), fn.remat(fn.dropout(0.5))], ids=["dropout", "remat"])
def test_a_backward_pass_draws_again_what_its_forward_pass_drew(layer, watched):
    y, _, residuals = layer.fwd({}, (), X, jax.random.key(1))
    for _ in range(2):
        np.testing.assert_array_equal(layer.bwd({}, residuals, X)[1], y)


def test_fit_and_the_checker_use_no_key_twice(watched, standard_promotion):
    objective, optimizer, batch = fn.objective(fn.dropout(0.5), fn.cross_entropy()), optax.sgd(0.1), (X, LABELS)
    state = fn.init_train_state(objective, optimizer, jax.random.key(0), batch)
    state, _ = fn.fit(objective, optimizer, state, [batch] * 4, 4, steps_per_call=2, validation=[batch])
    fn.check_layer(fn.dropout(0.5), "f32[3,2]").raise_for_failure()


def test_a_key_that_the_caller_uses_twice_is_still_found(watched):
    layer, key = fn.dropout(0.5), jax.random.key(0)
    layer.fwd({}, (), X, key)
    with pytest.raises(jax.errors.KeyReuseError):
        layer.fwd({}, (), X, key)
