"""A sample of the mistakes that a machine can make in funcnet's backward code: the checker refuses each of them."""

import ast
from dataclasses import replace

import pytest

from tests.check.equivalent import CHOICES, EQUIVALENT
from tests.check.mutate import backward
from tests.check.mutations import FILES, PACKAGE, SURVIVED, explained, judged, mutants, sampled, stale, unexplained


@pytest.fixture(scope="module")
def everything():
    return mutants(PACKAGE, FILES)


def test_every_bwd_and_what_only_it_calls_is_mutated():
    names = {file: {getattr(f, "name", "lambda") for f in functions} for file, functions in _backward().items()}
    assert {"total", "_per_example", "squared_norm"} <= names["factors.py"]
    assert {"bwd", "_spread"} <= names["losses.py"]
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


@pytest.mark.slow
def test_mistakes_are_refused_and_what_survives_is_explained(everything):
    chosen = sampled([m for m in everything if not explained(m)], 150)
    explained = sampled([m for m in everything if explained(m)], 10)
    right = replace(everything[0], after="no mistake", source=(PACKAGE / everything[0].file).read_text())
    (control, *found) = judged([right, *chosen, *explained], processes=2)
    assert control[1] == SURVIVED
    assert not unexplained(found), "\n".join(map(str, unexplained(found)))
    assert not stale(found)
