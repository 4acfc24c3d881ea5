"""The mistakes that a machine makes in funcnet's backward code; `python -m tests.check.mutations` judges them."""

import ast
import re
from dataclasses import replace

import pytest

from tests.check.equivalent import CHOICES, EQUIVALENT
from tests.check.mutate import backward
from tests.check.mutations import FILES, PACKAGE, SURVIVED, mutants, verdict


@pytest.fixture(scope="module")
def everything():
    return mutants(PACKAGE, FILES)


def test_every_bwd_and_what_only_it_calls_is_mutated():
    names = {file: {getattr(f, "name", "lambda") for f in functions} for file, functions in _backward().items()}
    assert {"total", "per_example", "squared_norm", "_by", "_table"} <= names["gradients/common_factors.py"]
    assert "bwd" in names["losses/cross_entropy.py"]
    assert "spread" in names["losses/entries.py"]
    assert {"df", "lambda", "_gelu_tanh_slope", "_one_where"} <= names["layers/activation.py"]
    for file in (
        "layer.py",
        "combinators/serial.py",
        "combinators/mixed.py",
        "layers/dense.py",
        "layers/norm.py",
        "layers/reshape.py",
    ):
        assert "bwd" in names[file]
    assert not {"fwd", "init", "apply"} & set().union(*names.values())


def test_without_a_mistake_nothing_is_refused(everything):
    """Else every mutant would be, whatever the checker sees."""
    mutant = next(mutant for mutant in everything if mutant.file == "layers/dense.py")
    unharmed = replace(mutant, source=(PACKAGE / mutant.file).read_text())
    assert verdict(unharmed, ["dense"]) == SURVIVED
    assert verdict(mutant, ["dense"]) != SURVIVED


def _backward():
    return backward({file: ast.parse((PACKAGE / file).read_text()) for file in FILES})


def test_every_mutant_is_another_program(everything):
    assert len(everything) > 900
    assert all(mutant.before != mutant.after for mutant in everything)


def test_every_explanation_is_of_a_mutant_that_exists(everything):
    keys = {_numbered(mutant.key) for mutant in everything}
    choices = {_numbered(f"{mutant.where}: {mutant.before}") for mutant in everything}
    assert [key for key in EQUIVALENT if _numbered(key) not in keys] == []
    assert [choice for choice in CHOICES if _numbered(choice) not in choices] == []


def _numbered(key):
    """A key with its names numbered as they come: a renamed variable is no other mutant here (the command tells it)."""
    where, text = key.split(": ", 1)
    names = {}
    return where, re.sub(r"(?<![\w.])[A-Za-z_]\w*", lambda name: str(names.setdefault(name[0], len(names))), text)


def test_a_renamed_variable_leaves_an_explanation_and_exchanged_ones_do_not():
    assert _numbered("f: y = (g(x))") == _numbered("f: out = (g(inputs))") != _numbered("h: y = (g(x))")
    assert _numbered("f: y = (x - z) * x.x") != _numbered("f: y = (z - x) * x.x")
