"""Points where a function has no derivative: a kink, a jump, or a slope that is not finite.

One-sided difference quotients are compared, in float64 and coordinate by coordinate, at four steps: a gap between the
slopes that stays while the step shrinks is no curvature.

Numerics: a kink nearer to x than 7e-8 |x| counts as at x; one whose slopes differ by less than 3e-7 |f / x| may be
missed, and one that only shows in directions off the axes, as that of sqrt|x y| at 0, is missed. It is not checked that
automatic differentiation gives the same slope, and points of more than 1,000 entries are not checked at all.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from funcnet._internal.errors import InputError
from funcnet._internal.expect import is_concrete

Function = Callable[[Any], Any]
LARGEST = 1000  # entries of a point: the check takes memory proportional to their square


def refuse_kinks(f: Function, x: Array, y: Any, jacobian: Array, who: str) -> None:
    """Refuse a concrete x where an entry of f has no finite slope, or different ones from the left and the right."""
    if not all(map(is_concrete, (x, y, jacobian))) or x.size > LARGEST:
        return
    slopes = np.asarray(jacobian, np.float64).reshape(-1, x.size)
    left, right, bad = _one_sided_slopes(f, x, slopes)
    if not bad.any():
        bad = ~np.isfinite(slopes)
    if not bad.any():
        return
    entry, coordinate = (int(i) for i in np.argwhere(bad)[0])
    point = np.asarray(x, np.float64).reshape(-1)
    shown = ", ".join(f"{v:.6g}" for v in point[:8]) + ", ..." * (point.size > 8)
    where = f"{who} at " + (f"[{shown}], coordinate {coordinate}" if x.ndim else shown)
    where += f", entry {entry} of its value" if np.ndim(y) else ""
    sides, slope = (left[entry, coordinate], right[entry, coordinate]), slopes[entry, coordinate]
    shown = [f"{side + 0.0:.3g}".replace("nan", "undefined") for side in sides]  # -0.0 + 0.0 is 0.0
    received = f"{where}: slope {shown[0]} from the left, {shown[1]} from the right"
    if np.isfinite(sides).all() and not np.isfinite(slope):
        received += f", but {slope} by automatic differentiation"
    remedy = "move the point, or put a smooth function in place, such as sqrt(x**2 + eps) for |x|"
    raise InputError("a point where the function has one finite slope, from the left and the right", received, remedy)


def _one_sided_slopes(f: Function, x: Array, jacobian: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The slopes of f at x from the left and from the right, and whether they show that there is no derivative: [m, n].

    Over steps h, each 1/16 of the last (1/64 at 0), both slopes change like h where f is smooth, and the gap between
    them is smaller. At a kink they settle at different values: a step changes them by less than the gap; rounding opens
    no gap without changing them too. At a jump or a root they grow: a slope that doubles each time, and exceeds the
    `jacobian` [m, n], is infinite.
    """
    point = np.asarray(x, np.float64).reshape(-1)
    n = point.size
    scale = np.where(point == 0, np.abs(point).max() or 1.0, np.abs(point))
    # Powers of two, so that x + h is exact. The last is two units in the last place of a float32, so that a float32 is
    # on a kink if only its rounding moves it off; 0 has no rounding.
    exponent = np.frexp(scale)[1] - 11 - np.arange(4)[:, None] * np.where(point == 0, 6, 4)
    h = np.ldexp(1.0, exponent)[..., None]
    away = h * np.eye(n)
    probes = point + np.concatenate([np.zeros((1, n)), (-away).reshape(-1, n), away.reshape(-1, n)])
    values = _wide_values(f, probes.reshape(-1, *x.shape), x.dtype)
    eps, values = float(jnp.finfo(values.dtype).eps), np.asarray(values, np.float64).reshape(len(probes), -1)
    with np.errstate(all="ignore"):
        left, right = (values[1:] - values[0]).reshape(2, 4, n, -1) / np.stack([-h, h])
        # What rounding may add to a slope: that of the value, and of intermediate results as large as the point.
        size = np.max(np.abs(values), axis=0, initial=0, where=np.isfinite(values))
        noise = eps * (2**19 * size + 64 * scale.max()) / h[0]

        moved = np.abs(np.diff(left, axis=0)) + np.abs(np.diff(right, axis=0))
        apart = np.abs(right - left)
        nearby = np.abs(values[1:]).reshape(2, 4, n, -1).max(0)
        rounding = 64 * eps * np.maximum(nearby, np.abs(values[0])) / h
        kink = (np.maximum(moved, rounding[1:]) < apart[1:] / 2)[1:].all(0)
        finite = 2 * np.abs(np.nan_to_num(jacobian, posinf=0, neginf=0)).T
        left, right = (_limit(slope, kink, noise, finite) for slope in (left, right))
        return left.T, right.T, (kink | ~np.isfinite(left) | ~np.isfinite(right)).T


def _limit(slope: np.ndarray, kink: np.ndarray, noise: np.ndarray, finite: np.ndarray) -> np.ndarray:
    """The last slope, or infinity where it exceeds `finite` and each is more than twice the one before.

    At a kink, which may be off x by rounding, it is the first slope, in which rounding counts least.
    """
    size = np.abs(slope)
    grows = (size[1:] > 2 * size[:-1]).all(0) & (size[0] > noise) & (size[-1] > finite)
    last = np.where(grows, np.copysign(np.inf, slope[-1]), slope[-1])
    return np.where(kink & np.isfinite(last), slope[0], last)


def _wide_values(f: Function, points: np.ndarray, dtype: Any) -> Array:
    """f at points [N, ..] in float64; in `dtype` where f takes no other, as a layer whose parameters are float32."""
    try:
        # arrays in float32 that f closes over are widened, whatever the rules for promotion are outside
        with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
            return jax.vmap(f)(jnp.asarray(points))
    except Exception:
        return jax.vmap(f)(jnp.asarray(points, dtype))
