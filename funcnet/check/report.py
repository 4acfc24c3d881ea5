"""Gradients side by side, leaf by leaf, and a report that says which leaf is wrong and where.

A leaf is right if the largest error among its elements is within a tolerance relative to the leaf's own scale, the
largest magnitude of its reference:

    max_i |a_i - b_i|  <=  tolerance(dtype) * max_i |b_i|

One number over a whole tree would let a small leaf, such as a bias, be wrong unseen.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from funcnet.expect import describe, is_array

Tree = Any


def tolerance(dtype: Any) -> float:
    """The error allowed relative to a leaf's scale: 1024 units of rounding; 8 in half precision."""
    info = jnp.finfo(dtype)
    return float(info.eps) * (1024 if info.bits >= 32 else 8)


@dataclass(frozen=True)
class Leaf:
    """One leaf compared: its path, and its worst element in both.

    Attributes:
        leaf: path, as `jax.tree_util.keystr` writes it.
        shape, dtype: of the gradient under test.
        scale: the largest magnitude in the reference.
        error: the largest absolute error, over the scale (over 1 where the scale is 0).
        index: where that is; `got` and `wanted` are the two values there.
        allowed: the tolerance `error` was held to.
        problem: what is wrong other than values, such as a missing leaf; or empty.
    """

    leaf: str
    shape: tuple[int, ...] = ()
    dtype: str = ""
    scale: float = 0.0
    error: float = 0.0
    index: tuple[int, ...] = ()
    got: float = 0.0
    wanted: float = 0.0
    allowed: float = 0.0
    problem: str = ""

    @property
    def ok(self) -> bool:
        return not self.problem and self.error <= self.allowed

    def badness(self) -> tuple[bool, float, str]:
        """Sorts the worst leaf first: wrong before right, then by error over what is allowed."""
        return self.ok, -self.error / (self.allowed or 1.0), self.leaf


@dataclass(frozen=True)
class Report:
    """What a check found: leaves compared, worst first, and laws that were broken.

    Attributes:
        title: what was checked against what.
        leaves: every gradient leaf.
        broken: sentences about laws that do not hold.
    """

    title: str
    leaves: tuple[Leaf, ...]
    broken: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether everything holds."""
        return not self.failures

    @property
    def failures(self) -> tuple[Leaf | str, ...]:
        """The leaves that are wrong, then the laws that are broken."""
        return (*(leaf for leaf in self.leaves if not leaf.ok), *self.broken)

    def raise_for_failure(self) -> None:
        """Raise AssertionError with the report as its message unless everything holds."""
        if not self.ok:
            raise AssertionError(str(self))

    def __str__(self) -> str:
        head = ("leaf", "shape", "dtype", "scale", "error/scale", "allowed", "worst at", "got", "reference", "")
        rows = [head, *map(_row, self.leaves)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
        left = (0, 1, 2, 6, 9)
        lines = [
            "  ".join(
                cell.ljust(w) if i in left else cell.rjust(w)
                for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        ]
        lines.insert(1, "  ".join("-" * w for w in widths))
        wrong = sum(not leaf.ok for leaf in self.leaves)
        verdict = f"{wrong} of {len(self.leaves)} leaves wrong, {len(self.broken)} laws broken"
        if self.ok:
            verdict = f"all {len(self.leaves)} leaves hold"
        return "\n".join(
            [self.title, *(line.rstrip() for line in lines), *(f"BROKEN  {s}" for s in self.broken), verdict]
        )


def _row(leaf: Leaf) -> tuple[str, ...]:
    if leaf.problem:
        return (leaf.leaf, str(list(leaf.shape)), leaf.dtype, "", "", "", "", "", "", f"WRONG: {leaf.problem}")
    numbers = f"{leaf.scale:.3g}", f"{leaf.error:.2e}", f"{leaf.allowed:.1e}"
    worst = str(list(leaf.index)), f"{leaf.got:.9g}", f"{leaf.wanted:.9g}"
    return (leaf.leaf, str(list(leaf.shape)), leaf.dtype, *numbers, *worst, "ok" if leaf.ok else "WRONG")


def compare_grads(got: Tree, wanted: Tree, *, name: str = "", dtype: Any = None) -> Report:
    """Compare two gradient pytrees leaf by leaf; the second is the reference.

    Args:
        got, wanted: pytrees of one structure. An integer leaf's gradient may be None or float0.
        name: put in front of every path.
        dtype: the dtype whose rounding is allowed; by default the coarser of each pair of leaves.
    """
    return Report("gradients compared with the reference", tuple(compare(got, wanted, name, dtype)))


def compare(
    got: Tree, wanted: Tree, name: str, dtype: Any = None, noise: Mapping[str, float] | None = None
) -> list[Leaf]:
    """The leaves of both, compared; the worst first. `noise`: a leaf's own rounding error, absolute, by path."""
    noise = noise or {}
    ours, theirs = _leaves(got, name), _leaves(wanted, name)
    leaves = [Leaf(path, problem="no gradient for this leaf") for path in theirs.keys() - ours.keys()]
    leaves += [Leaf(path, problem="a gradient for a leaf that has none") for path in ours.keys() - theirs.keys()]
    leaves += [
        _compare_leaf(path, ours[path], theirs[path], dtype, noise.get(path, 0.0)) for path in ours if path in theirs
    ]
    return sorted(leaves, key=Leaf.badness)


def _leaves(tree: Tree, name: str) -> dict[str, Any]:
    """Leaves by path; those without a gradient (None, float0) left out."""
    with_path = jax.tree_util.tree_leaves_with_path(tree)
    return {
        name + jax.tree_util.keystr(path): leaf
        for path, leaf in with_path
        if getattr(leaf, "dtype", None) != jax.dtypes.float0
    }


def _compare_leaf(path: str, got: Any, wanted: Any, dtype: Any, noise: float) -> Leaf:
    if not is_array(got) or got.shape != wanted.shape or got.dtype != wanted.dtype:
        return Leaf(path, problem=f"{describe(got)} for {describe(wanted)}")
    allowed = tolerance(got.dtype if dtype is None else dtype)
    a, b = (np.asarray(v, np.float64) for v in (got, wanted))
    if a.size == 0:
        return Leaf(path, got.shape, str(got.dtype), allowed=allowed)
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    with np.errstate(invalid="ignore"):
        error = np.where(same, 0.0, np.abs(a - b))
    error = np.where(np.isnan(error), np.inf, error)
    worst = tuple(int(i) for i in np.unravel_index(np.argmax(error), error.shape))
    finite = np.abs(b[np.isfinite(b)])
    scale = float(finite.max()) if finite.size else 0.0
    relative = float(error[worst]) / (scale or 1.0)
    if allowed < 1e-3:  # in half precision the tolerance is wide enough
        # The noise counts eight times over, and never for more than half of the digits.
        allowed += min(8 * noise / (scale or 1.0), allowed**0.5)
    return Leaf(path, got.shape, str(got.dtype), scale, relative, worst, float(a[worst]), float(b[worst]), allowed)
