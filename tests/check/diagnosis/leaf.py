"""A leaf of a gradient, and what is said of it."""

import numpy as np

from funcnet.check.diagnosis.diagnose import diagnose
from funcnet.check.diagnosis.wrong_leaf import Context
from funcnet.check.judge import measure, tolerance

RNG = np.random.default_rng(0)
X, Y, DY = (RNG.normal(size=(4, 5)) for _ in range(3))
R = RNG.normal(size=(4, 5))
ARRAYS = {"x": X, "y": Y, "dy": DY}


def said(got, wanted=R, arrays=None, references=None, **rest):
    """The diagnosis of a leaf called g."""
    allowed = tolerance(got.dtype)
    leaf = measure("g", got, wanted, allowed) if got.shape == wanted.shape else measure("g", got, got, allowed)
    return diagnose(leaf, got, wanted, Context({"g": wanted, **(references or {})}, arrays or {}, **rest))


def spread(axis):
    """A factor that differs along an axis."""
    return np.moveaxis(np.linspace(1, 3, R.shape[axis]).reshape(-1, 1), 0, axis)
