"""The mistakes that a machine makes in funcnet's backward code; `python -m tests.check.mutations` judges them."""

import ast

import pytest

from tests.check.equivalent import CHOICES, EQUIVALENT
from tests.check.mutate import backward
from tests.check.mutations import FILES, PACKAGE, mutants


@pytest.fixture(scope="module")
def everything():
    return mutants(PACKAGE, FILES)


def test_every_bwd_and_what_only_it_calls_is_mutated():
    names = {file: {getattr(f, "name", "lambda") for f in functions} for file, functions in _backward().items()}
    assert {"total", "_per_example", "squared_norm"} <= names["factors.py"]
    assert "bwd" in names["losses/cross_entropy.py"]
    assert "spread" in names["losses/entries.py"]
    assert {"df", "lambda", "_gelu_tanh_slope", "_one_where"} <= names["layers/activation.py"]
    for file in ("layer.py", "combine.py", "transform.py", "layers/dense.py", "layers/norm.py", "layers/reshape.py"):
        assert "bwd" in names[file]
    assert not {"fwd", "init", "apply"} & set().union(*names.values())


def _backward():
    return backward({file: ast.parse((PACKAGE / file).read_text()) for file in FILES})


def test_every_mutant_is_another_program(everything):
    assert len(everything) > 900
    assert all(mutant.before != mutant.after for mutant in everything)


def test_every_explanation_is_of_a_mutant_that_exists(everything):
    assert {mutant.key for mutant in everything} >= EQUIVALENT.keys()
    assert {f"{mutant.where}: {mutant.before}" for mutant in everything} >= CHOICES
