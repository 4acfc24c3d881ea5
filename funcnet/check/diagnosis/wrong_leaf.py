"""A wrong leaf, and what there is to explain it with."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from funcnet.check.judge import Leaf, as_float64

Values = Mapping[str, np.ndarray]
Found = Iterator[str]
ARRAYS, NUMBERS = 24, 100_000  # how many there may be for VJPs to be tried: each takes a run of the program


@dataclass(frozen=True)
class Context:
    """What a rule had to work with.

    Attributes:
        references: the reference of every leaf.
        arrays: arguments, outputs and cotangents by name; the cotangent of y is dy.
        dy: the cotangent that both gradients belong to, by output.
        vjp: the true gradients for another cotangent, and for other arguments if they are given.
        rule: the rule's gradients for another cotangent.
    """

    references: Values
    arrays: Values = field(default_factory=dict)
    dy: Values = field(default_factory=dict)
    vjp: Callable[..., Values] | None = None
    rule: Callable[..., Values] | None = None

    @property
    def small(self) -> bool:
        """Whether there is time for true VJPs of other cotangents and at other points."""
        numbers = sum(array.size for array in (*self.arrays.values(), *self.references.values()))
        return self.vjp is not None and len(self.arrays) <= ARRAYS and numbers <= NUMBERS

    @property
    def cotangents(self) -> set[str]:
        """The names of the cotangents among the arrays."""
        return {"d" + name for name in self.dy}


@dataclass(frozen=True)
class WrongLeaf:
    """A wrong leaf: its gradient g, the reference r, and what there is to explain g with."""

    leaf: Leaf
    g: np.ndarray
    r: np.ndarray
    context: Context
    rounding: float

    @cached_property
    def bar(self) -> float:
        """The largest error of an explanation: a tenth of the leaf's; less for few numbers, which are easy to fit."""
        error = self.leaf.error
        return error * min(0.1, 10.0 ** (-6 / max(self.g.size, 1))) if 0 < error < np.inf else np.inf

    def same(self, a: Any, b: Any) -> bool:
        """Whether two arrays are the same to rounding."""
        a, b = np.asarray(a), np.asarray(b)
        if a.shape != b.shape or not (np.isfinite(a).all() and np.isfinite(b).all()):
            return False
        return bool(np.abs(a - b).max(initial=0) <= min(self.rounding * np.abs(b).max(initial=0), self.bar))

    def true(self, dy: Values | None = None, values: Values | None = None) -> np.ndarray:
        """The leaf's true gradient for another cotangent, or at another point."""
        assert self.context.vjp
        found = self.context.vjp(dy or self.context.dy, *([] if values is None else [values]))
        return as_float64(found[self.leaf.leaf])


def subsets(rank: int) -> list[tuple[int, ...]]:
    """The sets of axes, the largest first."""
    sets = [tuple(i for i in range(rank) if bits >> i & 1) for bits in range(1, 2 ** min(rank, 5))]
    return sorted(sets, key=lambda axes: -len(axes))


def axes_named(axes: tuple[int, ...]) -> str:
    """In words: "axis 1", "axes [0, 2]"."""
    return f"axis {axes[0]}" if len(axes) == 1 else f"axes {list(axes)}"
