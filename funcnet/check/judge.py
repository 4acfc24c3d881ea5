"""How far a gradient may be from its reference: the one place that says so.

A leaf g is compared with its reference r, in float64, element by element and relative to the leaf's own scale, max |r|
(1 where r is zero everywhere):

    |g_i - r_i|  <=  (A eps + B eps_acc sqrt(n)) max |r|  +  C baseline_error

- eps is the unit of rounding of the leaf's dtype and A = 4 in half precision, 64 in float32, 1024 in float64, where no
  real mistake is that small.
- n is the length of the longest sum in the program, eps_acc the unit of rounding of the dtype that sums run in (float32
  for half precision), B = 16: rounding errors of a sum grow like the square root of its length.
- baseline_error is the error of the plain program itself: of its automatic derivative in the program's own dtypes, at
  several points that are a unit of rounding apart, and the change of the reference between them; the largest in the
  leaf. C = 4.
  There dy is multiplied by a number between 1/2 and 1, and the error divided by it: a gradient is linear in dy, but its
  rounding errors are not, and for one dy all of them may happen to be small.
  So a rule need not be better than autodiff in its dtype, and where a gradient is a small difference of large terms no
  rule can be. An element that such a step takes across a kink, and changes by far more than the others, counts for
  itself alone. All of this takes many runs of the program, and is computed only where an error exceeds the other terms.

Outputs, which a rule and `apply` give again, are compared in the same way with 4 times the first two terms and, where
that is not enough, the error of the plain program's own outputs.

There is never one tolerance for a whole tree, and no tolerance grows with an array's size but by the sums that its
entries are made of.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from funcnet._internal.errors import describe
from funcnet._internal.expect import is_array

Tree = Any
ROUNDING = {16: 4, 32: 64, 64: 1024}  # A, by the bits of the dtype
SUMS, BASELINE = 16, 4  # B, C


def tolerance(dtype: Any, terms: int = 1) -> float:
    """A eps + B eps_acc sqrt(n), the error allowed to a leaf of this dtype relative to its scale; n is `terms`."""
    info = jnp.finfo(dtype)
    half = info.bits < 32
    sums = float(jnp.finfo(jnp.float32 if half else dtype).eps) * SUMS * terms**0.5
    return float(info.eps) * ROUNDING.get(info.bits, 4) + sums


@dataclass(frozen=True)
class Leaf:
    """One leaf of a gradient beside its reference, at its worst element.

    Attributes:
        leaf: path, as `jax.tree_util.keystr` writes it.
        shape, dtype: of the gradient under test.
        scale: the largest magnitude in the reference.
        error: the largest absolute error.
        relative: that, divided by the scale (by 1 where the scale is 0).
        allowed: what `relative` may be; without `baseline_error` where the error is within the rest already.
        ulps: the error in units in the last place of the reference value there, in the gradient's dtype.
        index: where that is; `got` and `wanted` are the two values there.
        verdicts: what each oracle said of the leaf: "ok", "WRONG", "kink", or "-" where it could not tell.
        diagnosis: what the error looks like, or empty.
    """

    leaf: str
    shape: tuple[int, ...] = ()
    dtype: str = ""
    scale: float = 0.0
    error: float = 0.0
    relative: float = 0.0
    allowed: float = 0.0
    ulps: float = 0.0
    index: tuple[int, ...] = ()
    got: complex = 0.0
    wanted: complex = 0.0
    verdicts: Mapping[str, str] = field(default_factory=dict)
    diagnosis: str = ""

    @property
    def ok(self) -> bool:
        """Whether no oracle finds it wrong."""
        return "WRONG" not in self.verdicts.values()

    @property
    def within(self) -> bool:
        """Whether its error is allowed."""
        return self.relative <= self.allowed

    def badness(self) -> tuple[bool, float, str]:
        """Sorts the worst leaf first: wrong before right, then by error over what is allowed."""
        return self.ok, -self.relative / (self.allowed or 1.0), self.leaf


def measure(path: str, got: Any, wanted: Any, allowed: float, baseline_error: Any = 0.0, skip: Any = None) -> Leaf:
    """`got` against `wanted`, arrays of one shape; elements in the mask `skip` are left out.

    Args:
        path: the leaf's.
        got, wanted: the gradient, and its reference in float64 or the like.
        skip: a mask of elements that are left out.
        allowed: relative to the leaf's scale.
        baseline_error: absolute, one number or one per element, added to that.
    """
    a, b = as_float64(got), as_float64(wanted)
    shape, dtype = tuple(np.shape(got)), str(got.dtype)
    if a.size == 0:
        return Leaf(path, shape, dtype, allowed=allowed)
    with np.errstate(all="ignore"):
        rounded = as_float64(b.astype(got.dtype))  # the reference itself may be beyond the dtype's range
        same = (a == b) | (a == rounded) | (np.isnan(a) & np.isnan(b))
        error = np.where(same, 0.0, np.abs(a - b))
    error = np.where(np.isnan(error), np.inf, error)
    finite = np.abs(b[np.isfinite(b)])
    scale = float(finite.max()) if finite.size else 0.0
    unit = scale or 1.0
    room = np.broadcast_to(allowed + np.asarray(baseline_error) / unit, error.shape)
    counted = error / room if skip is None else np.where(skip, -1.0, error / room)
    worst = tuple(int(i) for i in np.unravel_index(np.argmax(counted), error.shape))
    ulp = spacing(abs(b[worst]), got.dtype)
    value = complex if np.iscomplexobj(a) or np.iscomplexobj(b) else float
    return Leaf(
        path,
        shape,
        dtype,
        scale,
        float(error[worst]),
        float(error[worst]) / unit,
        float(room[worst]),
        float(error[worst]) / ulp,
        worst,
        value(a[worst]),
        value(b[worst]),
    )


def as_float64(array: Any) -> np.ndarray:
    """The array in float64 or complex128, as a NumPy array."""
    array = np.asarray(array)
    return array.astype(np.complex128 if np.iscomplexobj(array) else np.float64)


def spacing(value: float, dtype: Any) -> float:
    """The unit in the last place of `value` in `dtype`."""
    info = jnp.finfo(dtype)
    if not np.isfinite(value) or value < float(info.tiny):
        value = float(info.tiny)
    return float(2.0 ** (np.frexp(value)[1] - 1) * float(info.eps))


def leaves_of(tree: Tree, name: str = "") -> dict[str, Any]:
    """Leaves by path; those without a gradient (None, float0) left out."""
    with_path = jax.tree_util.tree_leaves_with_path(tree)
    return {
        name + jax.tree_util.keystr(path): leaf
        for path, leaf in with_path
        if getattr(leaf, "dtype", None) != jax.dtypes.float0
    }


def mismatch(got: Any, wanted: Any) -> str:
    """What is wrong with a gradient's kind, shape or dtype, "" if nothing; got or wanted is None if there is none."""
    if got is None:
        return f"no gradient for {describe(wanted)}"
    if wanted is None:
        return f"the gradient {describe(got)} for a leaf that has none"
    if is_array(got) and not jnp.issubdtype(got.dtype, jnp.inexact):
        return f"the gradient {describe(got)}; a gradient is floating, or None"
    if not is_array(got) or tuple(got.shape) != tuple(wanted.shape) or got.dtype != wanted.dtype:
        return f"the gradient {describe(got)} for {describe(wanted)}"
    return ""


def blank(path: str, given: Any, verdicts: Mapping[str, str]) -> Leaf:
    """A leaf of which no values were compared."""
    shape, dtype = (tuple(given.shape), str(given.dtype)) if is_array(given) else ((), "")
    return Leaf(path, shape, dtype, verdicts=verdicts)
