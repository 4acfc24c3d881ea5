"""What does a wrong gradient look like? The mistakes that people make leave patterns; each is tried in turn.

Every pattern is a gradient that could be made of the reference, of what the rule has to work with (arguments, outputs,
cotangent), or of the true VJP of another cotangent or at another point. The diagnosis is the first that gives the
rule's gradient, as far as rounding lets one tell and ten times better than the reference does. It is a likely cause, no
proof.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import permutations
from typing import Any

import jax.numpy as jnp
import numpy as np

from funcnet.check.judge import Leaf, tolerance, wide

Values = Mapping[str, np.ndarray]
SLICES, JACOBIAN = 16, 64  # the longest axis taken apart, and the largest output whose Jacobian is taken
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
class Case:
    """A wrong leaf: its gradient g, the reference r, and what there is to explain g with."""

    leaf: Leaf
    g: np.ndarray
    r: np.ndarray
    context: Context
    rounding: float

    @cached_property
    def bar(self) -> float:
        """How well, absolutely, an explanation is to do at least: ten times better; few numbers are fit more easily."""
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
        return wide(found[self.leaf.leaf])


Found = Iterator[str]


def diagnose(leaf: Leaf, got: Any, wanted: Any, context: Context) -> str:
    """The mistake that explains a leaf, in words; empty if none is known that does."""
    g, r = wide(got), wide(wanted)
    case = Case(leaf, g, r, context, max(2 * leaf.allowed, tolerance(got.dtype)))
    with np.errstate(all="ignore"):
        return next((word for pattern in _patterns(case, got.dtype) for word in pattern(case)), "")


def _patterns(case: Case, dtype: Any) -> tuple[Callable[[Case], Found], ...]:
    if case.g.shape != case.r.shape:
        return (_shapes,)
    if case.g.size == 0 or (case.leaf.within and case.leaf.allowed):  # its values are right
        return ()
    if not np.isfinite(case.g).all():
        return (lambda case: _not_finite(case, dtype),)
    own = (_multiple, _rearranged, _other_leaf, _part, _itself)
    others = (_not_linear, _other_cotangent, _weighted, _other_point, _turned, _diagonal)
    return *own, *(others if case.context.small else others[:1]), _signs, _factor, _running, _term, _mixed_up


def _shapes(case: Case) -> Found:
    g, r, same = case.g, case.r, case.same
    for axes in _subsets(g.ndim):
        if 1 in [g.shape[i] for i in axes]:
            continue
        if same(g.sum(axes), r) or same(g.sum(axes, keepdims=True), r):
            yield f"not summed over {_axes(axes)}, along which the forward pass broadcast it"
        if same(g.mean(axes), r) or same(g.mean(axes, keepdims=True), r):
            yield f"not averaged over {_axes(axes)}"
    for axes in _subsets(r.ndim):
        if same(g, r.sum(axes)) or same(g, r.sum(axes, keepdims=True)):
            yield f"summed over {_axes(axes)}, which the leaf has itself"
    if g.ndim == r.ndim <= 5:
        yield from _transposed(case)
    if g.size == r.size and same(g.ravel(), r.ravel()):
        yield "the right numbers in another shape"


def _subsets(rank: int) -> list[tuple[int, ...]]:
    """The sets of axes, the largest first."""
    sets = [tuple(i for i in range(rank) if bits >> i & 1) for bits in range(1, 2 ** min(rank, 5))]
    return sorted(sets, key=lambda axes: -len(axes))


def _axes(axes: tuple[int, ...]) -> str:
    return f"axis {axes[0]}" if len(axes) == 1 else f"axes {list(axes)}"


def _transposed(case: Case) -> Found:
    for order in list(permutations(range(case.r.ndim)))[1:]:
        if case.same(case.g, case.r.transpose(order)):
            yield "transposed" if case.r.ndim == 2 else f"its axes are permuted: {list(order)}"


def _not_finite(case: Case, dtype: Any) -> Found:
    g, r = case.g, case.r
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


def _multiple(case: Case) -> Found:
    """g = c r."""
    g, r = case.g, case.r
    if not np.any(g):
        yield "zero: no gradient arrives at this leaf"
    if not np.any(g) or not np.any(r):
        return
    if np.iscomplexobj(g) and case.same(g, np.conj(r)):
        yield "the complex conjugate of the gradient"
    c = np.sum(g * np.conj(r)) / np.sum(np.abs(r) ** 2)
    if case.same(g, np.real(c) * r) and (word := _constant(float(np.real(c)), case)):
        yield word


def _constant(c: float, case: Case) -> str:
    near = lambda a, b: abs(a - b) <= max(case.rounding, 1e-7) * abs(b)
    if near(c, -1):
        return "the sign is flipped"
    if near(c, 2):
        return "twice the gradient: counted twice, or a factor 1/2 is missing"
    if near(c, 0.5):
        return "half the gradient: one of two equal uses is not counted, or a factor 2 is missing"
    for n, where in _sizes(case.context.arrays):
        for size, by in ((n, f"{n}"), (n**0.5, f"the root of {n}")):
            if near(c * size, 1):
                return f"divided by {by}, {where}, once too often"
            if near(c, size):
                return f"a division by {by}, {where}, is missing"
    shown = f"{c:.6g}" if abs(c - 1) > 1e-3 else f"1 {'+' if c > 1 else '-'} {abs(c - 1):.3g}"
    enough = 1 if case.rounding < 1e-3 else 5  # a few half-precision numbers are proportional by chance
    return f"times {shown}: a constant factor" if case.r.size > enough else ""


def _sizes(arrays: Values) -> list[tuple[int, str]]:
    """What a mean may have been over, single axes first."""
    found = [(len(axes), array, axes, name) for name, array in arrays.items() for axes in _subsets(array.ndim)]
    found.sort(key=lambda each: each[0])
    size = lambda array, axes: int(np.prod([array.shape[i] for i in axes]))
    sizes = [(size(a, axes), f"the size of {_axes(axes)} of {name}") for _, a, axes, name in found]
    return [(n, where) for n, where in sizes if n > 2]


def _itself(case: Case) -> Found:
    """An array that the rule has, as it is."""
    for name, array in case.context.arrays.items():
        if case.same(case.g, wide(array)):
            is_dy = name in case.context.cotangents
            yield f"this is {name} itself" + (", as if the derivative were 1" if is_dy else "")


def _rearranged(case: Case) -> Found:
    """The numbers of r in other places."""
    g, r, same = case.g, case.r, case.same
    if 1 < r.ndim <= 5:
        yield from _transposed(case)
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
        if word := _permuted(case, axis):
            yield word


def _inner(a: np.ndarray, shift: int, axis: int) -> np.ndarray:
    """Without the entry that a shift would bring round from the other end."""
    return np.delete(a, 0 if shift > 0 else -1, axis)


def _shifted(r: np.ndarray, shift: int, axis: int) -> np.ndarray:
    """Shifted, zeros moved in."""
    moved = np.moveaxis(np.roll(r, shift, axis), axis, 0).copy()
    moved[0 if shift > 0 else -1] = 0
    return np.moveaxis(moved, 0, axis)


def _permuted(case: Case, axis: int) -> str:
    n = case.r.shape[axis]
    if n > 4096:
        return ""
    a, b = (np.moveaxis(v, axis, 0).reshape(n, -1) for v in (case.g, case.r))
    key = np.random.default_rng(0).standard_normal(a.shape[1])
    order = np.empty(n, int)
    order[np.argsort(np.real(a @ key), kind="stable")] = np.argsort(np.real(b @ key), kind="stable")
    if (order == np.arange(n)).all() or not case.same(a, b[order]):
        return ""
    for blocks in (blocks for blocks in range(2, 9) if n % blocks == 0 and n > blocks):
        length = n // blocks
        starts = order.reshape(blocks, length)
        if (starts == starts[:, :1] + np.arange(length)).all() and not (starts[:, 0] % length).any():
            return f"the {blocks} blocks along axis {axis} are in the order {(starts[:, 0] // length).tolist()}"
    return f"{(order != np.arange(n)).sum()} of its {n} slices along axis {axis} are in each other's places"


def _other_leaf(case: Case) -> Found:
    for name, other in case.context.references.items():
        if name == case.leaf.leaf or not np.any(other):
            continue
        for sign, word in ((1, ""), (-1, ", with the other sign")):
            if case.same(case.g, sign * wide(other)):
                yield f"this is the gradient of {name}{word}"
        if case.r.ndim == 2 and case.same(case.g, wide(other).T):
            yield f"this is the gradient of {name}, transposed"


def _part(case: Case) -> Found:
    """Right but for one element, a few slices, or where one of the two is zero."""
    g, r = case.g, case.r
    wrong = np.abs(g - r) > max(case.leaf.allowed, 1e-7) * (np.abs(r).max() or 1.0)
    if g.size < 3 or not wrong.any():
        return
    if wrong.sum() == 1:
        (index,) = np.argwhere(wrong).tolist()
        ratio = f", {np.real(g[wrong][0] / r[wrong][0]):.4g} times what it should be" if r[wrong][0] else ""
        yield f"one element alone is wrong, {index}{ratio}"
    for axis in range(g.ndim):
        places = np.unique(np.argwhere(wrong)[:, axis])
        if g.shape[axis] > 2 and len(places) <= max(1, g.shape[axis] // 8):
            how = "zero" if not np.take(g, places, axis).any() else "not what it should be"
            yield f"only index {', '.join(map(str, places))} of axis {axis} is wrong: it is {how}"
    unlike = (g == 0) != (r == 0)
    if (wrong & ~unlike).any() or not unlike.any():
        return
    lost, extra = int(((g == 0) & unlike).sum()), int(((r == 0) & unlike).sum())
    if lost and extra:
        yield f"another mask: {lost} of {g.size} elements are zero that should not be, {extra} are not that should be"
    elif lost:
        yield f"{lost} of {g.size} elements are zero that should not be: a mask, or a part that is not written"
    else:
        yield f"{extra} of {g.size} elements should be zero: a mask is missing"


def _signs(case: Case) -> Found:
    g, r = case.g, case.r
    if case.same(np.abs(g), np.abs(r)) and np.isrealobj(g):
        yield f"right but for the sign, which is flipped at {(np.sign(g) != np.sign(r)).sum()} of {g.size} elements"
    top = np.abs(g).max()
    if np.isrealobj(g) and (np.abs(g) == top).sum() > 1 and case.same(g, np.clip(r, -top, top)):
        yield f"clipped to {top:.6g}"


def _not_linear(case: Case) -> Found:
    """dy counts twice, or not at all."""
    if case.context.rule is None:
        return
    doubled = wide(case.context.rule(_each(case.context.dy, lambda v: 2 * v))[case.leaf.leaf])
    if case.same(doubled, case.g):
        yield "it does not depend on the size of the cotangent: dy is left out"
    if case.same(doubled, 4 * case.g):
        yield "it is quadratic in the cotangent: dy is multiplied in twice"


def _each(dy: Values, f: Callable[[np.ndarray], np.ndarray]) -> Values:
    return {name: f(v).astype(v.dtype) for name, v in dy.items()}


def _other_cotangent(case: Case) -> Found:
    """g is the true VJP of a part of dy, of a shifted one, or of one that has a factor too many or too few."""
    for name, v in case.context.dy.items():
        for changed, word in _cotangents(case.context.dy, name):
            if case.same(case.g, case.true(changed)):
                yield word
        for factor, c in _factors(case.context.arrays, case.context, v.shape):
            if np.iscomplexobj(c) and not np.iscomplexobj(v):
                continue
            for power, word in ((-1.0, "missing"), (1.0, "too many")):
                if case.same(case.g, case.true({**case.context.dy, name: (v * c**power).astype(v.dtype)})):
                    yield f"a factor {factor} is {word}".replace("is too", "too")


def _cotangents(dy: Values, name: str) -> Iterator[tuple[Values, str]]:
    v, alone = dy[name], _each(dy, np.zeros_like)
    if len(dy) > 1:
        yield {**dy, name: alone[name]}, f"the cotangent of the output {name} is lost"
    if len(dy) > 2:
        yield {**alone, name: v}, f"only the output {name} counts"
    for axis, n in enumerate(v.shape[:3]):
        if n < 2:
            continue
        for shift in (1, -1):
            word = f"the cotangent is shifted by {shift} along axis {axis}"
            yield {**dy, name: np.roll(v, shift, axis)}, word
            yield {**dy, name: _shifted(v, shift, axis)}, word
        yield {**dy, name: np.flip(v, axis)}, f"the cotangent is reversed along axis {axis}"
        mean = np.broadcast_to(v.mean(axis, keepdims=True), v.shape).astype(v.dtype)
        yield {**dy, name: mean}, f"the cotangent is averaged over axis {axis}"
    if v.ndim > 1 and v.shape[-1] == v.shape[-2] > 1:
        yield {**dy, name: np.swapaxes(v, -1, -2)}, "as if the cotangent were transposed: an index or axis mixed up"
    yield {**dy, name: np.abs(v)}, "the sign of the cotangent is lost"
    yield {**dy, name: np.ones_like(v)}, "the cotangent is taken for ones: dy is left out"


def _weighted(case: Case) -> Found:
    """g = sum_i m_i vjp(slice i of dy): slices that are lost, or count more than once."""
    dy, several = case.context.dy, len(case.context.dy) > 1
    none = _each(dy, np.zeros_like)
    for name, v in dy.items():
        rest = case.true({**dy, name: none[name]}).ravel() if several else 0.0
        for axis, n in enumerate(v.shape[:3]):
            if not 2 <= n <= SLICES:
                continue
            parts = np.stack([case.true({**none, name: _sliced(v, axis, i)}).ravel() for i in range(n)], 1)
            for m in (*np.eye(n), *(1 - np.eye(n)), *_solved(parts, case.g.ravel() - rest)):
                if case.same(parts @ m + rest, case.g.ravel()):
                    yield _weights(m, f"axis {axis} of the cotangent", f" of {name}" * several)


def _solved(parts: np.ndarray, g: np.ndarray) -> list[np.ndarray]:
    """The weights m for which parts @ m is g, if there are numbers enough to tell."""
    if not np.isfinite(parts).all() or len(g) < parts.shape[1] + 2:
        return []
    m, _, rank, _ = np.linalg.lstsq(parts, g, 1e-9)
    return [np.real(m)] if rank == parts.shape[1] else []


def _weights(m: np.ndarray, axis: str, of: str) -> str:
    zero, whole = np.abs(m) < 1e-4, np.abs(m - 1) < 1e-4
    listed = lambda mask: ", ".join(map(str, np.flatnonzero(mask)))
    if np.ptp(m) < 1e-4:
        return f"the cotangent{of} counts {m[0]:.4g} times"
    if (zero | whole).all() and whole.sum() == 1:
        return f"only index {listed(whole)} of {axis}{of} counts"
    if (zero | whole).all():
        return f"index {listed(zero)} of {axis}{of} is lost"
    return f"the slices along {axis}{of} have the wrong weights {', '.join(f'{v:.4g}' for v in m)} in place of 1"


def _sliced(v: np.ndarray, axis: int, index: int) -> np.ndarray:
    kept = np.zeros_like(v)
    at = (slice(None),) * axis + (index,)
    kept[at] = v[at]
    return kept


def _other_point(case: Case) -> Found:
    """g is the true VJP where an argument is transposed, negated, reversed, conjugated, or another array."""
    values = {name: case.context.arrays[name] for name in case.context.references if name in case.context.arrays}
    for name, v in values.items():
        for changed, word in _changes(name, v, case.context):
            alike = np.iscomplexobj(changed) == np.iscomplexobj(v)
            if alike and case.same(case.g, case.true(values={**values, name: changed})):
                yield f"as if {name} were {word}"
    names = list(values)
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            alike = values[a].shape == values[b].shape and np.iscomplexobj(values[a]) == np.iscomplexobj(values[b])
            if alike and case.same(case.g, case.true(values={**values, a: values[b], b: values[a]})):
                yield f"as if {a} and {b} were in each other's places"


def _changes(name: str, v: np.ndarray, context: Context) -> Iterator[tuple[np.ndarray, str]]:
    if v.ndim > 1 and v.shape[-1] == v.shape[-2] > 1:
        yield np.swapaxes(v, -1, -2), "transposed"
    if np.iscomplexobj(v):
        yield np.conj(v), "conjugated"
    yield -v, "negated"
    for axis in (axis for axis, n in enumerate(v.shape[:3]) if n > 1):
        yield np.flip(v, axis), f"reversed along axis {axis}"
    for other, a in context.arrays.items():
        if other != name and a.shape == v.shape and other not in context.cotangents:
            yield a, other


def _turned(case: Case) -> Found:
    """g is the true gradient seen in a mirror: what runs along an axis runs the other way."""
    for axis, n in enumerate(case.g.shape[:3]):
        if n > 2 and all(v.ndim > axis and v.shape[axis] == n for v in case.context.dy.values()):
            mirrored = case.true(_each(case.context.dy, lambda v, axis=axis: np.flip(v, axis)))
            if case.same(case.g, np.flip(mirrored, axis)):
                yield f"it runs along axis {axis} in the wrong direction"


def _diagonal(case: Case) -> Found:
    """g_i = dy_i dy_i/dx_i: the terms between different elements are missing."""
    dy = case.context.dy
    for name, v in dy.items():
        if v.shape != case.g.shape or not 3 <= v.size <= JACOBIAN or len(dy) > 1:
            continue
        hot = lambda i, v=v: np.eye(1, v.size, i, v.dtype).reshape(v.shape)
        diagonal = [case.true({name: hot(i)}).ravel()[i] for i in range(v.size)]
        if case.same(case.g.ravel(), np.array(diagonal) * wide(v).ravel()):
            yield f"only the diagonal of the Jacobian: what an entry does to the others of {name} is missing"


def _factor(case: Case) -> Found:
    """g = r c or g c = r for an array c that the rule has, or a factor that differs along one axis only."""
    g, r, same = case.g, case.r, case.same
    for name, c in _factors(case.context.arrays, case.context, r.shape):
        if same(g, r * c):
            yield f"a factor {name} too many"
        if np.abs(c).min() > 0 and same(g * c, r):
            yield f"a factor {name} is missing"
    ratio = np.where(np.abs(r) > 1e-9 * np.abs(r).max(), g / np.where(r == 0, 1, r), np.nan)
    for axis in range(r.ndim if r.ndim > 1 else 0):
        others = tuple(i for i in range(r.ndim) if i != axis)
        if r.shape[axis] < 2 or r.size // r.shape[axis] < 2 or np.isnan(ratio).all(others).any():
            continue
        typical = np.nanmedian(np.real(ratio), axis=others, keepdims=True)
        if same(g, r * typical):
            yield f"times a factor that differs along axis {axis} alone: a wrong or missing scale there"


def _factors(arrays: Values, context: Context, shape: Any = None) -> Iterator[tuple[str, np.ndarray]]:
    """What the arrays, and functions of them, would be as a factor."""
    for name, c in _candidates(arrays, shape):
        yield name, c
        yield f"{name}^2", c * c
        if name in context.dy:  # derivatives of exp, sigmoid, tanh, ..
            yield from ((f"1 - {name}", 1 - c), (f"1 + {name}", 1 + c), (f"1 - {name}^2", 1 - c * c))
            yield f"{name} (1 - {name})", c * (1 - c)


def _candidates(arrays: Values, shape: tuple[int, ...] | None) -> Iterator[tuple[str, np.ndarray]]:
    """Arrays, those that broadcast to a shape from the right, or from the left."""
    for name, array in arrays.items():
        c = wide(array)
        if c.size < 2 or not np.isfinite(c).all() or not np.ptp(np.abs(c)):
            continue
        if shape is None:
            yield name, c
            continue
        for view in dict.fromkeys((c.shape, (*c.shape, *(1,) * (len(shape) - c.ndim)))):
            try:
                yield name, np.broadcast_to(c.reshape(view), shape)
            except ValueError:
                continue


def _running(case: Case) -> Found:
    g, r = case.g, case.r
    for axis in (axis for axis, n in enumerate(r.shape) if n > 2):
        for at in (slice(None), slice(None, None, -1)):
            summed = lambda a, axis=axis, at=(slice(None),) * axis + (at,): np.cumsum(a[at], axis)[at]
            if case.same(summed(g), r):
                yield f"not accumulated along axis {axis}: what flows on from step to step is lost"
            if case.same(g, summed(r)):
                yield f"accumulated along axis {axis}, where every step stands for itself"


def _term(case: Case) -> Found:
    """g = r + a term that is known by its shape: constant along an axis, or like an array that the rule has."""
    e = case.g - case.r
    if e.size < 3:
        return
    for axes in [axes for axes in _subsets(e.ndim) if np.prod([e.shape[i] for i in axes]) > 1]:
        if case.same(np.broadcast_to(e.mean(axes, keepdims=True), e.shape), e):
            yield f"off by a term that is the same along {_axes(axes)}, as a mean or sum over it would be"
    for name, c in _candidates(case.context.arrays, e.shape):
        a = np.sum(e * np.conj(c)) / np.sum(np.abs(c) ** 2)
        if case.same(a * c, e):
            yield f"off by {np.real(a):.4g} times {name}: a term like it is missing, or too many"
        for axis in (axis for axis in range(e.ndim - 1, -1, -1) if e.shape[axis] > 2 and e.ndim > 1):
            for like, known in ((name, c), (f"{name} less its mean", c - c.mean(axis, keepdims=True))):
                a = np.sum(e * np.conj(known), axis, keepdims=True) / np.sum(np.abs(known) ** 2, axis, keepdims=True)
                if case.same(a * known, e):
                    yield f"off by a term like {like} along axis {axis}: a sum over it, times that, is missing"


def _mixed_up(case: Case) -> Found:
    if case.g.size > 3 and case.same(np.sort(case.g.ravel()), np.sort(case.r.ravel())):
        yield "the right numbers in other places: an order, or an index, is mixed up"
