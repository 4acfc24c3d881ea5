"""Patterns in the numbers of a gradient beside those of its reference."""

from itertools import permutations
from typing import Any

import jax.numpy as jnp
import numpy as np

from funcnet.check.diagnosis.wrong_leaf import Found, Values, WrongLeaf, axes_named, subsets
from funcnet.check.judge import as_float64


def shapes(wrong: WrongLeaf) -> Found:
    """g has another shape than r: a sum is missing, or one too many."""
    g, r, same = wrong.g, wrong.r, wrong.same
    for axes in subsets(g.ndim):
        if 1 in [g.shape[i] for i in axes]:
            continue
        if same(g.sum(axes), r) or same(g.sum(axes, keepdims=True), r):
            yield f"not summed over {axes_named(axes)}, along which the forward pass broadcast it"
        if same(g.mean(axes), r) or same(g.mean(axes, keepdims=True), r):
            yield f"not averaged over {axes_named(axes)}"
    for axes in subsets(r.ndim):
        if same(g, r.sum(axes)) or same(g, r.sum(axes, keepdims=True)):
            yield f"summed over {axes_named(axes)}, which the leaf has itself"
    if g.ndim == r.ndim <= 5:
        yield from _transposed(wrong)
    if g.size == r.size and same(g.ravel(), r.ravel()):
        yield "the right numbers in another shape"


def _transposed(wrong: WrongLeaf) -> Found:
    for order in list(permutations(range(wrong.r.ndim)))[1:]:
        if wrong.same(wrong.g, wrong.r.transpose(order)):
            yield "transposed" if wrong.r.ndim == 2 else f"its axes are permuted: {list(order)}"


def not_finite(wrong: WrongLeaf, dtype: Any) -> Found:
    """g has NaN or infinities."""
    g, r = wrong.g, wrong.r
    bad = ~np.isfinite(g)
    count = "everywhere" if bad.all() else f"at {bad.sum()} of {g.size} elements"
    largest = float(jnp.finfo(dtype).max)
    if np.isnan(g[bad]).all() and not np.any(r[bad]):
        yield f"NaN {count}, where the true gradient is 0: as from a branch that `where` does not take"
    if largest < 1e6:
        yield f"not finite {count}: an intermediate result overflowed {dtype}, whose largest number is {largest:g}"
    if np.isnan(g).any():
        yield f"NaN {count}: 0 / 0, inf / inf or inf - inf, as of a division or root at 0, or where exp overflows"
    yield f"infinite {count}: a division by 0 or an overflow"


def multiple(wrong: WrongLeaf) -> Found:
    """g = c r."""
    g, r = wrong.g, wrong.r
    if not np.any(g):
        yield "zero: no gradient arrives at this leaf"
    if not np.any(g) or not np.any(r):
        return
    if np.iscomplexobj(g) and wrong.same(g, np.conj(r)):
        yield "the complex conjugate of the gradient"
    c = np.sum(g * np.conj(r)) / np.sum(np.abs(r) ** 2)
    if wrong.same(g, np.real(c) * r) and (word := _constant(float(np.real(c)), wrong)):
        yield word


def _constant(c: float, wrong: WrongLeaf) -> str:
    near = lambda a, b: abs(a - b) <= max(wrong.rounding, 1e-7) * abs(b)
    if near(c, -1):
        return "the sign is flipped"
    if near(c, 2):
        return "twice the gradient: counted twice, or a factor 1/2 is missing"
    if near(c, 0.5):
        return "half the gradient: one of two equal uses is not counted, or a factor 2 is missing"
    for n, where in _sizes(wrong.context.arrays):
        for size, by in ((n, f"{n}"), (n**0.5, f"the root of {n}")):
            if near(c * size, 1):
                return f"divided by {by}, {where}, once too often"
            if near(c, size):
                return f"a division by {by}, {where}, is missing"
    shown = f"{c:.6g}" if abs(c - 1) > 1e-3 else f"1 {'+' if c > 1 else '-'} {abs(c - 1):.3g}"
    enough = 1 if wrong.rounding < 1e-3 else 5  # a few half-precision numbers are proportional by chance
    return f"times {shown}: a constant factor" if wrong.r.size > enough else ""


def _sizes(arrays: Values) -> list[tuple[int, str]]:
    """The sizes over which a mean may have been taken, single axes first."""
    found = [(len(axes), array, axes, name) for name, array in arrays.items() for axes in subsets(array.ndim)]
    found.sort(key=lambda each: each[0])
    size = lambda array, axes: int(np.prod([array.shape[i] for i in axes]))
    sizes = [(size(a, axes), f"the size of {axes_named(axes)} of {name}") for _, a, axes, name in found]
    return [(n, where) for n, where in sizes if n > 2]


def itself(wrong: WrongLeaf) -> Found:
    """g is an array that the rule has."""
    for name, array in wrong.context.arrays.items():
        if wrong.same(wrong.g, as_float64(array)):
            is_dy = name in wrong.context.cotangents
            yield f"this is {name} itself" + (", as if the derivative were 1" if is_dy else "")


def rearranged(wrong: WrongLeaf) -> Found:
    """The numbers of r in other places."""
    g, r, same = wrong.g, wrong.r, wrong.same
    if 1 < r.ndim <= 5:
        yield from _transposed(wrong)
    for axis, n in enumerate(r.shape):
        if n < 2:
            continue
        if same(g, np.flip(r, axis)):
            yield f"reversed along axis {axis}"
        for shift in (1, -1, *(s for s in range(2, n - 1) if n <= 64)):
            if same(g, np.roll(r, shift, axis)):
                yield f"shifted by {shift} along axis {axis}"
        for shift in (1, -1):
            if n > 2 and same(*(_inner(a, shift, axis) for a in (g, np.roll(r, shift, axis)))):
                yield f"shifted by {shift} along axis {axis}, but for its end"
        if word := _permuted(wrong, axis):
            yield word


def _inner(a: np.ndarray, shift: int, axis: int) -> np.ndarray:
    """The array without the entry that a shift would wrap around from the other end."""
    return np.delete(a, 0 if shift > 0 else -1, axis)


def _permuted(wrong: WrongLeaf, axis: int) -> str:
    n = wrong.r.shape[axis]
    if n > 4096:
        return ""
    a, b = (np.moveaxis(v, axis, 0).reshape(n, -1) for v in (wrong.g, wrong.r))
    key = np.random.default_rng(0).standard_normal(a.shape[1])
    order = np.empty(n, int)
    order[np.argsort(np.real(a @ key), kind="stable")] = np.argsort(np.real(b @ key), kind="stable")
    if (order == np.arange(n)).all() or not wrong.same(a, b[order]):
        return ""
    for blocks in (blocks for blocks in range(2, 9) if n % blocks == 0 and n > blocks):
        length = n // blocks
        starts = order.reshape(blocks, length)
        if (starts == starts[:, :1] + np.arange(length)).all() and not (starts[:, 0] % length).any():
            return f"the {blocks} blocks along axis {axis} are in the order {(starts[:, 0] // length).tolist()}"
    return f"{(order != np.arange(n)).sum()} of its {n} slices along axis {axis} are in each other's places"


def other_leaf(wrong: WrongLeaf) -> Found:
    """g is the gradient of another leaf."""
    for name, other in wrong.context.references.items():
        if name == wrong.leaf.leaf or not np.any(other):
            continue
        for sign, word in ((1, ""), (-1, ", with the other sign")):
            if wrong.same(wrong.g, sign * as_float64(other)):
                yield f"this is the gradient of {name}{word}"
        if wrong.r.ndim == 2 and wrong.same(wrong.g, as_float64(other).T):
            yield f"this is the gradient of {name}, transposed"


def part(wrong: WrongLeaf) -> Found:
    """Right but for one element, a few slices, or where one of the two is zero."""
    g, r = wrong.g, wrong.r
    off = np.abs(g - r) > max(wrong.leaf.allowed, 1e-7) * (np.abs(r).max() or 1.0)
    if g.size < 3 or not off.any():
        return
    if off.sum() == 1:
        (index,) = np.argwhere(off).tolist()
        ratio = f", {np.real(g[off][0] / r[off][0]):.4g} times what it should be" if r[off][0] else ""
        yield f"one element alone is wrong, {index}{ratio}"
    for axis in range(g.ndim):
        places = np.unique(np.argwhere(off)[:, axis])
        if g.shape[axis] > 2 and len(places) <= max(1, g.shape[axis] // 8):
            how = "zero" if not np.take(g, places, axis).any() else "not what it should be"
            yield f"only index {', '.join(map(str, places))} of axis {axis} is wrong: it is {how}"
    unlike = (g == 0) != (r == 0)
    if (off & ~unlike).any() or not unlike.any():
        return
    lost, extra = int(((g == 0) & unlike).sum()), int(((r == 0) & unlike).sum())
    if lost and extra:
        yield f"another mask: {lost} of {g.size} elements are zero that should not be, {extra} are not that should be"
    elif lost:
        yield f"{lost} of {g.size} elements are zero that should not be: a mask, or a part that is not written"
    else:
        yield f"{extra} of {g.size} elements should be zero: a mask is missing"


def signs(wrong: WrongLeaf) -> Found:
    """|g| is |r|, or g is r clipped."""
    g, r = wrong.g, wrong.r
    if wrong.same(np.abs(g), np.abs(r)) and np.isrealobj(g):
        yield f"right but for the sign, which is flipped at {(np.sign(g) != np.sign(r)).sum()} of {g.size} elements"
    top = np.abs(g).max()
    if np.isrealobj(g) and (np.abs(g) == top).sum() > 1 and wrong.same(g, np.clip(r, -top, top)):
        yield f"clipped to {top:.6g}"


def mixed_up(wrong: WrongLeaf) -> Found:
    """The numbers of r, in no order that is known."""
    if wrong.g.size > 3 and wrong.same(np.sort(wrong.g.ravel()), np.sort(wrong.r.ravel())):
        yield "the right numbers in other places: an order, or an index, is mixed up"
