"""What does a wrong gradient look like? The mistakes that people make leave patterns; each is tried in turn.

Every pattern is a gradient that is computed from the reference, from what the rule has to work with (arguments,
outputs, cotangent), or as the true VJP for another cotangent or at another point. The diagnosis is the first pattern
that reproduces the rule's gradient to within rounding and ten times better than the reference does. It is a likely
cause, not a proof.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from funcnet.check.diagnosis.numbers import (
    itself,
    mixed_up,
    multiple,
    not_finite,
    other_leaf,
    part,
    rearranged,
    shapes,
    signs,
)
from funcnet.check.diagnosis.pullbacks import diagonal, not_linear, other_cotangent, other_point, turned, weighted
from funcnet.check.diagnosis.terms import factor, running, term
from funcnet.check.diagnosis.wrong_leaf import Context, Found, WrongLeaf
from funcnet.check.judge import Leaf, as_float64, tolerance


def diagnose(leaf: Leaf, got: Any, wanted: Any, context: Context) -> str:
    """The mistake that explains a leaf, in words; empty if no known one does."""
    g, r = as_float64(got), as_float64(wanted)
    wrong = WrongLeaf(leaf, g, r, context, max(2 * leaf.allowed, tolerance(got.dtype)))
    with np.errstate(all="ignore"):
        return next((word for pattern in _patterns(wrong, got.dtype) for word in pattern(wrong)), "")


def _patterns(wrong: WrongLeaf, dtype: Any) -> tuple[Callable[[WrongLeaf], Found], ...]:
    if wrong.g.shape != wrong.r.shape:
        return (shapes,)
    if wrong.g.size == 0 or (wrong.leaf.within and wrong.leaf.allowed):  # its values are right
        return ()
    if not np.isfinite(wrong.g).all():
        return (lambda wrong: not_finite(wrong, dtype),)
    own = (multiple, rearranged, other_leaf, part, itself)
    others = (not_linear, other_cotangent, weighted, other_point, turned, diagonal)
    return *own, *(others if wrong.context.small else others[:1]), signs, factor, running, term, mixed_up
