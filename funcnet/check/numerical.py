"""The numerical oracle: the rule's slopes along random directions against numerical ones (funcnet/check/slopes.py)."""

from typing import Any

import numpy as np

from funcnet.check.judge import as_float64
from funcnet.check.report import Failure
from funcnet.check.slopes import KINKS, Numerical, Slope, norm, slope_of
from funcnet.check.subject import Point

ENOUGH = 1e-3  # an estimate with a larger relative error says nothing
BESIDE = 64  # nearby points at which slopes are taken for an element at a kink


def numerical(point: Point, finder: Numerical) -> tuple[dict[str, str], list[Failure]]:
    """A verdict by leaf, and the failures: the rule's slope along random directions against the numerical one."""
    if finder.blind:
        point.notes.append("no output is finite here: the numerical oracle cannot tell")
        return dict.fromkeys(point.sound, "-"), []
    verdicts, failures = {}, []
    for path in point.sound:
        word, failure = _leaf(point, finder, path)
        verdicts[path] = word
        failures += [failure] if failure else []
    return verdicts, failures


def _leaf(point: Point, finder: Numerical, path: str) -> tuple[str, Failure | None]:
    gradient = as_float64(finder.gradients[path])
    lost = ~np.isfinite(gradient)
    if gradient.size == 0:
        return "ok", None
    if failure := _not_finite(finder, path, gradient):
        return "WRONG", failure
    if lost.all():
        return "-", None
    gradient = np.where(lost, 0, gradient)
    kinked, unsure = np.zeros(gradient.shape, bool), bool(lost.any())
    for _ in range(point.directions):
        direction = np.where(kinked | lost, 0, finder.direction(path))
        slope = finder.slope(path, direction)
        if slope.kind != "smooth":
            kinked |= finder.kinks(path, ~kinked & ~lost)
            direction = np.where(kinked, 0, direction)
            slope = finder.slope(path, direction)
        if (kinked | lost).all():
            break
        word = _word(point, path, gradient, direction, slope)
        unsure |= word == "unsure"
        if word == "WRONG":
            ours = slope_of(gradient, direction)
            message = f"along a random direction the slope is {ours:.9g} by the rule, {slope.value:.9g} numerically"
            return "WRONG", Failure(path, "numerical", "slope", message, (), ours, slope.value)
    if kinked.any():
        if failure := _beyond_the_sides(point, finder, path, gradient, kinked):
            return "WRONG", failure
        point.notes.append(f"{path}: a kink or jump at {_listed(kinked)}; the rule gives a slope between the two sides")
        return "-" if unsure else "kink", None
    if unsure and not lost.any():
        point.notes.append(f"{path}: numerical differences are too noisy here to tell")
    return "-" if unsure else "ok", None


def _word(point: Point, path: str, gradient: np.ndarray, direction: np.ndarray, slope: Slope) -> str:
    """The rule's slope along a direction against the numerical one: "ok", "WRONG", or "unsure"."""
    if slope.kind != "smooth" or not np.isfinite([slope.value, slope.error]).all():
        return "unsure"
    off, sure = abs(slope_of(gradient, direction) - slope.value), False
    reach = max(norm(gradient * direction), abs(slope.value))
    for room in point.rooms(path):
        allowed = 2 * norm(room * direction) + 4 * slope.error
        sure = 4 * slope.error <= max(ENOUGH * reach, allowed / 2)
        if sure and off <= allowed + 1e-9 * reach:
            return "ok"
    return "WRONG" if sure else "unsure"


def _beyond_the_sides(
    point: Point, finder: Numerical, path: str, gradient: np.ndarray, kinked: np.ndarray
) -> Failure | None:
    """At a kink any slope between the one-sided ones is accepted; any other is wrong."""
    places = np.flatnonzero(kinked)
    for place in places[:: -(-len(places) // KINKS)]:  # a sample, where there are very many
        mask = _only(kinked.shape, place)
        direction = np.where(mask, finder.scale(path), 0)
        slope, ours = finder.slope(path, direction), slope_of(gradient, direction)
        low, high = sorted((slope.left, slope.right))
        more = 1e-5 * (high - low) + 8 * min(slope.error, ENOUGH * abs(ours))
        most = (high - low) / 2  # the program's own error here is mostly the jump between the sides

        def within(low, high, ours=ours, direction=direction, more=more, most=most):
            flat, baseline_error = (2 * norm(room * direction) for room in point.rooms(path))
            room = more + min(baseline_error, flat + most)
            return low - room <= ours <= high + room

        if slope.kind == "kink" and not within(low, high) and not within(*_beside(point, finder, path, direction)):
            size = norm(direction)
            message = (
                f"at a kink, {_listed(mask)}, the slope is {ours / size:.9g} by the rule, {slope.left / size:.9g} "
            )
            message += f"from the left and {slope.right / size:.9g} from the right"
            return Failure(path, "numerical", "beyond both sides", message)
    return None


def _beside(point: Point, finder: Numerical, path: str, direction: np.ndarray) -> tuple[float, float]:
    """The least and the greatest slope at nearby points, by autodiff: where several elements have a kink together, as
    where more than two values to be sorted are equal, the one-sided slopes along one of them are not all slopes."""
    if not point.reverses:
        return float("inf"), -float("inf")
    slopes = []
    for _ in range(BESIDE):
        some = {k: point.rng.random(np.shape(v)) < point.rng.random() for k, v in point.values.items()}
        some[path] |= direction != 0
        noise = point.draw(finder.center, {k: 2.0**-16 * finder.scale(k) * some[k] for k in some})
        values = {k: as_float64(v) + noise[k] for k, v in finder.center.items()}
        slopes.append(slope_of(point.reference(finder.dy, values)[path], direction))
    finite = [slope for slope in slopes if np.isfinite(slope)] or [float("nan")]
    return min(finite), max(finite)


def _not_finite(finder: Numerical, path: str, gradient: np.ndarray) -> Failure | None:
    """A gradient with an inf or NaN is wrong wherever the function has a slope, or two one-sided ones."""
    lost = np.flatnonzero(~np.isfinite(gradient) & (finder.scale(path) != 0)) if finder.whole else []
    for place in lost[:KINKS]:
        if failure := _not_finite_at(finder, path, gradient, tuple(map(int, np.unravel_index(place, gradient.shape)))):
            return failure
    return None


def _not_finite_at(finder: Numerical, path: str, gradient: np.ndarray, index: tuple[int, ...]) -> Failure | None:
    mask = _only(gradient.shape, np.ravel_multi_index(index, gradient.shape))
    slope = finder.slope(path, np.where(mask, finder.scale(path), 0))
    if slope.kind == "jump" or not np.isfinite([slope.left, slope.right]).all():
        return None
    unit = float(finder.scale(path)[index])
    value = slope.value / unit
    message = f"the gradient at {list(index)} is {gradient[index]}, where the function has the slope {value:.6g}"
    if slope.kind == "kink":
        sides = f"{slope.left / unit:.6g} from the left and {slope.right / unit:.6g} from the right"
        message = f"the gradient at {list(index)} is {gradient[index]}, at a kink with the slopes {sides}"
    return Failure(path, "numerical", "not finite", message, index, gradient[index], value)


def _only(shape: tuple[int, ...], i: Any) -> np.ndarray:
    mask = np.zeros(shape, bool)
    mask.ravel()[i] = True
    return mask


def _listed(mask: np.ndarray) -> str:
    where = [list(map(int, index)) for index in np.argwhere(mask)]
    return (
        "every element" if mask.all() and mask.size > 1 else ", ".join(map(str, where[:4])) + ", .." * (len(where) > 4)
    )
