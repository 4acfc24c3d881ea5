"""True gradients of another cotangent, or at another point, that a rule may have returned."""

from collections.abc import Callable, Iterator

import numpy as np

from funcnet.check.diagnosis.terms import factors
from funcnet.check.diagnosis.wrong_leaf import Context, Found, Values, WrongLeaf
from funcnet.check.judge import as_float64

SLICES, JACOBIAN = 16, 64  # the longest axis taken apart, and the largest output whose Jacobian is taken


def not_linear(wrong: WrongLeaf) -> Found:
    """dy counts twice, or not at all."""
    if wrong.context.rule is None:
        return
    doubled = as_float64(wrong.context.rule(_each(wrong.context.dy, lambda v: 2 * v))[wrong.leaf.leaf])
    if wrong.same(doubled, wrong.g):
        yield "it does not depend on the size of the cotangent: dy is left out"
    if wrong.same(doubled, 4 * wrong.g):
        yield "it is quadratic in the cotangent: dy is multiplied in twice"


def _each(dy: Values, f: Callable[[np.ndarray], np.ndarray]) -> Values:
    return {name: f(v).astype(v.dtype) for name, v in dy.items()}


def other_cotangent(wrong: WrongLeaf) -> Found:
    """g is the true VJP of a part of dy, of a shifted one, or of one that has a factor too many or too few."""
    for name, v in wrong.context.dy.items():
        for changed, word in _cotangents(wrong.context.dy, name):
            if wrong.same(wrong.g, wrong.true(changed)):
                yield word
        for factor, c in factors(wrong.context.arrays, wrong.context, v.shape):
            if np.iscomplexobj(c) and not np.iscomplexobj(v):
                continue
            for power, word in ((-1.0, "missing"), (1.0, "too many")):
                if wrong.same(wrong.g, wrong.true({**wrong.context.dy, name: (v * c**power).astype(v.dtype)})):
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


def _shifted(r: np.ndarray, shift: int, axis: int) -> np.ndarray:
    """Shifted, zeros moved in."""
    moved = np.moveaxis(np.roll(r, shift, axis), axis, 0).copy()
    moved[0 if shift > 0 else -1] = 0
    return np.moveaxis(moved, 0, axis)


def weighted(wrong: WrongLeaf) -> Found:
    """g = sum_i m_i vjp(slice i of dy): slices that are lost, or count more than once."""
    dy, several = wrong.context.dy, len(wrong.context.dy) > 1
    none = _each(dy, np.zeros_like)
    for name, v in dy.items():
        rest = wrong.true({**dy, name: none[name]}).ravel() if several else 0.0
        for axis, n in enumerate(v.shape[:3]):
            if not 2 <= n <= SLICES:
                continue
            parts = np.stack([wrong.true({**none, name: _sliced(v, axis, i)}).ravel() for i in range(n)], 1)
            for m in (*np.eye(n), *(1 - np.eye(n)), *_solved(parts, wrong.g.ravel() - rest)):
                if wrong.same(parts @ m + rest, wrong.g.ravel()):
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


def other_point(wrong: WrongLeaf) -> Found:
    """g is the true VJP where an argument is transposed, negated, reversed, conjugated, or another array."""
    values = {name: wrong.context.arrays[name] for name in wrong.context.references if name in wrong.context.arrays}
    for name, v in values.items():
        for changed, word in _changes(name, v, wrong.context):
            alike = np.iscomplexobj(changed) == np.iscomplexobj(v)
            if alike and wrong.same(wrong.g, wrong.true(values={**values, name: changed})):
                yield f"as if {name} were {word}"
    names = list(values)
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            alike = values[a].shape == values[b].shape and np.iscomplexobj(values[a]) == np.iscomplexobj(values[b])
            if alike and wrong.same(wrong.g, wrong.true(values={**values, a: values[b], b: values[a]})):
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


def turned(wrong: WrongLeaf) -> Found:
    """g is the true gradient for dy mirrored along an axis, itself mirrored: what runs along it runs the other way."""
    for axis, n in enumerate(wrong.g.shape[:3]):
        if n > 2 and all(v.ndim > axis and v.shape[axis] == n for v in wrong.context.dy.values()):
            mirrored = wrong.true(_each(wrong.context.dy, lambda v, axis=axis: np.flip(v, axis)))
            if wrong.same(wrong.g, np.flip(mirrored, axis)):
                yield f"it runs along axis {axis} in the wrong direction"


def diagonal(wrong: WrongLeaf) -> Found:
    """g_i = dy_i dy_i/dx_i: the terms between different elements are missing."""
    dy = wrong.context.dy
    for name, v in dy.items():
        if v.shape != wrong.g.shape or not 3 <= v.size <= JACOBIAN or len(dy) > 1:
            continue
        hot = lambda i, v=v: np.eye(1, v.size, i, v.dtype).reshape(v.shape)
        diagonal = [wrong.true({name: hot(i)}).ravel()[i] for i in range(v.size)]
        if wrong.same(wrong.g.ravel(), np.array(diagonal) * as_float64(v).ravel()):
            yield f"only the diagonal of the Jacobian: what an entry does to the others of {name} is missing"
