"""The optimizers' script runs as a person would run it; its gradients are right, and its paths stay in the picture."""

import runpy
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.datasets import load_breast_cancer

SCRIPT = Path(__file__).parents[2] / "examples" / "optimizers.py"
NAMES = ["gradient descent", "momentum", "Nesterov", "AdaGrad", "RMSProp", "Adam", "L-BFGS"]


def run(*args):
    return subprocess.run([sys.executable, SCRIPT, *map(str, args)], capture_output=True, text=True, check=False)


@pytest.fixture
def script(standard_promotion, x64):
    return runpy.run_path(str(SCRIPT))


def logistic(w):
    """The negative log-likelihood, written out."""
    data = load_breast_cancer()
    x = data.data[:, :2]
    z, t = (x - x.mean(0)) / x.std(0) @ w, data.target == 0
    return -jnp.mean(jnp.log(jnp.where(t, jax.nn.sigmoid(z), jax.nn.sigmoid(-z))))


def test_it_prints_a_row_for_each_optimizer_and_draws_the_paths(tmp_path):
    done = run("--out", tmp_path / "out", "--steps", 30)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[3].split() == ["Valley", "Saddle", "Likelihood"]
    assert lines[4].split() == ["loss", "to", "reach", "0.0010", "0.0010", "0.2768"]
    assert [line[:18].rstrip() for line in lines[5:12]] == NAMES
    reached = [[line[start : start + 26].split()[0] for start in (18, 44, 70)] for line in lines[5:12]]
    assert reached[0][:2] == ["-", "-"]
    assert all(0 < int(steps) <= 30 for steps in reached[-1])
    assert (tmp_path / "out" / "optimizers.png").read_bytes().startswith(b"\x89PNG")


def test_help_and_bad_arguments(tmp_path):
    assert all(word in run("--help").stdout for word in ("--out", "--steps"))
    assert run("--steps", 0).returncode == 2
    (tmp_path / "file").touch()
    assert run("--out", tmp_path / "file").returncode == 2


def test_gradients_are_those_of_jax_grad_and_vanish_at_the_minima(script):
    points = np.random.default_rng(0).normal(size=(5, 2))
    for problem, loss in zip(script["problems"](), (script["valley"], script["saddle"], logistic), strict=True):
        for w in map(jnp.asarray, (problem.start, *points)):
            value, gradient = problem.value_and_grad(w)
            np.testing.assert_allclose(value, loss(w), rtol=1e-10)
            np.testing.assert_allclose(gradient, jax.grad(loss)(w), rtol=1e-10, atol=1e-10)
            np.testing.assert_array_equal(jax.grad(problem.value)(w), gradient)  # the line search's
        for w in problem.minima:
            np.testing.assert_allclose(jax.grad(loss)(jnp.asarray(w)), 0, atol=1e-10)


def test_l_bfgs_reaches_the_minimum_of_the_valley(script):
    valley = script["problems"]()[0]
    path, losses = script["descend"](valley, script["OPTIMIZERS"]["L-BFGS"][0](), 40)
    assert path.shape == (41, 2)
    np.testing.assert_array_equal(path[0], valley.start)
    np.testing.assert_allclose(path[-1], [1, 1], atol=1e-6)
    assert script["steps_to"](losses, 1e-3) < 25


def test_no_path_leaves_the_picture(script):
    for column, problem in enumerate(script["problems"]()):
        left, right, bottom, top = problem.window
        for name, (make, rates) in script["OPTIMIZERS"].items():
            path, _ = script["descend"](problem, make(rates[column]), 500)
            assert np.all((path >= [left, bottom]) & (path <= [right, top])), (name, problem.title)


def test_steps_are_counted_until_the_loss_stays(script):
    steps_to = script["steps_to"]
    assert steps_to(np.array([3.0, 1.0, 2.0, 1.0, 0.5]), 1.0) == 3
    assert steps_to(np.array([0.5, 0.5]), 1.0) == 0
    assert steps_to(np.array([0.5, 2.0]), 1.0) is None
    assert steps_to(np.array([3.0, np.nan]), 1.0) is None
