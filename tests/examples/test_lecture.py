"""The lecture's script runs as a person would run it, and a wrong result makes it fail."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import funcnet as fn

SCRIPT = Path(__file__).parents[2] / "examples" / "lecture.py"


def run(*args):
    return subprocess.run([sys.executable, SCRIPT, *map(str, args)], capture_output=True, text=True, check=False)


def test_every_comparison_holds_and_the_pictures_are_drawn(tmp_path):
    done = run("--out", tmp_path / "out", "--steps", 10)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "every comparison holds to 1e-10"
    assert "WRONG" not in done.stdout
    compared, explained = done.stdout.split("What is refused, and why")
    errors = [float(error) for error in re.findall(r" (\d\.\de[+-]\d\d)$", compared, re.MULTILINE)]
    assert len(errors) > 30
    assert max(errors) < 1e-10
    assert explained.count("        remedy") == 3
    assert "cross_entropy: 0.858" in explained
    assert "vanishing" in explained.split("Thirty layers")[1].splitlines()[-5]
    pictures = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert set(pictures) == {"square.png", "training.png", "chain_3.png", "chain_30.png"}
    assert all(png.startswith(b"\x89PNG") for png in pictures.values())


def test_help_and_bad_arguments(tmp_path):
    assert all(word in run("--help").stdout for word in ("--out", "--steps"))
    assert run("--steps", 0).returncode == 2
    (tmp_path / "file").touch()
    assert run("--out", tmp_path / "file").returncode == 2


@pytest.fixture
def script(standard_promotion, x64):
    return runpy.run_path(str(SCRIPT))


def test_a_jacobian_that_is_off_by_a_millionth_is_found(script, monkeypatch, capsys):
    right = fn.layer_jacobians
    monkeypatch.setattr(fn, "layer_jacobians", lambda *args: jax.tree.map(lambda J: J * (1 + 1e-6), right(*args)))
    results = script["Results"]()
    script["backpropagation"](results, script["network"](3, 4))
    assert results.failed == [f"3. {layer} by {by}: bwd, Jacobian"
                              for layer in ("f1", "f2", "f3") for by in ("parameters", "its input")]  # fmt: skip
    assert capsys.readouterr().out.count("  WRONG") == 6


@pytest.mark.parametrize(
    ("got", "wanted"),
    [(1.0, 1.0 + 2e-10), (np.nan, np.nan), (np.ones(2), np.ones((2, 1))), ({"w": np.ones(2)}, {"w": np.zeros(2)})],
)
def test_what_a_comparison_does_not_let_pass(script, got, wanted):
    results = script["Results"]()
    results.compare("same", got, wanted)
    assert results.failed == ["same"]


def test_a_failure_is_named_and_the_exit_says_so(script, monkeypatch, tmp_path):
    for section in ("matrices", "chain_rule", "backpropagation", "refusals"):
        monkeypatch.setitem(script["main"].__globals__, section, lambda *_: None)
    monkeypatch.setitem(script["main"].__globals__, "train", lambda *_: ([1.0], [1.0]))
    monkeypatch.setitem(script["main"].__globals__, "derivatives", lambda results: results.compare("x^3", 12.0, 12.1))
    monkeypatch.setattr(sys, "argv", ["lecture.py", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"1 failed: x\^3"):
        script["main"]()


def test_what_should_be_refused_and_is_not_counts_as_a_failure(script):
    results = script["Results"]()
    results.refuses("a kink", lambda: 0.0)
    assert results.failed == ["a kink"]
