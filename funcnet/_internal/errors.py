"""The one error for bad input, and where it happened.

It has the same four parts everywhere: where (the layer's path), what was expected, what was received, and the remedy.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jax

Tree = Any


class InputError(ValueError):
    """Bad input: where it happened, what was expected, what was received, and what to do about it.

    Attributes:
        path: names of the layers from the outermost to the one that complained.
        kind: that layer's kind, where it is known.
        expected, received, remedy: one sentence each.
    """

    def __init__(self, expected: str, received: str, remedy: str):
        super().__init__(expected, received, remedy)
        self.expected, self.received, self.remedy = expected, received, remedy
        self.path: tuple[str, ...] = ()
        self.kind = ""

    def __str__(self) -> str:
        where = "/".join(self.path) or self.kind or "argument"
        if self.path and not self.path[-1].startswith(self.kind):
            where += f" ({self.kind})"
        return f"{where}\n  expected  {self.expected}\n  received  {self.received}\n  remedy    {self.remedy}"


@contextmanager
def at(name: str) -> Iterator[None]:
    """Put `name` in front of the path of an error raised inside, and on the operations of a profile."""
    try:
        with jax.named_scope(name):
            yield
    except InputError as error:
        error.path = (name, *error.path)
        raise
    except Exception as error:
        error.add_note(f"in layer {name!r}")
        raise


@contextmanager
def by(kind: str) -> Iterator[None]:
    """Record the kind of layer in an `InputError` raised inside: where the layer has no path, the error shows that."""
    try:
        yield
    except InputError as error:
        error.kind = error.kind or kind
        raise


def describe(x: Tree) -> str:
    """`x` as `float32[32, 64]`, a tuple or dict of such, or the name of its type."""
    if has_shape_and_dtype(x):
        return f"{x.dtype}[{', '.join(map(str, x.shape))}]"
    if isinstance(x, Mapping):
        return "{" + ", ".join(f"{key}: {describe(value)}" for key, value in x.items()) + "}"
    if isinstance(x, (tuple, list)):
        return "(" + ", ".join(map(describe, x)) + ")"
    return "None" if x is None else type(x).__name__


def has_shape_and_dtype(x: Any) -> bool:
    return hasattr(x, "shape") and hasattr(x, "dtype") and not isinstance(x, type)
