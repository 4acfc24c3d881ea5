"""Factors and terms that a gradient has too many or too few."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from funcnet.check.diagnosis.wrong_leaf import Context, Found, Values, WrongLeaf, axes_named, subsets
from funcnet.check.judge import as_float64


def factor(wrong: WrongLeaf) -> Found:
    """g = r c or g c = r for an array c that the rule has, or a factor that differs along one axis only."""
    g, r, same = wrong.g, wrong.r, wrong.same
    for name, c in factors(wrong.context.arrays, wrong.context, r.shape):
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


def term(wrong: WrongLeaf) -> Found:
    """g = r + a term that is known by its shape: constant along an axis, or like an array that the rule has."""
    e = wrong.g - wrong.r
    if e.size < 3:
        return
    for axes in [axes for axes in subsets(e.ndim) if np.prod([e.shape[i] for i in axes]) > 1]:
        if wrong.same(np.broadcast_to(e.mean(axes, keepdims=True), e.shape), e):
            yield f"off by a term that is the same along {axes_named(axes)}, as a mean or sum over it would be"
    for name, c in candidates(wrong.context.arrays, e.shape):
        a = np.sum(e * np.conj(c)) / np.sum(np.abs(c) ** 2)
        if wrong.same(a * c, e):
            yield f"off by {np.real(a):.4g} times {name}: a term like it is missing, or too many"
        for axis in (axis for axis in range(e.ndim - 1, -1, -1) if e.shape[axis] > 2 and e.ndim > 1):
            for like, known in ((name, c), (f"{name} less its mean", c - c.mean(axis, keepdims=True))):
                a = np.sum(e * np.conj(known), axis, keepdims=True) / np.sum(np.abs(known) ** 2, axis, keepdims=True)
                if wrong.same(a * known, e):
                    yield f"off by a term like {like} along axis {axis}: a sum over it, times that, is missing"


def running(wrong: WrongLeaf) -> Found:
    """g is r before its cumulative sum along an axis, or with one cumulative sum more."""
    g, r = wrong.g, wrong.r
    for axis in (axis for axis, n in enumerate(r.shape) if n > 2):
        for at in (slice(None), slice(None, None, -1)):
            summed = lambda a, axis=axis, at=(slice(None),) * axis + (at,): np.cumsum(a[at], axis)[at]
            if wrong.same(summed(g), r):
                yield f"not accumulated along axis {axis}: what flows on from step to step is lost"
            if wrong.same(g, summed(r)):
                yield f"accumulated along axis {axis}, where every step stands for itself"


def factors(arrays: Values, context: Context, shape: Any = None) -> Iterator[tuple[str, np.ndarray]]:
    """The arrays, and functions of them, that may be a factor, each after its name."""
    for name, c in candidates(arrays, shape):
        yield name, c
        yield f"{name}^2", c * c
        if name in context.dy:  # derivatives of exp, sigmoid, tanh, ..
            yield from ((f"1 - {name}", 1 - c), (f"1 + {name}", 1 + c), (f"1 - {name}^2", 1 - c * c))
            yield f"{name} (1 - {name})", c * (1 - c)


def candidates(arrays: Values, shape: tuple[int, ...] | None) -> Iterator[tuple[str, np.ndarray]]:
    """The arrays; if a shape is given, those that broadcast to it with axes aligned on the right, or on the left."""
    for name, array in arrays.items():
        c = as_float64(array)
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
