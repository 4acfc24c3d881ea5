"""Tables and sizes as text."""

from collections.abc import Collection, Sequence
from typing import Any

import jax


def aligned(rows: Sequence[Sequence[str]], right: Collection[int] = ()) -> list[str]:
    """One line for each row; columns whose index is in `right` are aligned to the right, the others to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    pads = [str.rjust if i in right else str.ljust for i in range(len(widths))]
    return ["  ".join(pad(cell, w) for pad, cell, w in zip(pads, row, widths, strict=True)).rstrip() for row in rows]


def tabulated(head: Sequence[str], rows: Sequence[Sequence[str]], right: Collection[int] = ()) -> list[str]:
    """The same with a head and a rule below it."""
    rule = ["-" * max(map(len, column)) for column in zip(head, *rows, strict=True)]
    return aligned([head, rule, *rows], right)


def bytes_of(tree: Any) -> int:
    """Bytes of the distinct arrays in a tree."""
    distinct = {id(leaf): leaf for leaf in jax.tree.leaves(tree)}.values()
    return sum(leaf.size * leaf.dtype.itemsize for leaf in distinct)


def readable(size: float) -> str:
    """A number of bytes with three digits and a unit."""
    units = ["B", "kB", "MB", "GB", "TB"]
    while float(f"{size:.3g}") >= 1000 and len(units) > 1:
        size, units = size / 1000, units[1:]
    return f"{size:.3g} {units[0]}"
