"""What does a wrong gradient look like? The mistakes that people make leave patterns; each is tried in turn.

Every pattern is a gradient that could be made of the reference, of what the rule has to work with (arguments, outputs,
cotangent), or of the true VJP of another cotangent or at another point. The diagnosis is the first that gives the
rule's gradient, as far as rounding lets one tell and ten times better than the reference does. It is a likely cause, no
proof.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from funcnet.check.diagnosis.case import Case, Context, Found
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
from funcnet.check.judge import Leaf, tolerance, wide


def diagnose(leaf: Leaf, got: Any, wanted: Any, context: Context) -> str:
    """The mistake that explains a leaf, in words; empty if none is known that does."""
    g, r = wide(got), wide(wanted)
    case = Case(leaf, g, r, context, max(2 * leaf.allowed, tolerance(got.dtype)))
    with np.errstate(all="ignore"):
        return next((word for pattern in _patterns(case, got.dtype) for word in pattern(case)), "")


def _patterns(case: Case, dtype: Any) -> tuple[Callable[[Case], Found], ...]:
    if case.g.shape != case.r.shape:
        return (shapes,)
    if case.g.size == 0 or (case.leaf.within and case.leaf.allowed):  # its values are right
        return ()
    if not np.isfinite(case.g).all():
        return (lambda case: not_finite(case, dtype),)
    own = (multiple, rearranged, other_leaf, part, itself)
    others = (not_linear, other_cotangent, weighted, other_point, turned, diagonal)
    return *own, *(others if case.context.small else others[:1]), signs, factor, running, term, mixed_up
