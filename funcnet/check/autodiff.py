"""Reverse mode through the plain program in float64: the oracle that judges every element."""

import numpy as np

from funcnet.check.judge import Leaf, as_float64
from funcnet.check.report import Failure, values_failure
from funcnet.check.slopes import Numerical, slope_of
from funcnet.check.subject import Point


def autodiff(point: Point, finder: Numerical, judge: bool) -> tuple[list[Leaf], dict[str, str], list[Failure]]:
    """Every leaf, measured for its worst cotangent; a verdict on each; and the failures.

    If autodiff is to `judge`, errors at kinks, and where autodiff itself gives nothing finite, are excused.
    """
    leaves, verdicts, failures = [], {}, []
    for path in point.sound:
        leaf = _worst(point, path)
        word = "ok" if leaf.within else "WRONG"
        if not point.reverses:
            word = "-"
        elif leaf.within and not all(np.isfinite(wanted[path]).all() for wanted in point.references):
            word = "-"
            point.notes.append(f"{path}: autodiff of the plain program is not finite either, so it is no judge")
        elif judge and not leaf.within:
            leaf, word = _excused(point, finder, path, leaf)
        leaves.append(leaf)
        verdicts[path] = word
        failures += [values_failure(leaf, "autodiff")] if word == "WRONG" else []
    return leaves, verdicts, failures


def _worst(point: Point, path: str, skip: np.ndarray | None = None) -> Leaf:
    """The leaf, measured for the dy with the worst error; the point records which dy that is."""
    pairs = zip(point.rule, point.references, strict=True)
    leaves = [point.measured(path, got[path], wanted[path], skip=skip) for got, wanted in pairs]
    point.shown[path] = int(np.argmax([leaf.relative / leaf.allowed for leaf in leaves]))
    return leaves[point.shown[path]]


def _excused(point: Point, finder: Numerical, path: str, leaf: Leaf) -> tuple[Leaf, str]:
    """What is left of an error once elements at kinks, and elements that autodiff cannot judge, are set aside."""
    apart, undefined = np.zeros(leaf.shape, bool), np.zeros(leaf.shape, bool)
    for got, wanted in zip(point.rule, point.references, strict=True):
        with np.errstate(all="ignore"):
            apart |= ~(np.abs(as_float64(got[path]) - wanted[path]) <= leaf.allowed * (leaf.scale or 1.0))
        undefined |= ~np.isfinite(wanted[path])
    kinked = finder.kinks(path, apart & ~undefined) if (apart & ~undefined).any() else np.zeros(leaf.shape, bool)
    if undefined.any():
        where = list(map(int, np.argwhere(undefined)[0]))
        point.notes.append(f"{path}: autodiff of the plain program is not finite at {where}, so it is no judge there")
    rest = apart & ~undefined & ~kinked
    mended = rest if rest.any() and _mended(point, finder, path, rest) else np.zeros(leaf.shape, bool)
    if mended.any():
        where = list(map(int, np.argwhere(mended)[0]))
        point.notes.append(
            f"{path}: at {where} the numerical slope is the rule's, not that of autodiff of the plain program"
        )
    skip = kinked | undefined | mended
    if not skip.any():
        return leaf, "WRONG"
    word = "kink" if kinked.any() else "-"
    if skip.all():
        return leaf, word
    left = _worst(point, path, skip)
    return left, word if left.within else "WRONG"


def _mended(point: Point, finder: Numerical, path: str, apart: np.ndarray) -> bool:
    """Whether the numerical slope agrees with the rule in the elements where rule and autodiff differ.

    Autodiff of the plain program is itself wrong where its parts have kinks that cancel, as in max(x, 0) +
    log1p(exp(-|x|)) at 0, or where it computes with the bits of numbers.
    """
    wanted = as_float64(point.reference({k: np.asarray(v) for k, v in finder.dy.items()})[path])
    for _ in range(point.directions):
        direction = np.where(apart, finder.direction(path), 0)
        if not finder.backs(path, direction, slope_of(wanted, direction)):
            return False
    return True
