"""Imports run one way through the rooms of the house, and dir(fn) shows public names alone."""

import ast
from pathlib import Path

import pytest

import funcnet as fn

PACKAGE = Path(fn.__file__).parent
ROOMS = [
    {"_internal"},
    {"gradients", "structure"},
    {"layer"},
    {"layers"},
    {"combinators"},
    {"compositions", "losses", "calculus"},
    {"train"},
    {"inspect"},
    {"interop"},
    {"check"},
]
FLOOR = {room: floor for floor, rooms in enumerate(ROOMS) for room in rooms}


def room(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_is_imported_from_above(path):
    if room(path) in ("__init__", "__main__"):
        return
    imports = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
    taken = {node.module.split(".")[1] for node in imports if node.module and node.module.startswith("funcnet.")}
    above = {other for other in taken - {room(path)} if FLOOR[other] >= FLOOR[room(path)]}
    assert not above, f"{room(path)} imports {above}"


def test_the_package_shows_its_public_names():
    assert set(dir(fn)) == {*fn.__all__, "__version__"}
    assert fn.__version__.count(".") == 2
