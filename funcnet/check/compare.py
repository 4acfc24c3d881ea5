"""Two gradients that somebody already has, side by side."""

from dataclasses import replace
from typing import Any

import numpy as np

from funcnet._internal.expect import floating_dtype, is_floating
from funcnet.check.diagnosis.diagnose import diagnose
from funcnet.check.diagnosis.wrong_leaf import Context
from funcnet.check.judge import Leaf, blank, leaves_of, measure, mismatch, tolerance
from funcnet.check.report import Failure, Report, values_failure
from funcnet.interop.torch.tensors import as_array

Tree = Any


def compare_grads(got: Tree, wanted: Tree, *, name: str = "", dtype: Any = None) -> Report:
    """Compare two gradient pytrees leaf by leaf; the second is the reference.

    They may come from two frameworks, two versions or two devices. Every element of a leaf may be off by the tolerance
    of the leaf's dtype (`funcnet.check.judge`), relative to the leaf's largest magnitude in the reference.

    Args:
        got, wanted: pytrees of one structure, of arrays, PyTorch tensors and numbers (float64, as in NumPy). An integer
            leaf's gradient may be None or float0.
        name: put in front of every path.
        dtype: the dtype whose rounding is allowed, whatever floating dtypes the two have; by default that of each leaf,
            where two different dtypes of a leaf are a failure.
    """
    dtype = dtype and floating_dtype(dtype)
    ours, theirs = ({k: as_array(v) for k, v in leaves_of(tree, name).items()} for tree in (got, wanted))
    leaves, failures, arrays = [], [], {}
    for path in [*ours, *(path for path in theirs if path not in ours)]:
        if problem := _mismatch(ours.get(path), theirs.get(path), dtype):
            failures.append(Failure(path, "reference", "structure", problem))
            leaves.append(blank(path, ours.get(path, theirs.get(path)), {"reference": "WRONG"}))
            continue
        leaf = measure(path, ours[path], theirs[path], tolerance(dtype or ours[path].dtype))
        leaves.append(replace(leaf, verdicts={"reference": "ok" if leaf.within else "WRONG"}))
        arrays[path] = (np.asarray(ours[path]), np.asarray(theirs[path]))
        failures += [] if leaf.within else [values_failure(leaf, "reference")]
    context = Context({path: wanted for path, (_, wanted) in arrays.items()})
    for i, leaf in enumerate(leaves):
        if not leaf.ok and leaf.leaf in arrays:
            leaves[i] = replace(leaf, diagnosis=diagnose(leaf, arrays[leaf.leaf][0], arrays[leaf.leaf][1], context))
    ordered = tuple(sorted(leaves, key=Leaf.badness))
    return Report("gradients compared with the reference", ordered, tuple(failures), arrays=arrays)


def _mismatch(got: Any, wanted: Any, dtype: Any) -> str:
    """What is wrong with a gradient's kind, shape or, unless a `dtype` is given, dtype."""
    problem = mismatch(got, wanted)
    if not problem or not is_floating(got) or not is_floating(wanted) or got.shape != wanted.shape:
        return problem
    return "" if dtype else problem + "; to compare them all the same, say with the rounding of which dtype"
