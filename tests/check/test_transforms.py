"""The table of cases under what JAX does with programs: cut over devices, exported for any batch, stopped at a NaN."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import funcnet as fn
from funcnet.check.cases import CASES, Case
from tests.check import nans, walk

ROOT = Path(__file__).parents[2]
KEY = jax.random.key(0)
FEW = [
    "attention/cross, masks, tiles",
    "conv/depthwise",
    "conv/kernel larger than the input",
    "cross_entropy/soft labels",
    "ctc",
    "dropout",
    "from_function/no params, integers",
    "linear_cross_entropy/smoothing, ignored, z-loss, no bias",
    "lstm/lengths, reverse",
    "max_pool/overlapping",
    "transformer_block",
]


def some(cases):
    """The cases as parameters, all but a few marked as slow."""
    quick = lambda case: () if case.name in FEW else pytest.mark.slow
    return pytest.mark.parametrize("case", [pytest.param(case, marks=quick(case), id=case.name) for case in cases])


@pytest.mark.parametrize("cases", ["few", pytest.param("all", marks=pytest.mark.slow)])
def test_inside_shard_map_each_device_has_what_its_inputs_give_alone(cases):
    """With and without `check_vma`: `tests/check/sharded.py`, in a process that has two devices."""
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    run = [sys.executable, "-W", "error", "-m", "tests.check.sharded", cases]
    done = subprocess.run(run, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout) == {}


def near(got, wanted):
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    for a, b in zip(*map(jax.tree.leaves, (got, wanted)), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


def for_any(tree, size="b"):
    """Shapes of arrays with an open first axis."""
    (batch,) = jax.export.symbolic_shape(size)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((batch, *leaf.shape[1:]), leaf.dtype), tree)


def has_a_batch(case):
    """Whether the first axis of its input is one: whether the layer takes another size of it."""
    x = walk.inputs(case)
    if any(leaf.ndim == 0 for leaf in jax.tree.leaves(x)):
        return False
    params, state = jax.eval_shape(case.layer.init, KEY, x)
    try:
        jax.eval_shape(case.layer.apply, params, state, walk.inputs(case, batch=11))
    except fn.InputError:
        return False
    return True


WITHOUT_A_BATCH = {
    *("dense/rank 1", "embedding/one id", "position_embedding/no batch", "layer_norm/rank 1", "rms_norm/rank 1"),
    *("mlp/activation", "glu/rank 1", "prelu/rank 1", "cross_entropy/one example", "bilinear/rank 1, no bias"),
    "linear_cross_entropy/one position",
}
FIRST = {case.name.split("/")[0]: case for case in reversed(CASES)}  # of each rule


@some([case for case in CASES if case.name not in WITHOUT_A_BATCH])
def test_a_layer_is_exported_for_any_batch(case):
    """And gives what it gives there; of a rule's other cases the program alone is made, which is where sizes matter."""
    with jax.enable_x64(walk.dtype_of(case) == "float64"):
        params, state = walk.start(case, walk.inputs(case))
        f = jax.jit(lambda params, state, x: walk.passes(case, params, state, x, KEY))
        exported = jax.export.export(f)(params, state, for_any(walk.inputs(case)))
        if case not in FIRST.values() and case.name not in FEW:
            return
        for batch in (2, 5):
            x = walk.inputs(case, batch, batch)
            near(exported.call(params, state, x), f(params, state, x))


@pytest.mark.parametrize("name", sorted(WITHOUT_A_BATCH))
def test_what_is_not_exported_so_has_no_batch(name):
    case = next(case for case in CASES if case.name == name)
    assert not has_a_batch(case)


def language(n):
    ids = np.random.default_rng(n).integers(0, 7, (n, 6)).astype(np.int32)
    return ids[:, :-1], ids[:, 1:]


def pictures(n):
    rng = np.random.default_rng(n)
    return rng.standard_normal((n, 4, 4, 2)).astype(np.float32), rng.integers(0, 3, n).astype(np.int32)


def spoken(n):
    rng = np.random.default_rng(n)
    labels = {"labels": rng.integers(1, 4, (n, 2)).astype(np.int32)}
    lengths = {"label_lengths": np.full(n, 2, np.int32), "logit_lengths": np.full(n, 5, np.int32)}
    return rng.standard_normal((n, 5, 2)).astype(np.float32), labels | lengths


BLOCK = fn.transformer_block(4, 2, causal=True, rate=0.2)
SEEN = fn.serial(fn.conv(4, 3), fn.batch_norm(), fn.relu(), fn.max_pool(2), fn.flatten(), fn.dropout(0.3), fn.dense(3))
TRAINED = {
    "language": (fn.objective(fn.serial(fn.embedding(7, 4), BLOCK), fn.linear_cross_entropy(7, chunk=20)), language),
    "pictures": (fn.objective(SEEN, fn.cross_entropy()), pictures),
    "speech": (fn.objective(fn.serial(fn.gru(3), fn.dense(4)), fn.ctc()), spoken),
}


@pytest.mark.parametrize("name", TRAINED)
def test_gradients_and_training_steps_are_exported_for_any_batch(name):
    """With two micro-batches for any even one: nothing else says that they divide it."""
    objective, batch = TRAINED[name]
    optimizer = optax.sgd(0.1, momentum=0.9)
    start = fn.init_train_state(objective, optimizer, KEY, batch(4))
    passes = jax.jit(lambda batch: fn.value_and_grad(objective)(start.params, start.state, batch, KEY))
    steps = [fn.train_step(objective, optimizer, accumulate=n).compiled for n in (1, 2)]
    step = lambda compiled, batch: compiled((start.params, start.state, start.opt_state, start.step), KEY, batch, None)
    # what is donated is gone after the call
    programs = [passes, *(jax.jit(partial(step, compiled)) for compiled in steps)]
    for f, size in zip(programs, ("b", "b", "2*b"), strict=True):
        exported = jax.export.export(f)(for_any(batch(4), size))
        for n in (4, 6):
            near(exported.call(batch(n)), f(batch(n)))


def test_a_train_step_is_exported_as_it_is_compiled():
    objective, batch = TRAINED["pictures"]
    optimizer = optax.sgd(0.1)
    step, start = fn.train_step(objective, optimizer), fn.init_train_state(objective, optimizer, KEY, pictures(4))
    moving = lambda: jax.tree.map(jnp.array, (start.params, start.state, start.opt_state, start.step))
    exported = jax.export.export(step.compiled)(moving(), KEY, for_any(batch(4)), None)
    near(exported.call(moving(), KEY, batch(3), None), step.compiled(moving(), KEY, batch(3), None))


@some(CASES)
def test_no_nan_is_formed(case):
    with jax.enable_x64(walk.dtype_of(case) == "float64"):
        x = walk.inputs(case)
        params, state = walk.start(case, x)
        f = lambda params, state, x: walk.passes(case, params, state, x, KEY)
        assert nans.born(f, params, state, x) == []


SMOOTH = ["elu", "celu", "selu", "gelu", "silu", "mish", "softplus", "squareplus", "softsign", "sigmoid", "log_sigmoid"]
TOO_LONG = {"labels": np.int32([[1, 1]]), "label_lengths": np.int32([2]), "logit_lengths": np.int32([2])}
FAR = np.float32([-3e38, -1e20, -100, -1e-40, 0, 1e-40, 100, 1e20, 3e38])
HIDDEN = np.zeros((1, 3, 3), bool), np.full((1, 3, 3), -np.inf, np.float32)
EDGES = {
    "attention, all masked": (fn.attention(1, block=2), {"x": np.ones((1, 3, 2), np.float32), "mask": HIDDEN[0]}),
    "attention, a bias of -inf": (fn.attention(1), {"x": np.ones((1, 3, 2), np.float32), "bias": HIDDEN[1]}),
    "attention, no keys": (
        fn.attention(1, causal=True),
        {"x": np.ones((2, 3, 2), np.float32), "lengths": np.int32([0, 2])},
    ),
    "lstm, no steps": (fn.lstm(2), {"x": np.ones((2, 3, 2), np.float32), "lengths": np.int32([0, 3])}),
    **{
        f"{norm.name}, constant": (norm, np.full((3, 4, 4), 7.0, np.float32))
        for norm in (fn.layer_norm(), fn.batch_norm(), fn.group_norm(2), fn.instance_norm())
    },
    **{
        f"{layer.name}, zeros": (layer, np.zeros((2, 4, 4, 2), np.float32))
        for layer in (fn.rms_norm(), fn.l2_normalize(), fn.max_pool(3, 2, "SAME"), fn.avg_pool(3, padding="SAME"))
    },
    **{f"{name}, far away": (getattr(fn, name)(), FAR) for name in [*SMOOTH, "relu6", "tanh"]},
    "gelu, approximate, far away": (fn.gelu(approximate=True), FAR),
    "softmax, far away": (fn.softmax(), np.float32([[3e38, -3e38, 0]])),
    "log_softmax, far away": (fn.log_softmax(), np.float32([[3e38, -3e38, 0]])),
    "ctc, too few steps": (fn.ctc(), (np.zeros((1, 2, 3), np.float32), TOO_LONG)),
}


@pytest.mark.parametrize("name", EDGES)
def test_no_nan_is_formed_at_the_edges(name):
    layer, x = EDGES[name]
    case = Case(layer.name, layer, x)
    params, state = jax.jit(layer.init)(KEY, x)
    assert nans.born(lambda params, state, x: walk.passes(case, params, state, x, KEY), params, state, x) == []


def overwritten(x):
    return jnp.where(x > 0, jnp.log(x), 0.0)


def test_a_nan_that_is_overwritten_is_found_also_in_a_loop():
    x = jnp.float32([1, -1])
    looped = lambda x: jax.lax.scan(lambda carry, _: (overwritten(carry), None), x, None, length=2)[0]
    for f in (overwritten, jax.jit(overwritten), looped):
        assert "log" in nans.born(f, x)[0]
    assert nans.born(lambda x: jnp.where(x > -2, x, jnp.nan), x) == []
    with jax.debug_nans(True), pytest.raises(FloatingPointError):
        overwritten(x)
