"""What does a wrong gradient look like? The mistakes that people make leave patterns; each is tried in turn.

Every pattern is a gradient that could be made of the reference, of what the rule has to work with (arguments, outputs,
cotangent), or of the true VJP of another cotangent. The first that gives the rule's gradient is the diagnosis. It is a
likely cause, no proof.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import permutations
from typing import Any

import jax.numpy as jnp
import numpy as np

from funcnet.check.judge import Leaf, wide

Values = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Context:
    """What a rule had to work with.

    Attributes:
        references: the reference of every leaf.
        arrays: arguments, outputs and cotangents by name.
        dy: the cotangent that both gradients belong to.
        vjp: the true gradients for another cotangent.
        rule: the rule's gradients for another cotangent.
    """

    references: Values
    arrays: Values = field(default_factory=dict)
    dy: Values = field(default_factory=dict)
    vjp: Callable[[Values], Values] | None = None
    rule: Callable[[Values], Values] | None = None


def diagnose(leaf: Leaf, got: Any, wanted: Any, context: Context) -> str:
    """The mistake that explains a leaf, in words; empty if none is known that does."""
    g, r = wide(got), wide(wanted)
    same = _close(2 * leaf.allowed)
    if g.shape != r.shape:
        return next(_shapes(g, r, same), "")
    if g.size == 0:
        return ""
    if not np.isfinite(g).all():
        return next(_not_finite(g, r, got.dtype), "")
    patterns = (_multiple, _rearranged, _other_leaf, _part, _signs, _other_cotangent, _factor, _running, _term)
    return next((word for pattern in patterns for word in pattern(leaf, g, r, context, same)), "")


def _close(relative: float) -> Callable[[np.ndarray, np.ndarray], bool]:
    def close(a: np.ndarray, b: np.ndarray) -> bool:
        if a.shape != b.shape or not (np.isfinite(a).all() and np.isfinite(b).all()):
            return False
        return bool(np.abs(a - b).max(initial=0) <= max(relative, 1e-7) * np.abs(b).max(initial=0))

    return close


Close = Callable[[np.ndarray, np.ndarray], bool]
Found = Iterator[str]


def _shapes(g: np.ndarray, r: np.ndarray, same: Close) -> Found:
    for axes in _subsets(g.ndim):
        if same(g.sum(axes), r) or same(g.sum(axes, keepdims=True), r):
            yield f"not summed over {_axes(axes)}, along which the forward pass broadcast it"
        if axes and (same(g.mean(axes), r) or same(g.mean(axes, keepdims=True), r)):
            yield f"not averaged over {_axes(axes)}"
    for axes in _subsets(r.ndim):
        if same(g, r.sum(axes)) or same(g, r.sum(axes, keepdims=True)):
            yield f"summed over {_axes(axes)}, which the leaf has itself"
    if g.ndim == r.ndim <= 5:
        for order in permutations(range(r.ndim)):
            if same(g, r.transpose(order)):
                yield "transposed" if r.ndim == 2 else f"its axes are permuted: {list(order)}"
    if g.size == r.size and same(g.ravel(), r.ravel()):
        yield "the right numbers in another shape"


def _subsets(rank: int) -> list[tuple[int, ...]]:
    return [tuple(i for i in range(rank) if bits >> i & 1) for bits in range(1, 2 ** min(rank, 5))]


def _axes(axes: tuple[int, ...]) -> str:
    return f"axis {axes[0]}" if len(axes) == 1 else f"axes {list(axes)}"


def _not_finite(g: np.ndarray, r: np.ndarray, dtype: Any) -> Found:
    bad = ~np.isfinite(g)
    count = "everywhere" if bad.all() else f"at {bad.sum()} of {g.size} elements"
    largest = float(jnp.finfo(dtype).max)
    if jnp.finfo(dtype).bits == 16 and largest < 1e6:
        yield f"not finite {count}: an intermediate result overflowed {dtype}, whose largest number is {largest:g}"
    if np.isnan(g[bad]).all() and np.isfinite(r[bad]).all() and not np.any(r[bad]):
        yield f"NaN {count}, where the true gradient is 0: 0 * inf, as from a branch that `where` does not take"
    if np.isnan(g).any():
        yield f"NaN {count}: 0 / 0 or inf - inf, as of a division or a root at 0"
    yield f"infinite {count}: a division by 0 or an overflow"


def _multiple(leaf: Leaf, g: np.ndarray, r: np.ndarray, context: Context, same: Close) -> Found:
    """g = c r."""
    if not np.any(g):
        yield "zero: no gradient arrives at this leaf"
        return
    size = float(np.sum(np.abs(r) ** 2))
    c = complex(np.sum(g * np.conj(r)) / size) if size else 0.0
    if not size or (r.size == 1 and len(context.references) == 0):
        return
    if np.iscomplexobj(g) and not np.isrealobj(r) and same(g, np.conj(r)):
        yield "the complex conjugate of the gradient"
    if (np.iscomplexobj(g) and abs(c.imag) > 1e-7 * abs(c)) or not same(
        g, c.real * r if not np.iscomplexobj(g) else c * r
    ):
        return
    yield _constant(c.real, context)


def _constant(c: float, context: Context) -> str:
    if abs(c + 1) < 1e-3:
        return "the sign is flipped"
    if abs(c - 2) < 1e-3:
        return "twice the gradient: counted twice, or a factor 1/2 is missing"
    if abs(c - 0.5) < 1e-3:
        return "half the gradient: one of two equal uses is not counted, or a factor 2 is missing"
    for name, array in context.arrays.items():
        for axes in _subsets(array.ndim):
            n = int(np.prod([array.shape[i] for i in axes]))
            where = f"{n} is the size of {_axes(axes)} of {name}"
            if n > 2 and abs(c * n - 1) < 1e-3:
                return f"1/{n} of the gradient, and {where}: divided by it once too often"
            if n > 2 and abs(c / n - 1) < 1e-3:
                return f"{n} times the gradient, and {where}: a division by it is missing"
    return f"{c:.6g} times the gradient: a constant factor"


def _rearranged(leaf: Leaf, g: np.ndarray, r: np.ndarray, context: Context, same: Close) -> Found:
    """The numbers of r in other places."""
    if 1 < r.ndim <= 5:
        for order in list(permutations(range(r.ndim)))[1:]:
            if same(g, r.transpose(order)):
                yield "transposed" if r.ndim == 2 else f"its axes are permuted: {list(order)}"
    for axis, n in enumerate(r.shape):
        if n < 2:
            continue
        if same(g, np.flip(r, axis)):
            yield f"reversed along axis {axis}"
        for shift in (1, -1, *(s for s in range(2, n - 1) if n <= 64)):
            if same(g, np.roll(r, shift, axis)):
                yield f"shifted by {shift} along axis {axis}"
        for shift in (1, -1):
            if same(g, _shifted(r, shift, axis)):
                yield f"shifted by {shift} along axis {axis}, the last entry lost"
        if word := _permuted(g, r, axis, same):
            yield word


def _shifted(r: np.ndarray, shift: int, axis: int) -> np.ndarray:
    """Shifted, zeros moved in."""
    moved = np.moveaxis(np.roll(r, shift, axis), axis, 0).copy()
    moved[0 if shift > 0 else -1] = 0
    return np.moveaxis(moved, 0, axis)


def _permuted(g: np.ndarray, r: np.ndarray, axis: int, same: Close) -> str:
    n = r.shape[axis]
    if n > 4096:
        return ""
    a, b = (np.moveaxis(v, axis, 0).reshape(n, -1) for v in (g, r))
    key = np.random.default_rng(0).standard_normal(a.shape[1])
    order = np.empty(n, int)
    order[np.argsort(np.real(a @ key), kind="stable")] = np.argsort(np.real(b @ key), kind="stable")
    if (order == np.arange(n)).all() or not same(a, b[order]):
        return ""
    for blocks in range(2, 9):
        if n % blocks == 0 and n > blocks:
            starts = order.reshape(blocks, -1)
            if (starts == starts[:, :1] + np.arange(n // blocks)).all() and not (starts[:, 0] % (n // blocks)).any():
                return f"the {blocks} blocks along axis {axis} are in the order {list(map(int, starts[:, 0] // (n // blocks)))}"
    moved = int((order != np.arange(n)).sum())
    return f"{moved} of its {n} slices along axis {axis} are in each other's places"


def _other_leaf(leaf: Leaf, g: np.ndarray, r: np.ndarray, context: Context, same: Close) -> Found:
    for name, other in context.references.items():
        if name == leaf.leaf or not np.any(other):
            continue
        if same(g, wide(other)):
            yield f"this is the gradient of {name}"
        if r.ndim == 2 and same(g, wide(other).T):
            yield f"this is the gradient of {name}, transposed"


def _part(leaf: Leaf, g: np.ndarray, r: np.ndarray, context: Context, same: Close) -> Found:
    """Right but for a few elements, a row, or where one of the two is zero."""
    wrong = np.abs(g - r) > max(leaf.allowed, 1e-7) * (np.abs(r).max(initial=0) or 1.0)
    count = int(wrong.sum())
    if g.size < 3 or count == 0:
        return
    if count == 1:
        (index,) = np.argwhere(wrong)
        ratio = f", {np.real(g[wrong][0] / r[wrong][0]):.4g} times what it should be" if r[wrong][0] else ""
        yield f"one element alone is wrong, {list(map(int, index))}{ratio}"
    for axis in range(g.ndim):
        places = np.unique(np.argwhere(wrong)[:, axis])
        if g.shape[axis] > 2 and len(places) <= max(1, g.shape[axis] // 8):
            a, b = np.take(g, places, axis), np.take(r, places, axis)
            how = "zero" if not np.any(a) else "not what it should be"
            yield f"only index {', '.join(map(str, places.tolist()))} of axis {axis} is wrong: it is {how}"
    unlike = (g == 0) != (r == 0)
    if not (wrong & ~unlike).any() and unlike.any():
        lost, extra = int(((g == 0) & unlike).sum()), int(((r == 0) & unlike).sum())
        if lost and extra:
            yield f"another mask: {lost} elements are zero that should not be, {extra} are not that should be"
        elif lost:
            yield f"{lost} of {g.size} elements are zero that should not be: a mask, or a part that is not written"
        else:
            yield f"{extra} of {g.size} elements should be zero: a mask is missing"


def _signs(leaf: Leaf, g: np.ndarray, r: np.ndarray, context: Context, same: Close) -> Found:
    if same(np.abs(g), np.abs(r)):
        yield f"right but for the sign, which is flipped at {int((np.sign(g) != np.sign(r)).sum())} of {g.size} elements"
    top = np.abs(g).max()
    if np.isrealobj(g) and (np.abs(g) == top).sum() > 1 and same(g, np.clip(r, -top, top)):
        yield f"clipped to {top:.6g}"


def _other_cotangent(leaf: Leaf, g: np.ndarray, r: np.ndarray, context: Context, same: Close) -> Found:
    """g is the true VJP of a part of dy, or of a shifted one; or dy counts twice, or not at all."""
    if context.rule is not None:
        doubled = wide(context.rule({k: (2 * v).astype(v.dtype) for k, v in context.dy.items()})[leaf.leaf])
        if same(doubled, g):
            yield "it does not depend on the size of the cotangent: dy is left out"
        if same(doubled, 4 * g):
            yield "it is quadratic in the cotangent: dy is multiplied in twice"
    if context.vjp is None:
        return
    for changed, word in _cotangents(context.dy):
        if same(g, wide(context.vjp(changed)[leaf.leaf])):
            yield word


def _cotangents(dy: Values) -> Iterator[tuple[Values, str]]:
    for name, v in dy.items():
        if len(dy) > 1:
            yield {**dy, name: np.zeros_like(v)}, f"the cotangent of the output {name} is lost"
            yield {k: a if k == name else np.zeros_like(a) for k, a in dy.items()}, f"only the output {name} counts"
        for axis, n in enumerate(v.shape[:3]):
            if n < 2:
                continue
            for index in (0, n - 1):
                yield (
                    {**dy, name: _sliced(v, axis, index)},
                    f"only index {index} of axis {axis} of the cotangent counts",
                )
                if n > 2:
                    yield (
                        {**dy, name: v - _sliced(v, axis, index)},
                        f"index {index} of axis {axis} of the cotangent is lost",
                    )
            for shift in (1, -1):
                yield {**dy, name: np.roll(v, shift, axis)}, f"the cotangent is shifted by {shift} along axis {axis}"
                yield {**dy, name: _shifted(v, shift, axis)}, f"the cotangent is shifted by {shift} along axis {axis}"
            yield {**dy, name: np.flip(v, axis)}, f"the cotangent is reversed along axis {axis}"
            mean = np.broadcast_to(v.mean(axis, keepdims=True), v.shape).astype(v.dtype)
            yield {**dy, name: mean}, f"the cotangent is averaged over axis {axis}"
        yield {**dy, name: np.abs(v)}, "the sign of the cotangent is lost"
        yield {**dy, name: np.ones_like(v)}, "the cotangent is taken for ones: dy is left out"


def _sliced(v: np.ndarray, axis: int, index: int) -> np.ndarray:
    kept = np.zeros_like(v)
    at = (slice(None),) * axis + (index,)
    kept[at] = v[at]
    return kept


def _factor(leaf: Leaf, g: np.ndarray, r: np.ndarray, context: Context, same: Close) -> Found:
    """g = r c or g c = r for an array c that the rule has, or a factor that differs along one axis only."""
    for name, c in _candidates(context, r.shape):
        if same(g, r * c) and not same(c, np.ones_like(c)):
            yield f"a factor {name} too many"
        if np.abs(c).min(initial=1) > 0 and same(g * c, r):
            yield f"a factor {name} is missing"
    with np.errstate(all="ignore"):
        ratio = np.where(np.abs(r) > 1e-9 * np.abs(r).max(), g / np.where(r == 0, 1, r), np.nan)
    for axis in range(r.ndim if r.ndim > 1 else 0):
        others = tuple(i for i in range(r.ndim) if i != axis)
        if (min(r.shape[i] for i in others) == 1 and np.prod([r.shape[i] for i in others]) < 3) or r.shape[axis] < 2:
            continue
        with np.errstate(all="ignore"):
            typical = np.nanmedian(np.real(ratio), axis=others, keepdims=True) if np.isfinite(ratio).any() else np.nan
        if np.isfinite(typical).all() and same(g, r * typical):
            yield f"times a factor that differs along axis {axis} alone: a wrong or missing scale there"


def _candidates(context: Context, shape: tuple[int, ...]) -> Iterator[tuple[str, np.ndarray]]:
    """Arrays that broadcast to a shape from the right, or from the left."""
    for name, array in context.arrays.items():
        c = wide(array)
        if c.size < 2 or not np.isfinite(c).all():
            continue
        for view in {c.shape, (*c.shape, *(1,) * (len(shape) - c.ndim))}:
            try:
                yield name, np.broadcast_to(c.reshape(view), shape)
            except ValueError:
                continue


def _running(leaf: Leaf, g: np.ndarray, r: np.ndarray, context: Context, same: Close) -> Found:
    for axis, n in enumerate(r.shape):
        if n < 3:
            continue
        for direction in (slice(None), slice(None, None, -1)):
            at = (slice(None),) * axis + (direction,)
            if same(np.cumsum(g[at], axis)[at], r):
                yield f"not accumulated along axis {axis}: what flows on from step to step is lost"
            if same(g, np.cumsum(r[at], axis)[at]):
                yield f"accumulated along axis {axis}, where every step stands for itself"


def _term(leaf: Leaf, g: np.ndarray, r: np.ndarray, context: Context, same: Close) -> Found:
    """g = r + a term that is known by its shape: constant along an axis, or like an array that the rule has."""
    e = g - r
    if e.size < 3:
        return
    for axes in [axes for axes in _subsets(e.ndim) if np.prod([e.shape[i] for i in axes]) > 1]:
        if same(np.broadcast_to(e.mean(axes, keepdims=True), e.shape), e):
            yield f"off by a term that is the same along {_axes(axes)}: a mean or sum over it is missing, or too many"
    for name, c in _candidates(context, r.shape):
        a = np.sum(e * np.conj(c)) / np.sum(np.abs(c) ** 2)
        if same(a * c, e):
            yield f"off by {np.real(a):.4g} times {name}: a term like it is missing, or too many"
        for axis in range(e.ndim - 1, -1, -1):
            if e.shape[axis] < 3 or e.ndim == 1:
                continue
            with np.errstate(all="ignore"):
                a = np.sum(e * np.conj(c), axis, keepdims=True) / np.sum(np.abs(c) ** 2, axis, keepdims=True)
            if np.isfinite(a).all() and same(a * c, e):
                yield f"off by a term proportional to {name} along axis {axis}: a sum over that axis, times {name}, is missing"
