"""What a batch may hold: `fit` and `evaluate` look at its values."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import funcnet as fn
from tests.train.small import INPUTS, LABELS, OBJECTIVE, OPTIMIZER, batches, fresh

pytestmark = pytest.mark.usefixtures("standard_promotion")


@pytest.mark.parametrize(
    ("dtype", "x64", "least"),
    [
        ("float32", False, 1.1754944e-38),
        ("bfloat16", False, 1.1754944e-38),
        ("float64", False, 1.1754944e-38),
        ("float16", False, 2.0**-24),
        ("float32", True, 1.1754944e-38),
        ("float64", True, 2.2250738585072014e-308),
    ],
)
def test_weights_that_xla_takes_for_0_are_refused(dtype, x64, least):
    """All other weights that can be written count, and by their ratios."""
    with jax.enable_x64(x64):
        weights = (np.array([1, 2, 0, 3, 1, 1, 2, 0]) * float(least)).astype(jnp.dtype(dtype))
        objective = fn.objective(fn.dense(3), fn.cross_entropy())
        data = INPUTS[:8], LABELS[:8]
        params, state = objective.init(jax.random.key(0), data)
        wanted = fn.evaluate(objective, params, state, [(*data, np.array([1, 2, 0, 3, 1, 1, 2, 0], np.float32))])
        assert fn.evaluate(objective, params, state, [(*data, weights)]) == pytest.approx(wanted, rel=1e-5)
        for small in (0.5, 2.0**-100) if dtype != "float16" else ():
            below = np.where(np.arange(8) == 4, float(least) * small, np.asarray(weights, float)).astype(weights.dtype)
            if below[4] > 0:
                with pytest.raises(
                    fn.InputError, match=r"at index \(4,\)\n  remedy    only ratios of the weights matter"
                ):
                    fn.evaluate(objective, params, state, [(*data, below)])


MASKING = {
    "mse": (fn.mse(), lambda t: t),
    "mae": (fn.mae(), lambda t: t),
    "huber": (fn.huber(), lambda t: t),
    "binary_cross_entropy": (fn.binary_cross_entropy(), lambda t: (t > 0).astype(np.float32)),
}


@pytest.mark.parametrize("anything", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", MASKING)
def test_what_a_mask_holds_back_may_be_anything(name, anything):
    loss, made = MASKING[name]
    objective = fn.objective(fn.dense(3), loss)
    mask = np.random.default_rng(0).uniform(size=(8, 3)) > 0.4
    mask[2], t = False, made(INPUTS[:8, :3])
    batch = lambda t: (INPUTS[:8], {"target": t, "mask": mask})
    held, zeros = batch(np.where(mask, t, np.float32(anything))), batch(np.where(mask, t, np.float32(0)))
    state = lambda: fn.init_train_state(objective, OPTIMIZER, jax.random.key(0), held)
    scores = [fn.evaluate(objective, state().params, state().state, [data]) for data in (held, zeros)]
    assert scores[0] == scores[1]
    ends = [fn.fit(objective, OPTIMIZER, state(), [data] * 2, 2, validation=[data]) for data in (held, zeros)]
    chex.assert_trees_all_equal(ends[0][0].params, ends[1][0].params)
    assert ends[0][1] == ends[1][1]
    bad = np.where(np.arange(24).reshape(8, 3) == np.flatnonzero(mask)[3], np.float32(anything), t)
    with pytest.raises(fn.InputError, match=r"finite numbers\n.* of \['target'\]; 1 such of 24"):
        fn.evaluate(objective, state().params, state().state, [batch(bad)])


def test_booleans_as_weights_are_those_that_count():
    batch, mask = (INPUTS[:8], LABELS[:8]), np.arange(8) % 3 > 0
    state = fresh()
    scores = fn.evaluate(OBJECTIVE, state.params, state.state, [(*batch, mask)])
    wanted = fn.evaluate(OBJECTIVE, state.params, state.state, [(batch[0][mask], batch[1][mask])])
    assert scores == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize(
    ("weights", "word"),
    [
        (np.ones(7, np.float32), "7 in \\['weights'\\]"),
        (np.ones((8, 1), np.float32), r"received  float32\[8, 1\]"),
        (np.ones(8, np.int32), "convert integers with"),
        (np.where(np.arange(8) == 3, -1, 1.0), "-1.0 at index \\(3,\\)"),
        (np.where(np.arange(8) == 3, np.nan, 1.0), "nan at index \\(3,\\)"),
        (np.where(np.arange(8) == 3, np.inf, 1.0), "inf at index \\(3,\\)"),
        (np.full(8, 1e300), "1e\\+300 at index \\(0,\\)"),
        ([1.0] * 8, "arrays"),
        ({"a": np.ones(8)}, "as one array"),
    ],
)
def test_weights_that_are_none_are_refused(weights, word):
    batch, state = (INPUTS[:8], LABELS[:8], weights), fresh()
    with pytest.raises(fn.InputError, match=word):
        fn.evaluate(OBJECTIVE, state.params, state.state, [batch])
    with pytest.raises(fn.InputError, match=word):
        fn.fit(OBJECTIVE, OPTIMIZER, state, [batch], 1)


ATTENDING = fn.objective(fn.serial(fn.attention(1), fn.select(), fn.global_avg_pool(), fn.dense(3)), fn.cross_entropy())


@pytest.mark.parametrize(("value", "fits"), [(-np.inf, True), (np.inf, False), (np.nan, False)])
def test_a_bias_of_attention_may_forbid_and_nothing_else_may_be_infinite(value, fits):
    rng = np.random.default_rng(0)
    x, bias = rng.normal(size=(4, 5, 2)).astype(np.float32), np.zeros((4, 5, 5), np.float32)
    bias[:, :, 3:] = value
    batch = {"x": x, "bias": bias}, LABELS[:4]
    state = fn.init_train_state(ATTENDING, OPTIMIZER, jax.random.key(0), batch)
    if fits:
        short = {"x": x, "bias": np.where(np.isinf(bias), np.float32(-1e30), bias)}, LABELS[:4]
        wanted = fn.evaluate(ATTENDING, state.params, state.state, [short])
        assert fn.evaluate(ATTENDING, state.params, state.state, [batch]) == pytest.approx(wanted, rel=1e-5)
        state, _ = fn.fit(ATTENDING, OPTIMIZER, state, [batch], 1)
        chex.assert_tree_all_finite(state.params)
    else:
        with pytest.raises(fn.InputError, match=r"at index .* of \['bias'\]"):
            fn.fit(ATTENDING, OPTIMIZER, state, [batch], 1)
    elsewhere = {"x": np.full_like(x, -np.inf), "bias": np.zeros_like(bias)}, LABELS[:4]
    with pytest.raises(fn.InputError, match=r"-inf at index .* of \['x'\]"):
        fn.evaluate(ATTENDING, *ATTENDING.init(jax.random.key(0), batch), [elsewhere])


@pytest.mark.parametrize("place", range(3), ids=["inputs", "targets", "weights"])
def test_another_order_of_bytes_is_refused_also_once_the_program_is_compiled(place):
    batch = (*next(batches()),)
    batch = (*batch[:2], np.ones(len(batch[1]), np.float32))
    state = fresh()
    fn.evaluate(OBJECTIVE, state.params, state.state, [batch])
    swapped = tuple(a.astype(a.dtype.newbyteorder(">")) if i == place else a for i, a in enumerate(batch))
    with pytest.raises(fn.InputError, match="order of bytes"):
        fn.evaluate(OBJECTIVE, state.params, state.state, [swapped])
    with pytest.raises(fn.InputError, match="order of bytes"):
        fn.fit(OBJECTIVE, OPTIMIZER, state, [swapped], 1)
