"""The loop: what it logs, what it refuses, and how it stops."""

import itertools
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import funcnet as fn
from funcnet._internal import expect
from funcnet.train.run import read_metrics
from tests.train.small import INPUTS, LABELS, MODEL, OBJECTIVE, OPTIMIZER, batches, fresh

pytestmark = pytest.mark.usefixtures("standard_promotion")


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


def test_the_key_is_not_donated():
    state = fresh()
    fn.fit(OBJECTIVE, OPTIMIZER, state, batches(), 1)
    assert not state.key.is_deleted()


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
