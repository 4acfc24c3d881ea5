"""A failure made small: the same failure on smaller arrays, and the Python code for those arrays."""

from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from funcnet.check.spec import Spec, resized, sizes_of

Tree = Any
TRIES = 16


def smallest(tree: Tree, fails: Callable[[Tree], bool]) -> Tree:
    """A tree of smaller specs and arrays on which the check still fails.

    Axes of one size shrink together, the largest first, each to the smallest of 1, 2, 3 and its half at which the check
    fails. A size that the function does not take is passed over.
    """
    left = TRIES
    for size in sizes_of(tree):
        for new in sorted({1, 2, 3, size // 2}):
            if not 0 < new < size or left == 0:
                continue
            left -= 1
            try:
                candidate = resized(tree, {size: new})
                smaller = fails(candidate)
            except Exception:  # the function does not take such sizes
                continue
            if smaller:
                tree = candidate
                break
    return tree


def as_code(tree: Tree, name: str) -> str:
    """A tree of specs and arrays as Python code: specs as texts, arrays as slices of what the caller calls `name`."""
    if isinstance(tree, Spec):
        return f'"{tree}"'
    if isinstance(tree, Mapping):
        return "{" + ", ".join(f"{key!r}: {as_code(value, f'{name}[{key!r}]')}" for key, value in tree.items()) + "}"
    if names := _fields(tree):
        inner = ", ".join(f"{each}={as_code(getattr(tree, each), f'{name}.{each}')}" for each in names)
        return f"{type(tree).__name__}({inner})"
    if isinstance(tree, (tuple, list)):
        inner = ", ".join(as_code(value, f"{name}[{i}]") for i, value in enumerate(tree))
        return f"[{inner}]" if isinstance(tree, list) else f"({inner}{',' * (len(tree) == 1)})"
    if tree is None or not hasattr(tree, "ndim") or not tree.ndim:
        return name
    return f"{name}[{', '.join(f':{size}' for size in tree.shape)}]"


def _fields(tree: Tree) -> tuple[str, ...]:
    """The names of the fields of a NamedTuple or a dataclass."""
    if is_dataclass(tree):
        return tuple(field.name for field in fields(tree) if field.init)
    return getattr(tree, "_fields", ())
