"""The benchmarks run, report what they should, and refuse sides that disagree. Nothing here depends on a timing."""

import json
from itertools import pairwise, permutations

import jax
import numpy as np
import pytest

import funcnet as fn
from benchmarks import harness, norms, recurrent, report, reversible, workloads
from benchmarks.__main__ import main


@pytest.fixture(scope="module")
def answers():
    """What funcnet and plain JAX compute on the smallest workload."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        sides = workloads.load("digits_mlp")("float32").sides
        return {name: harness.answer(sides[name](), steps=1) for name in ("plain", "funcnet")}


@pytest.mark.usefixtures("standard_promotion")
def test_the_smallest_workload_gives_a_table_and_json(tmp_path, capsys):
    file = tmp_path / "out.json"
    main(["digits_mlp", "--rounds", "2", "--compiles", "1", "--sides", "funcnet,plain", "--json", str(file)])
    printed = capsys.readouterr().out
    written = json.loads(file.read_text())
    (workload,) = written["workloads"]

    assert {"processor", "cores", "load_average"} <= written["machine"].keys()
    assert {"commit", "python", "jax", "funcnet"} <= written["versions"].keys()
    assert "--rounds" in written["flags"]["arguments"]
    assert workload["name"] == "digits_mlp"
    assert workload["agreement"]["float64"]["sides"].keys() == {"funcnet", "plain"}
    assert workload["sides"].keys() == {"funcnet", "plain"}
    for side in workload["sides"].values():
        assert len(side["samples_ms"]) == 2
        for quartiles in (side["step_ms"], side["step_over_plain"], side["compile_s"], side["trace_s"], side["xla_s"]):
            assert 0 < quartiles["q1"] <= quartiles["median"] <= quartiles["q3"]
        assert side["memory_bytes"]["temp"] > 0
    assert [target["what"] for target in workload["targets"]] == ["step time", "temp bytes", "compile time"]
    assert {target["verdict"] for target in workload["targets"]} <= {"met", "missed"}
    assert "same loss and gradients in float64" in printed
    assert "step, ms" in printed


def test_sides_that_agree_pass(answers):
    found = harness.compare(answers, tolerance=2e-5, loss_tolerance=2e-5)
    assert found["sides"]["funcnet"]["leaf_error"] < 2e-6
    off = answers["funcnet"]._replace(grads=jax.tree.map(lambda g: np.float32(1 + 1e-5) * g, answers["funcnet"].grads))
    found = harness.compare(answers | {"funcnet": off}, tolerance=2e-5, loss_tolerance=2e-5)
    assert 2e-6 < found["sides"]["funcnet"]["leaf_error"] < 2e-5  # an error that is there is seen


@pytest.mark.parametrize("leaf", ["dense/kernel", "dense/bias", "dense_1/kernel", "dense_1/bias"])
@pytest.mark.parametrize("wrong", [lambda g: 1.01 * g, lambda g: g * np.nan, lambda g: g[1:], np.zeros_like])
def test_one_wrong_leaf_is_refused_by_name(answers, leaf, wrong):
    path, field = leaf.split("/")
    grads = answers["funcnet"].grads
    grads = grads | {path: grads[path] | {field: wrong(grads[path][field])}}
    answers = answers | {"funcnet": answers["funcnet"]._replace(grads=grads)}
    with pytest.raises(harness.Disagreement, match=f"funcnet: gradient of {leaf} differs") as refused:
        harness.compare(answers, tolerance=2e-5, loss_tolerance=2e-5)
    assert len(str(refused.value).splitlines()) == 2  # the headline and the one leaf


def test_a_missing_leaf_and_a_wrong_loss_are_refused(answers):
    given = answers["funcnet"]
    lacking = given._replace(grads={path: fields for path, fields in given.grads.items() if path != "dense_1"})
    with pytest.raises(harness.Disagreement, match="dense_1/bias"):
        harness.compare(answers | {"funcnet": lacking}, tolerance=2e-5, loss_tolerance=2e-5)
    off = given._replace(losses=[1.01 * loss for loss in given.losses])
    with pytest.raises(harness.Disagreement, match="loss of step 1"):
        harness.compare(answers | {"funcnet": off}, tolerance=2e-5, loss_tolerance=2e-5)


def test_what_is_not_installed_is_said_and_other_import_errors_are_not_hidden():
    def runs():
        return harness.Side(lambda: (1.0, {"dense": {"bias": np.ones(3)}}), lambda: sum(range(1000)))

    def lacks(package):
        def side():
            raise ModuleNotFoundError(f"No module named {package!r}", name=package)

        return lambda dtype: harness.Workload("a stub", {"plain": runs, "torch": side})

    record = report.record("stub", harness.measure(lacks("torch"), rounds=1, compiles=1))
    assert record["sides"]["torch"] == {"status": "not installed"}
    assert "not installed" in report.text(record)
    with pytest.raises(ModuleNotFoundError, match="part_of_torch"):
        harness.measure(lacks("part_of_torch"), rounds=1, compiles=1)


@pytest.mark.parametrize("sides", [1, 2, 3, 4, 5])
def test_every_side_follows_every_other_side_equally_often(sides):
    names = "ABCDE"[:sides]
    orders = list(harness.orders(list(names), rounds=2 * sides))
    followers = [pair for order in orders for pair in pairwise(order)]
    assert all(sorted(order) == sorted(names) for order in orders)
    assert {followers.count(pair) for pair in permutations(names, 2)} <= {2}


@pytest.mark.usefixtures("standard_promotion")
def test_norms_are_compared_once_they_agree():
    found = norms.compare(norms.Task(fn.batch_norm(), norms.batch_norm, (6, 4)), rounds=2)
    assert min(found.hand, found.autodiff, found.ratio) > 0
    wrong = lambda params, state, x: (2 * x, norms.batch_norm(params, state, x)[1])
    with pytest.raises(AssertionError):
        norms.compare(norms.Task(fn.batch_norm(), wrong, (6, 4)), rounds=2)


def test_the_reversible_stack_is_compared_with_equals_and_a_wrong_gradient_is_refused(x64):
    sides, point = reversible.sides(2, 3, 2, "float64")
    reversible.assert_equal(sides, point, rounding=1e-10)
    right = sides["jax.grad of the forward pass"]
    wrong = {"wrong": lambda *point: jax.tree.map(lambda g: 1.001 * g, right(*point)), "right": right}
    with pytest.raises(AssertionError, match="wrong: a gradient differs by 1"):
        reversible.assert_equal(wrong, point, rounding=1e-4)


@pytest.mark.usefixtures("standard_promotion")
def test_recurrent_layers_stand_beside_two_plain_ones_and_their_products(capsys):
    recurrent.main(["gru", "--steps", "3", "--features", "4", "--batches", "2", "--rounds", "1"])
    lines = capsys.readouterr().out.splitlines()[1:]
    sides = ["funcnet", "cell in scan", "input product hoisted", "matrix products alone"]
    assert lines[0] == "gru, batch 2"
    assert [line.split("  ")[1] for line in lines[1:]] == sides
