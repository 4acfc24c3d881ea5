"""The loop: what it logs, what it refuses, and how it stops."""

import gc
import itertools
import json
import os
import signal
import threading
import time
import weakref
from dataclasses import replace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import funcnet as fn
from funcnet._internal import expect
from funcnet.losses.loss import as_loss
from funcnet.train import loop
from funcnet.train.run import read_metrics

pytestmark = pytest.mark.usefixtures("standard_promotion")

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


def test_fit_makes_the_steps_of_train_step():
    step, state = fn.train_step(OBJECTIVE, OPTIMIZER), fresh()
    for batch in itertools.islice(batches(), 6):
        state, _ = step(state, batch)
    for options in ({}, {"steps_per_call": 3}):
        fitted, _ = fn.fit(OBJECTIVE, OPTIMIZER, fresh(), batches(), 6, log_every=3, **options)
        chex.assert_trees_all_close(fitted.params, state.params, rtol=1e-5, atol=1e-6)
        assert int(fitted.step) == 6


def test_records_are_means_and_are_written_as_json_lines(tmp_path, capsys):
    validation = [(INPUTS[:30], LABELS[:30]), (INPUTS[30:], LABELS[30:])]
    state, history = fn.fit(
        OBJECTIVE, OPTIMIZER, fresh(), batches(), 10, log_every=4, validation=validation, run_dir=tmp_path / "run"
    )
    assert [record["step"] for record in history] == [4, 8, 10]
    assert read_metrics(tmp_path / "run") == history
    assert set(history[0]) == {
        "step", "loss", "accuracy", "grad_norm", "update_norm", "val_loss", "val_accuracy"
    }  # fmt: skip
    _, each = fn.fit(OBJECTIVE, OPTIMIZER, fresh(), batches(), 4, log_every=1)
    np.testing.assert_allclose(history[0]["loss"], np.mean([record["loss"] for record in each]), rtol=1e-5)
    predicted = np.argmax(MODEL.apply(state.params["model"], state.state["model"], INPUTS), 1)
    np.testing.assert_allclose(history[-1]["val_accuracy"], np.mean(predicted == LABELS))
    assert "step 4/10  loss" in capsys.readouterr().out


def test_a_run_goes_on_from_its_state():
    whole, _ = fn.fit(OBJECTIVE, OPTIMIZER, fresh(), batches(), 6, log_every=6)
    source = batches()
    half, _ = fn.fit(OBJECTIVE, OPTIMIZER, fresh(), source, 3, log_every=3)
    rest, history = fn.fit(OBJECTIVE, OPTIMIZER, half, source, 3, log_every=3)
    chex.assert_trees_all_close(rest.params, whole.params, rtol=1e-6)
    assert history[-1]["step"] == 6


@pytest.mark.parametrize(
    ("bad", "path", "word"),
    [
        (lambda x, t: (np.where(x > 1, np.nan, x), t), "inputs", "nan at index"),
        (lambda x, t: (np.where(x > 1, np.inf, x), t), "inputs", "inf at index"),
        (lambda x, t: (x, t + 1), "cross_entropy", "labels from 0 to 2"),
        (lambda x, t: (x[:, :2], t), "dense", "6 features"),
    ],
)
def test_a_bad_batch_is_refused_and_what_was_written_stays(tmp_path, bad, path, word):
    with pytest.raises(fn.InputError, match=word) as caught:
        fn.fit(OBJECTIVE, OPTIMIZER, fresh(), batches(5, bad), 10, log_every=2, run_dir=tmp_path)
    assert caught.value.path == (path,)
    assert [record["step"] for record in read_metrics(tmp_path)] == [2, 4]


def test_a_loss_that_is_not_finite_stops_with_step_layer_and_leaf(tmp_path):
    big = lambda x, t: (np.full_like(x, 3e38), t)
    with pytest.raises(fn.NotFiniteError, match="step 6: loss") as caught:
        fn.fit(OBJECTIVE, OPTIMIZER, fresh(), batches(5, big), 10, log_every=2, steps_per_call=2, run_dir=tmp_path)
    assert "['out']['kernel']" in str(caught.value)
    assert "the first layer with an output that is not finite: dense" in str(caught.value)
    assert [record["step"] for record in read_metrics(tmp_path)] == [2, 4]
    kept = caught.value.train_state
    assert int(kept.step) == 5
    wanted, _ = fn.fit(OBJECTIVE, OPTIMIZER, fresh(), batches(), 5, log_every=5)
    chex.assert_trees_all_close(kept.params, wanted.params, rtol=1e-6)


def test_an_update_that_is_not_finite_is_not_made():
    optimizer = optax.sgd(float("inf"))
    state = fn.init_train_state(OBJECTIVE, optimizer, jax.random.key(0), next(batches()))
    with pytest.raises(fn.NotFiniteError, match=r"step 1: .*update_norm inf") as caught:
        fn.fit(OBJECTIVE, optimizer, state, batches(), 1)
    chex.assert_tree_all_finite(caught.value.train_state.params)


def test_whatever_stops_training_carries_the_state_so_far():
    def interrupted():
        yield from itertools.islice(batches(), 3)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        fn.fit(OBJECTIVE, OPTIMIZER, fresh(), interrupted(), 10)
    assert int(caught.value.train_state.step) == 3
    with pytest.raises(fn.InputError, match="batches for 10 steps") as short:
        fn.fit(OBJECTIVE, OPTIMIZER, fresh(), itertools.islice(batches(), 3), 10)
    wanted, _ = fn.fit(OBJECTIVE, OPTIMIZER, fresh(), batches(), 3)
    chex.assert_trees_all_close(short.value.train_state.params, wanted.params, rtol=1e-6)


def test_validation_data_is_looked_at_before_training(tmp_path):
    for validation, word in (([], "at least one validation batch"), ([(INPUTS, LABELS + 1)], "labels from 0 to 2")):
        state = fresh()
        with pytest.raises(fn.InputError, match=word):
            fn.fit(OBJECTIVE, OPTIMIZER, state, batches(), 5, validation=validation, run_dir=tmp_path / "run")
        assert not jax.tree.leaves(state.params)[0].is_deleted()
        assert not (tmp_path / "run").exists()


def test_batches_of_two_shapes_in_one_call_are_refused():
    source = iter([(INPUTS[:8], LABELS[:8]), (INPUTS[:5], LABELS[:5])])
    with pytest.raises(fn.InputError, match="2 batches of one shape"):
        fn.fit(OBJECTIVE, OPTIMIZER, fresh(), source, 2, log_every=2, steps_per_call=2)


def test_too_few_batches_and_uneven_steps_are_refused():
    with pytest.raises(fn.InputError, match="batches for 10 steps, in which something counts"):
        fn.fit(OBJECTIVE, OPTIMIZER, fresh(), itertools.islice(batches(), 4), 10)
    with pytest.raises(fn.InputError, match="multiples of steps_per_call"):
        fn.fit(OBJECTIVE, OPTIMIZER, fresh(), batches(), 10, steps_per_call=4)


def test_evaluate_is_the_mean_over_examples_whatever_the_batches():
    state = fresh()
    whole = fn.evaluate(OBJECTIVE, state.params, state.state, [(INPUTS, LABELS)])
    parts = [(INPUTS[:7], LABELS[:7]), (INPUTS[7:], LABELS[7:])]
    assert fn.evaluate(OBJECTIVE, state.params, state.state, parts) == pytest.approx(whole, rel=1e-5)
    predicted = np.argmax(MODEL.apply(state.params["model"], state.state["model"], INPUTS), 1)
    assert whole["accuracy"] == pytest.approx(np.mean(predicted == LABELS))
    with pytest.raises(fn.InputError, match="at least one batch"):
        fn.evaluate(OBJECTIVE, state.params, state.state, [])


def test_an_earlier_run_is_not_overwritten(tmp_path):
    fn.fit(OBJECTIVE, OPTIMIZER, fresh(), batches(), 2, run_dir=tmp_path, config={"seed": 3})
    assert json.loads((tmp_path / "config.json").read_text()) == {"seed": 3}
    assert json.loads((tmp_path / "environment.json").read_text())["jax"] == jax.__version__
    before = (tmp_path / "metrics.jsonl").read_text()
    with pytest.raises(FileExistsError, match="not empty"):
        fn.fit(OBJECTIVE, OPTIMIZER, fresh(), batches(), 1, run_dir=tmp_path)
    assert (tmp_path / "metrics.jsonl").read_text() == before
    fn.fit(OBJECTIVE, OPTIMIZER, fresh(), batches(), 1, run_dir=tmp_path, overwrite=True)
    assert [record["step"] for record in read_metrics(tmp_path)] == [1]


@pytest.fixture
def interruptible():
    """Ctrl-C as in a terminal, also where a shell has started the tests with it switched off."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Finalised:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.001)  # the signal is looked for here, and Python drops what it raises


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_ctrl_c_that_python_drops_is_heard_after_the_step(interruptible):
    def interrupting():
        for i, batch in enumerate(batches()):
            if i == 3:
                Finalised()
            yield batch

    with pytest.raises(KeyboardInterrupt) as caught:
        fn.fit(OBJECTIVE, OPTIMIZER, fresh(), interrupting(), 1000)
    assert int(caught.value.train_state.step) == 4


@pytest.mark.parametrize("delay", [0.0005 * i for i in range(12)])
def test_ctrl_c_at_any_moment_leaves_a_state_to_go_on_with(delay, interruptible):
    def interrupting():
        for i, batch in enumerate(batches()):
            if i == 3:
                threading.Timer(delay, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
            yield batch

    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt) as caught:
        fn.fit(OBJECTIVE, OPTIMIZER, fresh(), interrupting(), 100_000)
    assert signal.getsignal(signal.SIGINT) is handler
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(caught.value.train_state))
    _, (record,) = fn.fit(OBJECTIVE, OPTIMIZER, caught.value.train_state, batches(), 1)
    assert record["step"] >= 4


def test_the_key_is_not_donated():
    state = fresh()
    fn.fit(OBJECTIVE, OPTIMIZER, state, batches(), 1)
    assert not state.key.is_deleted()


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


def test_a_metric_that_is_not_finite_is_null_in_the_file(tmp_path):
    objective = fn.objective(MODEL, fn.cross_entropy(), {"odd": lambda p, t: t / 0.0 * 0.0})
    fn.fit(objective, OPTIMIZER, fresh(), batches(), 1, run_dir=tmp_path / "run")
    line = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert json.loads(line, parse_constant=pytest.fail)["odd"] is None


@pytest.mark.parametrize("loss", [fn.mse(), fn.cross_entropy()], ids=["mse", "soft labels"])
def test_numpy_s_float64_is_float32_everywhere(loss):
    inputs, targets = INPUTS.astype(np.float64), np.eye(3)[LABELS]
    objective = fn.objective(fn.serial(fn.repeat(fn.dense(6), 2), fn.mixed(fn.dense(3))), loss)
    state = fn.init_train_state(objective, OPTIMIZER, jax.random.key(0), (inputs, targets))
    fn.fit(objective, OPTIMIZER, state, [(inputs, targets)], 1, validation=[(inputs, targets)])


HEAD = fn.objective(fn.serial(fn.dense(16), fn.relu()), fn.linear_cross_entropy(3))


def test_fit_and_evaluate_take_a_loss_with_parameters():
    data = [next(batches())]
    state, history = fn.fit(HEAD, OPTIMIZER, fresh(HEAD), batches(), 40, log_every=20, validation=data)
    assert history[-1]["loss"] < history[0]["loss"]
    features = HEAD.model.apply(state.params["model"], state.state["model"], data[0][0])
    logits = fn.dense(3).apply(state.params["loss"], (), features)
    wanted = np.mean(optax.softmax_cross_entropy_with_integer_labels(logits, data[0][1]))
    np.testing.assert_allclose(history[-1]["val_loss"], wanted, rtol=1e-5)
    np.testing.assert_allclose(fn.evaluate(HEAD, state.params, state.state, data)["loss"], wanted, rtol=1e-5)


# Means over batches


def scaled():
    """c (y - t)^2 for the target {"t", "c"}, in a mean divided by the sum of c; a negative t does not count."""

    def fwd(params, pair):
        (y, target), c = pair, jnp.where(pair[1]["t"] < 0, 0.0, pair[1]["c"])
        return c * jnp.square(y[:, 0] - target["t"]), (y[:, 0] - target["t"], c)

    def bwd(params, residuals, dy, contract):
        return {}, (2 * (dy * residuals[1] * residuals[0])[:, None], {"t": None, "c": None})

    loss = as_loss(fn.stateless("scaled", lambda key, x: {}, fwd, bwd))
    counted = lambda target: target["t"] >= 0
    of_class = lambda target: jnp.where(target["t"] < 0, 0.0, target["c"])
    return replace(loss, counted=counted, mass=of_class, metrics={"t": lambda y, target: target["t"]})


SCALED = fn.objective(fn.serial(fn.dense(1, use_bias=False)), scaled())
SIZES = {"ragged": [9, 1], "alike": [4, 4, 4, 4]}


def scaled_batches(sizes, weighted, seed=0):
    rng = np.random.default_rng(seed)
    for n in sizes:
        t = rng.integers(0, 9, n).astype(np.float32)
        t[1:2] = -1  # of ragged batches of 9 and 1 the second counts whole
        target = {"t": t, "c": rng.uniform(1, 9, n).astype(np.float32)}
        batch = rng.normal(size=(n, 3)).astype(np.float32), target
        yield (*batch, rng.uniform(0, 2, n).astype(np.float32)) if weighted else batch


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    ("sizes", "options"),
    [("ragged", {}), ("alike", {}), ("alike", {"accumulate": 2}), ("alike", {"steps_per_call": 2})],
)
def test_records_and_scores_are_means_over_what_counts_whatever_the_batches(sizes, options, weighted):
    data, still = list(scaled_batches(SIZES[sizes], weighted)), optax.sgd(0.0)
    state = fn.init_train_state(SCALED, still, jax.random.key(0), data[0])
    kernel = np.asarray(state.params["model"]["dense"]["kernel"], np.float64)
    x, t, c, *w = (
        np.concatenate(parts) for parts in zip(*((b[0], b[1]["t"], b[1]["c"], *b[2:]) for b in data), strict=True)
    )
    a = np.where(t < 0, 0.0, w[0] if weighted else 1.0)
    wanted = {"loss": np.sum(a * c * (x @ kernel[:, 0] - t) ** 2) / np.sum(a * c), "t": np.sum(a * t) / np.sum(a)}
    norms = [
        np.linalg.norm(fn.value_and_grad(SCALED)(state.params, state.state, batch)[1]["model"]["dense"]["kernel"])
        for batch in data
    ]
    scores = fn.evaluate(SCALED, state.params, state.state, data)
    assert scores == pytest.approx(wanted, rel=1e-5)
    _, (record,) = fn.fit(SCALED, still, state, data, len(data), log_every=len(data), validation=data, **options)
    assert {name: record[name] for name in wanted} == pytest.approx(wanted, rel=1e-5)
    assert {name: record["val_" + name] for name in wanted} == pytest.approx(wanted, rel=1e-5)
    assert record["grad_norm"] == pytest.approx(np.mean(norms), rel=1e-5)


def test_a_weighted_fit_moves_as_one_over_each_example_as_often_as_it_weighs():
    often = np.array([3, 0, 1, 2, 1, 1, 0, 4])
    weighted = INPUTS[:8], LABELS[:8], often.astype(np.float32) / 7
    repeated = np.repeat(INPUTS[:8], often, axis=0), np.repeat(LABELS[:8], often)
    objective = fn.objective(fn.serial(fn.dense(3)), fn.cross_entropy())
    ends = []
    for batch, options in ((weighted, {}), (weighted, {"accumulate": 4, "steps_per_call": 2}), (repeated, {})):
        state = fn.init_train_state(objective, OPTIMIZER, jax.random.key(0), batch)
        ends.append(fn.fit(objective, OPTIMIZER, state, [batch] * 4, 4, log_every=4, **options))
    for state, (record,) in ends[:2]:
        chex.assert_trees_all_close(state.params, ends[2][0].params, rtol=1e-4, atol=1e-6)
        assert record == pytest.approx(ends[2][1][0], rel=1e-4)


@pytest.mark.parametrize("scale", [1e-34, 1e-10, 1e10, 3e37])
def test_only_ratios_of_the_weights_matter(scale):
    """Also where products with values of the loss, or the sum of the weights, leave float32's range."""
    data = [(*batch[:2], batch[2] * 2) for batch in scaled_batches(SIZES["ragged"], True)]
    data = [(x, {"t": t["t"] / 1e3, "c": t["c"] / 1e3}, w) for x, t, w in data]
    scaled_data = [(x, t, w * np.float32(scale)) for x, t, w in data]
    state = fn.init_train_state(SCALED, optax.sgd(0.0), jax.random.key(0), data[0])
    wanted = fn.evaluate(SCALED, state.params, state.state, data)
    assert fn.evaluate(SCALED, state.params, state.state, scaled_data) == pytest.approx(wanted, rel=1e-5)
    _, (record,) = fn.fit(SCALED, optax.sgd(0.0), state, scaled_data, 2)
    assert {name: record[name] for name in wanted} == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("exponents", [(1023, 1023), (1023, -1000), (-1022, 0), (-1022, -1022), (1023, 0, -1022)])
def test_only_ratios_of_the_weights_matter_in_64_bits_too(exponents, x64):
    """Whole batches by powers of two: of those within the range of a sum the largest alone count."""
    own = np.arange(1.0, 9) / 8
    data = [(INPUTS[i : i + 8].astype(float), LABELS[i : i + 8], np.ldexp(own, e)) for i, e in enumerate(exponents)]
    if -1022 in exponents:
        data = [(x, t, np.maximum(w, np.finfo(float).tiny)) for x, t, w in data]
    objective = fn.objective(fn.dense(3), fn.cross_entropy())
    state = fn.init_train_state(objective, optax.sgd(0.0), jax.random.key(0), data[0])
    least = [(x, t, np.ldexp(w, -max(exponents))) for x, t, w in data]
    most = [(x, t, w) for x, t, w in least if w.max() >= 0.5]
    wanted = fn.evaluate(objective, state.params, state.state, most)
    assert fn.evaluate(objective, state.params, state.state, data) == pytest.approx(wanted, rel=1e-12)
    _, (record,) = fn.fit(objective, optax.sgd(0.0), state, data, len(data))
    assert {name: record[name] for name in wanted} == pytest.approx(wanted, rel=1e-12)


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


# Batches in which nothing counts

IGNORING = fn.objective(MODEL, fn.cross_entropy(ignore_index=-1))
NOTHING = {"ignored": (INPUTS[:8], np.full(8, -1, np.int32)), "weight 0": (INPUTS[:8], LABELS[:8], np.zeros(8))}


def counting(kind):
    batch = next(batches())
    return (*batch, np.ones(8)) if kind == "weight 0" else batch


@pytest.mark.parametrize("kind", NOTHING)
@pytest.mark.parametrize("steps_per_call", [1, 2])
def test_batches_in_which_nothing_counts_are_skipped_and_counted(kind, steps_per_call):
    nothing, something = NOTHING[kind], counting(kind)
    data = [nothing, something, something, something, nothing, nothing, something]
    options = {"log_every": 2, "steps_per_call": steps_per_call, "validation": [nothing, something]}
    state, history = fn.fit(IGNORING, OPTIMIZER, fresh(IGNORING), data, 4, **options)
    wanted, without = fn.fit(IGNORING, OPTIMIZER, fresh(IGNORING), [something] * 4, 4, **options)
    chex.assert_trees_all_equal(state.params, wanted.params)
    assert [record.pop("skipped") for record in history] == [1, 2]
    assert history == without
    assert int(state.step) == 4
    scores = fn.evaluate(IGNORING, state.params, state.state, [nothing, something, nothing])
    assert scores == fn.evaluate(IGNORING, state.params, state.state, [something])


def test_batches_in_which_nothing_counts_do_not_make_up_for_others():
    nothing = NOTHING["ignored"]
    with pytest.raises(
        fn.InputError,
        match="batches for 2 steps, in which something counts\n  received  1 batches that count, and 2 in",
    ):
        fn.fit(IGNORING, OPTIMIZER, fresh(IGNORING), [nothing, next(batches()), nothing], 2)
    for steps_per_call in (1, 2):
        with pytest.raises(fn.InputError, match="received  0 batches that count, and 2 in which nothing does\n"):
            fn.fit(IGNORING, OPTIMIZER, fresh(IGNORING), [nothing] * 2, 2, log_every=2, steps_per_call=steps_per_call)
    with pytest.raises(fn.InputError, match="received  0 batches\n"):
        fn.fit(IGNORING, OPTIMIZER, fresh(IGNORING), [], 2)
    with pytest.raises(fn.InputError, match="1000 batches in a row"):
        fn.fit(IGNORING, OPTIMIZER, fresh(IGNORING), itertools.repeat(nothing), 2)
    state = fresh(IGNORING)
    with pytest.raises(fn.InputError, match="at least one target that counts"):
        fn.evaluate(IGNORING, state.params, state.state, [nothing])
    with pytest.raises(fn.InputError, match="at least one target that counts") as caught:
        fn.fit(IGNORING, OPTIMIZER, state, batches(), 2, validation=[nothing])
    assert caught.value.path == ("validation",)


# States


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
    jaxpr = jax.make_jaxpr(lambda s, x: loop.changed(s, objective.model.fwd({"serial": {}}, s, x, None)[1]))
    assert not jaxpr(state.state["model"], batch[0]).out_avals


# What is kept


def kept():
    """An objective that closes over an array, both by weak references, and what it was trained on."""
    array = jnp.arange(1.0, 4.0)
    model = fn.serial(fn.dense(4), fn.batch_norm(), fn.relu(), fn.dropout(0.1), fn.repeat(fn.dense(4), 2), fn.dense(3))
    objective = fn.objective(model, fn.cross_entropy(), {"own": lambda y, t: jnp.sum(y * array[None], axis=1)})
    optimizer, data = optax.adam(1e-2), [next(batches())] * 2
    state = fn.init_train_state(objective, optimizer, jax.random.key(0), data[0])
    state, _ = fn.fit(objective, optimizer, state, data, 2, validation=data)
    fn.evaluate(objective, state.params, state.state, data)
    return [weakref.ref(thing) for thing in (objective, array, optimizer.update)]


def test_fit_and_evaluate_let_an_objective_go_with_all_that_it_holds():
    before, gone = len(loop._programs), kept()
    gc.collect()
    assert [reference() for reference in gone] == [None] * 3
    assert len(loop._programs) <= before


@pytest.fixture
def compiled():
    """The compilations so far, as a list that grows."""
    events = []
    listen = lambda name, *args, **kwargs: events.append(name) if "backend_compile" in name else None
    jax.monitoring.register_event_duration_secs_listener(listen)
    yield events
    jax.monitoring.unregister_event_duration_listener(listen)


def test_the_same_call_again_compiles_nothing_and_another_one_does(compiled):
    objective = fn.objective(fn.serial(fn.dense(3)), fn.cross_entropy())
    other = fn.objective(fn.serial(fn.dense(3)), fn.cross_entropy(label_smoothing=0.5))
    optimizer, data = optax.sgd(0.1), [next(batches())] * 4
    start = lambda: fn.init_train_state(objective, optimizer, jax.random.key(0), data[0])

    def fitted(objective=objective, optimizer=optimizer, **options):
        return fn.fit(objective, optimizer, start(), data, 4, log_every=4, validation=data, **options)

    def again(call):
        before = len(compiled)
        result = call()
        return len(compiled) - before, result

    first, (_, wanted) = again(fitted)
    assert first > 0
    for _ in range(2):
        count, (_, history) = again(fitted)
        assert (count, history) == (0, wanted)
    scored = lambda objective=objective: fn.evaluate(objective, start().params, start().state, data)
    again(scored)
    assert again(scored)[0] == 0
    for change in ({"steps_per_call": 2}, {"accumulate": 2}, {"optimizer": optax.sgd(0.2)}):
        assert again(lambda change=change: fitted(**change))[0] > 0
        assert again(lambda change=change: fitted(**change))[0] == 0
    assert fitted(other)[1] != wanted
    assert scored(other) != scored()
    assert again(fitted)[0] == 0


class Unhashable(list):
    """An optimizer that cannot be a key."""

    init, update = staticmethod(OPTIMIZER.init), staticmethod(OPTIMIZER.update)


def test_an_optimizer_that_cannot_be_hashed_trains_all_the_same():
    state, _ = fn.fit(OBJECTIVE, Unhashable(), fresh(), batches(), 2)
    wanted, _ = fn.fit(OBJECTIVE, OPTIMIZER, fresh(), batches(), 2)
    chex.assert_trees_all_equal(state.params, wanted.params)


# What is refused, and what is not


def test_a_state_that_was_donated_is_refused_with_the_reason():
    state = fresh()
    fn.fit(OBJECTIVE, OPTIMIZER, state, batches(), 1)
    for use in (
        lambda: fn.fit(OBJECTIVE, OPTIMIZER, state, batches(), 1),
        lambda: fn.evaluate(OBJECTIVE, state.params, state.state, [next(batches())]),
        lambda: fn.value_and_grad(OBJECTIVE)(state.params, state.state, next(batches()), state.key),
        lambda: fn.train_step(OBJECTIVE, OPTIMIZER)(state, next(batches())),
        lambda: fn.layerwise_step(OBJECTIVE, OPTIMIZER)(state, next(batches())),
    ):
        with pytest.raises(fn.InputError, match="the train state that the last step returned"):
            use()


def test_what_is_no_objective_and_no_optimizer_is_refused():
    with pytest.raises(fn.InputError, match="an objective"):
        fn.fit(MODEL, OPTIMIZER, fresh(), batches(), 1)
    with pytest.raises(fn.InputError, match="an optax optimizer"):
        fn.fit(OBJECTIVE, optax.adam, fresh(), batches(), 1)
    with pytest.raises(fn.InputError, match="an objective"):
        fn.evaluate(MODEL, {}, (), [next(batches())])


class Tensor:
    """An array of another library: its dtype is its own."""

    def __init__(self, array):
        self.shape, self.ndim, self.dtype = (
            array.shape,
            array.ndim,
            type("dtype", (), {"__str__": lambda d: "torch.float32"})(),
        )


@pytest.mark.parametrize("place", [0, 1, 2], ids=["inputs", "targets", "weights"])
def test_tensors_of_another_library_are_refused_with_the_remedy(place):
    state, batch = fresh(), [*next(batches()), np.ones(8, np.float32)]
    batch[place] = Tensor(batch[place])
    for use in (
        lambda: fn.init_train_state(OBJECTIVE, OPTIMIZER, jax.random.key(0), batch),
        lambda: fn.evaluate(OBJECTIVE, state.params, state.state, [batch]),
        lambda: fn.value_and_grad(OBJECTIVE)(state.params, state.state, batch),
        lambda: fn.train_step(OBJECTIVE, OPTIMIZER)(state, batch),
        lambda: fn.layerwise_step(OBJECTIVE, OPTIMIZER)(state, batch),
        lambda: fn.fit(OBJECTIVE, OPTIMIZER, state, [batch], 1),
    ):
        with pytest.raises(
            fn.InputError, match=r"received  torch.float32\[8(, 6)?\]\n  remedy    convert it with x.numpy"
        ) as caught:
            use()
        assert caught.value.path == (("inputs", "targets", "weights")[place],)


@pytest.mark.parametrize("place", [0, 1, 2], ids=["inputs", "targets", "weights"])
def test_shapes_in_place_of_arrays_are_refused_where_values_are_needed(place):
    state, batch = fresh(), [*next(batches()), np.ones(8, np.float32)]
    batch[place] = jax.ShapeDtypeStruct(batch[place].shape, batch[place].dtype)
    for use in (
        lambda: fn.evaluate(OBJECTIVE, state.params, state.state, [batch]),
        lambda: fn.value_and_grad(OBJECTIVE)(state.params, state.state, batch),
        lambda: fn.train_step(OBJECTIVE, OPTIMIZER)(state, batch),
        lambda: fn.layerwise_step(OBJECTIVE, OPTIMIZER)(state, batch),
        lambda: fn.fit(OBJECTIVE, OPTIMIZER, state, [batch], 1),
        lambda: fn.fit(OBJECTIVE, OPTIMIZER, state, batches(), 1, validation=[batch]),
    ):
        with pytest.raises(fn.InputError, match="only the shape of one"):
            use()
    shape, batch = jax.ShapeDtypeStruct((8,), jnp.float32), next(batches())
    for use in (
        lambda: fn.value_and_grad(OBJECTIVE)(state.params, state.state, batch, weights=shape),
        lambda: fn.train_step(OBJECTIVE, OPTIMIZER)(state, batch, shape),
    ):
        with pytest.raises(fn.InputError, match="only the shape of one"):
            use()


STEPS = {
    "fit": lambda optimizer, state: fn.fit(OBJECTIVE, optimizer, state, batches(), 1),
    "train_step": lambda optimizer, state: fn.train_step(OBJECTIVE, optimizer)(state, next(batches())),
    "lower": lambda optimizer, state: fn.train_step(OBJECTIVE, optimizer).lower(state, next(batches())),
    "layerwise_step": lambda optimizer, state: fn.layerwise_step(OBJECTIVE, optimizer)(state, next(batches())),
}


@pytest.mark.parametrize("name", STEPS)
def test_what_is_no_train_state_of_the_optimizer_is_refused(name):
    state = fresh()
    for given in (None, 3, state.params, (state.params, state.state)):
        with pytest.raises(fn.InputError, match="expected  a train state"):
            STEPS[name](OPTIMIZER, given)
    with pytest.raises(
        fn.InputError, match=r"\(TraceState, EmptyState\)\n  received  \(ScaleByAdamState, EmptyState\)"
    ):
        STEPS[name](optax.sgd(0.1, momentum=0.9), state)
    with pytest.raises(fn.InputError, match="received  NoneType"):
        STEPS[name](OPTIMIZER, replace(state, opt_state=None))
    other = fn.init_train_state(
        fn.objective(fn.dense(3), fn.cross_entropy()), OPTIMIZER, jax.random.key(0), next(batches())
    )
    with pytest.raises(fn.InputError, match="for other params"):
        STEPS[name](OPTIMIZER, replace(state, opt_state=other.opt_state))


@pytest.mark.parametrize("given", [None, 3, 1.5, next])
def test_what_are_no_batches_is_refused(given):
    state = fresh()
    with pytest.raises(fn.InputError, match="batches to walk through"):
        fn.fit(OBJECTIVE, OPTIMIZER, state, given, 1)
    with pytest.raises(fn.InputError, match="batches to walk through"):
        fn.evaluate(OBJECTIVE, state.params, state.state, given)
    if given is not None:
        with pytest.raises(fn.InputError, match="validation to walk through"):
            fn.fit(OBJECTIVE, OPTIMIZER, state, batches(), 1, validation=given)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"config": {"a": jnp.ones(3)}}, "a config that JSON can hold"),
        ({"config": {"a": np.float32(1)}}, "a config that JSON can hold"),
        ({"config": {(1, 2): 3}}, "a config that JSON can hold"),
        ({"config": 3}, "a config that JSON can hold"),
        ({"run_dir": 3}, "run_dir as a path"),
        ({"run_dir": b"run"}, "run_dir as a path"),
    ],
)
def test_a_run_that_cannot_be_written_is_refused_before_anything_is_trained(options, word, tmp_path):
    state = fresh()
    with pytest.raises(fn.InputError, match=word):
        fn.fit(OBJECTIVE, OPTIMIZER, state, batches(), 1, **{"run_dir": tmp_path / "run", **options})
    assert not list(tmp_path.iterdir())
    expect.not_donated(state)


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
