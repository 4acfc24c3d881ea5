"""Numerical derivatives in float64, and the points where there is none.

Along a direction v of one leaf, F the plain program in float64 and u the cotangent, the central differences

    D(h) = <u, F(x + h v) - F(x - h v)> / 2h  =  <u, J v> + c2 h^2 + c4 h^4 + ..

at h = 2^-4, 2^-6, .. 2^-26 are extrapolated to h = 0 (Richardson); among all extrapolations the one that differs least
from its neighbours is taken, and that difference is its error (Ridders 1982, Advances in Engineering Software 4:75). An
entry of v is a normal number times the entry of x, or times the leaf's root mean square where x is smaller than a
thousandth of that, so a step is small beside every value.

Where the slopes from the left and from the right stay apart while h shrinks there is a kink. Its elements are searched
for by bisecting the leaf; they are reported, and only a slope outside the one-sided ones is wrong there. Where the
slopes grow like 1/h there is a jump, and no verdict.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from funcnet.check.judge import as_float64
from funcnet.check.subject import Point, Values, quickly

STEPS = 2.0 ** -np.arange(4, 28, 2)
KINKS = 64  # elements with a kink to be found before the whole leaf counts as one


@dataclass(frozen=True)
class Slope:
    """The derivative along a direction.

    Attributes:
        value, error: the best extrapolation, and an estimate of its error.
        left, right: the one-sided slopes at a small step.
        kind: "smooth", "kink", or "jump".
    """

    value: float
    error: float
    left: float
    right: float
    kind: str


class Numerical:
    """Numerical derivatives of a point's plain program along directions in one leaf."""

    def __init__(self, point: Point):
        self.point = point
        narrow = point.subject.plain.narrow  # a part, such as a Pallas kernel, runs in float32 at best
        self.steps, self.unit = (4 * STEPS, 2.0**-23) if narrow else (STEPS, 2.0**-50)

    @cached_property
    def center(self) -> Values:
        """The point in float64."""
        with jax.enable_x64(True):
            return self.point.in_float64(self.point.values)

    @cached_property
    def dy(self) -> Values:
        """The first cotangent in float64, 0 for outputs that are not finite."""
        given = self.point.dys[0]
        with jax.enable_x64(True):
            return self.point.in_float64(
                {path: np.where(finite, given[path], 0) for path, finite in self._finite.items()}
            )

    @cached_property
    def _finite(self) -> dict[str, np.ndarray]:
        return {path: np.isfinite(as_float64(y)) for path, y in self.point.plain_output.items()}

    @cached_property
    def whole(self) -> bool:
        """Whether every output is finite; one that is not has no slope, and its cotangent is taken as 0."""
        return all(finite.all() for finite in self._finite.values())

    @cached_property
    def blind(self) -> bool:
        """Whether no output is finite, so that there is nothing to differentiate."""
        return not self.whole and not any(finite.any() for finite in self._finite.values())

    @cached_property
    def gradients(self) -> dict[str, np.ndarray]:
        """The rule's gradients for the cotangent that is used here."""
        if self.whole:
            return self.point.rule[0]
        given = self.point.dys[0]
        dy = {k: np.where(finite, given[k], 0).astype(given[k].dtype) for k, finite in self._finite.items()}
        return self.point.gradients(dy)

    def backs(self, path: str, direction: np.ndarray, other: float) -> bool:
        """Whether the function is smooth along a direction, and has the rule's slope there, not the `other`."""
        slope, ours = self.slope(path, direction), slope_of(as_float64(self.gradients[path]), direction)
        apart = abs(ours - other)
        sure = slope.kind == "smooth" and np.isfinite(slope.value) and 8 * slope.error < apart
        off = abs(ours - slope.value)
        near = any(off <= 2 * norm(room * direction) + 4 * slope.error for room in self.point.rooms(path))
        return bool(sure and off <= apart / 4 and near)

    @cached_property
    def _along(self) -> Any:
        """(values, tangents, dy) -> <dy, F(x + hv) - F(x)>, <dy, F(x) - F(x - hv)>, size of terms, for every h."""
        point = self.point

        def along(values, tangents, dy):
            def step(base, h):
                y = point.outputs_of(jax.tree.map(lambda x, v: x + h.astype(v.dtype) * v, values, tangents), True)
                base = {k: jnp.where(h == 0, y[k], base[k]) for k in y}  # h = 0 comes first
                heard = {k: (dy[k] != 0) & jnp.isfinite(base[k]) for k in y}
                change = sum(jnp.real(jnp.where(heard[k], dy[k] * (y[k] - base[k]), 0.0)).sum() for k in y)
                size = sum(jnp.where(heard[k], jnp.abs(dy[k] * y[k]), 0.0).sum() for k in y)
                return base, (change, size)

            nothing = jax.tree.map(jnp.zeros_like, dy)
            _, found = jax.lax.scan(step, nothing, jnp.asarray([0.0, *self.steps, *-self.steps]))
            (above, below), sizes = (jnp.split(jnp.asarray(a)[1:], 2) for a in found)
            return above, -below, sizes[0] + sizes[1]

        return quickly(along)

    def slope(self, path: str, direction: np.ndarray) -> Slope:
        """The derivative of <dy, F> along `direction` in one leaf."""
        tangents = {k: direction if k == path else np.zeros(v.shape, v.dtype) for k, v in self.center.items()}
        with jax.enable_x64(True):
            tangents = self.point.in_float64(tangents)
            right, left, size = (np.asarray(a) for a in self._along(self.center, tangents, self.dy))
        rounding = self.unit * size / self.steps
        quotients = (right + left) / (2 * self.steps)
        value, error = extrapolated(quotients, rounding)
        with np.errstate(all="ignore"):
            off = np.abs(quotients - value) - 64 * rounding
        if off[4:].max() > 2 * np.abs(off[:4]).max():  # smaller steps see another function than the larger ones
            error = float("inf")
        return Slope(value, error, *_sides(left / self.steps, right / self.steps, rounding))

    def scale(self, path: str) -> np.ndarray:
        """How far a value may be moved: by its own size, or the leaf's where it is next to nothing; infinity stays."""
        size = np.abs(self.center[path])
        finite = np.isfinite(size)
        size = np.where(finite, size, 0.0)
        top = np.max(size, initial=0.0) or 1.0  # whose square may overflow
        typical = float(top * np.sqrt(np.mean((size[finite] / top) ** 2))) if finite.any() else 0.0
        return np.where(size > 1e-3 * typical, size, typical or 1.0) * finite

    def direction(self, path: str) -> np.ndarray:
        """A random direction v in a leaf, of so few digits that x + h v and x - h v are exact for small h.

        Were they rounded, the slope would have a relative error of 2^-53 / h: negligible for a function that varies on
        the scale of x, too much for one that varies on a smaller scale, such as a norm of values far from zero.
        """
        x = self.center[path]
        v = self.point.draw({path: x}, {path: self.scale(path)})[path]
        if np.iscomplexobj(x):
            return self._exact(np.real(v), np.real(x)) + 1j * self._exact(np.imag(v), np.imag(x))
        return self._exact(v, x)

    def _exact(self, v: np.ndarray, x: np.ndarray) -> np.ndarray:
        size = np.maximum(np.where(np.isfinite(x), np.abs(x), 0.0), 2.0**-30 * np.abs(v))
        unit = np.spacing(size) * 2 / self.steps[-1]
        return np.rint(v / unit) * unit

    def kinks(self, path: str, candidates: np.ndarray) -> np.ndarray:
        """Which of the `candidates`, a mask over a leaf, have a kink or a jump.

        They are found by bisection. Where there are too many to find one by one, a sample decides: if every element of
        it has a kink, all candidates count as kinks, else only those that were found.
        """
        found = np.zeros(candidates.shape, bool)
        flat, direction = np.flatnonzero(candidates), self.direction(path).ravel()
        waiting, left = [flat], min(4 * KINKS, max(8, 10**7 // max(direction.size, 1)))

        def smooth(part):
            probe = np.zeros(direction.size, direction.dtype)
            probe[part] = direction[part]
            return self.slope(path, probe.reshape(candidates.shape)).kind == "smooth"

        while waiting:
            part = waiting.pop()
            if left == 0 or found.sum() > KINKS:
                sample = flat[:: -(-len(flat) // 8)]
                return found if any(smooth([place]) for place in sample) else candidates.copy()
            left -= 1
            if smooth(part):
                continue
            if len(part) == 1:
                found.ravel()[part] = True
            else:
                waiting += [part[: len(part) // 2], part[len(part) // 2 :]]
        return found


def extrapolated(quotients: np.ndarray, rounding: np.ndarray) -> tuple[float, float]:
    """The limit of D(h) for h -> 0, each h a quarter of the last, and an estimate of its error, rounding included."""
    best, error, row = float("nan"), float("inf"), [float(quotients[0])]
    with np.errstate(all="ignore"):
        for q, noise in zip(quotients[1:], rounding[1:], strict=True):
            new, factor = [float(q)], 1.0
            for j, old in enumerate(row):
                factor *= 16.0
                new.append(new[j] + (new[j] - old) / (factor - 1))
                off = max(abs(new[j + 1] - new[j]), abs(new[j + 1] - old)) + float(noise)
                if off < error:
                    best, error = new[j + 1], off
            row = new
    return best, error


def _sides(left: np.ndarray, right: np.ndarray, rounding: np.ndarray) -> tuple[float, float, str]:
    """Slopes from the left and the right, and whether they show a kink or a jump.

    With a quarter of the step, the gap between them is a quarter where F is smooth, and stays at a kink. At a jump the
    slopes themselves grow fourfold, at an infinite slope such as that of a root at 0 twofold.
    """
    steps = slice(-6, -1)
    gap, size = np.abs(right - left)[steps], np.maximum(np.abs(left), np.abs(right))[steps]
    noise = 64 * rounding[steps]
    sides = float(left[-4]), float(right[-4])
    if not np.isfinite(size).all() or ((size[1:] > 1.8 * size[:-1]).all() and (size > noise).all()):
        return *sides, "jump"
    stays = (gap > noise).all() and gap[-1] > gap[0] / 2
    return *sides, "kink" if stays else "smooth"


def slope_of(gradient: np.ndarray, direction: np.ndarray) -> float:
    """<g, v> for real numbers; its real part for complex ones, as JAX pairs them."""
    moved = direction != 0
    return float(np.real(np.sum(gradient[moved] * direction[moved])))


def norm(v: np.ndarray) -> float:
    top = np.max(np.abs(v), initial=0.0) or 1.0  # whose square may overflow
    return float(top * np.sqrt(np.sum(np.abs(v / top) ** 2)))
