"""The library's table of cases: every public constructor is in it, and every rule holds."""

import inspect
import typing

import pytest

import funcnet as fn
from funcnet.check.cases import CASES, constructors


def makes_a_layer(name):
    make = getattr(fn, name)
    returned = typing.get_type_hints(make).get("return") if inspect.isfunction(make) else None
    kind = typing.get_origin(returned) or returned
    return inspect.isclass(kind) and issubclass(kind, fn.Layer)


def test_every_public_constructor_has_a_case():
    assert constructors() == {name for name in fn.__all__ if makes_a_layer(name)}


def test_names_are_distinct_and_say_what_the_layer_is():
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names)
    free = {"elementwise", "stateless", "remat", "mixed"}  # their layers have the name of what they are given
    for case in CASES:
        known = {case.layer.name, case.layer.call.name if case.layer.call else ""}
        assert case.constructor in free | known, case.name


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_rule_is_what_autodiff_gives(case):
    case.check(oracles=("autodiff",)).raise_for_failure()
