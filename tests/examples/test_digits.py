"""The example runs as a person would run it."""

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import funcnet as fn

SCRIPT = Path(__file__).parents[2] / "examples" / "digits.py"


def run(*args):
    return subprocess.run([sys.executable, SCRIPT, *map(str, args)], capture_output=True, text=True, check=False)


def test_smoke_run_leaves_a_run_folder_and_a_second_one_refuses(tmp_path):
    done = run("--smoke", "--run-dir", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"test accuracy: \d\d\.\d%", done.stdout.splitlines()[-1])
    assert "leaves hold" in done.stdout
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        "config.json", "environment.json", "metrics.jsonl", "curves.png", "confusion.png", "misread.png"
    }  # fmt: skip
    assert json.loads((tmp_path / "run" / "config.json").read_text())["steps"] == 100
    again = run("--smoke", "--run-dir", tmp_path / "run")
    assert again.returncode == 2
    assert "--overwrite" in again.stderr


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_the_whole_run_reads_at_least_97_and_a_half_percent(seed, tmp_path):
    done = run("--seed", seed, "--run-dir", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.splitlines()[-1].removeprefix("test accuracy: ").removesuffix("%")) >= 97.5


def test_help_and_bad_arguments():
    assert all(word in run("--help").stdout for word in ("--steps", "--seed", "--run-dir", "--smoke"))
    assert run("--steps", 7).returncode == 2


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("float64", 1e-9)])
def test_the_same_parameters_as_jax_grad_and_optax_after_100_steps(dtype, tolerance, standard_promotion):
    """Relative to each leaf's scale. In float32 Adam divides rounding errors by small second moments, hence 1e-4."""
    digits = SimpleNamespace(**runpy.run_path(str(SCRIPT)))
    with jax.enable_x64(dtype == "float64"):
        training, _ = digits.load()
        training = training[0].astype(dtype), training[1]
        objective, optimizer = fn.objective(digits.model(), fn.cross_entropy()), optax.adam(2e-3)
        data = digits.batches(training, 0)
        state = fn.init_train_state(objective, optimizer, jax.random.key(0), next(data))
        params, key = jax.tree.map(jnp.copy, state.params), jnp.copy(state.key)
        opt_state, model_state = optimizer.init(params), state.state

        @jax.jit
        def plain(params, opt_state, batch, step):
            def loss(params):
                logits = objective.model.fwd(
                    params["model"], model_state["model"], batch[0], jax.random.fold_in(key, step)
                )[0]
                return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]))

            updates, opt_state = optimizer.update(jax.grad(loss)(params), opt_state, params)
            return optax.apply_updates(params, updates), opt_state

        step = fn.train_step(objective, optimizer)
        for i in range(100):
            batch = next(data)
            params, opt_state = plain(params, opt_state, batch, i)
            state, _ = step(state, batch)
        for hand, automatic in zip(jax.tree.leaves(state.params), jax.tree.leaves(params), strict=True):
            assert hand.dtype == dtype
            assert np.max(np.abs(hand - automatic)) <= tolerance * np.max(np.abs(automatic))
