"""The values that a batch may hold: finite inputs and targets that fit the loss, weights that make a mean."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from funcnet._internal import expect
from funcnet._internal.errors import InputError, at, describe
from funcnet._internal.expect import is_array, is_floating
from funcnet._internal.numerics import sum_dtype
from funcnet.train.batch import Batch, check_batch, no_shapes
from funcnet.train.objective import Objective, both
from funcnet.train.weights import check_weights, mass, may_weigh

Tree = Any


def values_check(objective: Objective, params: Tree, state: Tree) -> Callable[[Batch], bool]:
    """A function that says whether anything counts in a batch.

    It refuses a batch that holds NaN or infinity, or whose targets or weights do not fit the predictions.
    """
    both(params, state)
    own, states = expect.shapes((params["model"], state["model"]))
    predictions: dict[str, Any] = {}

    def check(batch: Batch) -> bool:
        no_shapes(batch)
        inputs, targets, weights = check_batch(batch)
        for name, part in (("inputs", inputs), ("targets", _let_through(targets))):
            with at(name):
                for path, leaf in jax.tree_util.tree_leaves_with_path(part):
                    _check_finite(path, leaf, may_forbid=name == "inputs")
        shape = describe(inputs)
        if shape not in predictions:
            predictions[shape] = jax.eval_shape(objective.model.apply, own, states, expect.shapes(inputs))
        with at(objective.loss.name):
            objective.loss.check(predictions[shape], targets)
            each = np.asarray(mass(objective.loss, targets))
        if weights is not None:
            each = each * _weights(each.shape, weights)
        return bool(np.any(each))

    return check


def _weights(shape: tuple[int, ...], given: Any) -> np.ndarray:
    """The weights of a batch; refuse those that cannot be the weights of a mean."""
    check_weights(shape, given)
    given = np.asarray(given)
    with np.errstate(over="ignore", under="ignore"):
        weights = given.astype(jnp.result_type(float))
    ratios = "only ratios of the weights matter"
    _all_fit(given, may_weigh(weights), "finite and not negative", f"give 0 to what is not to count; {ratios}")
    if given.dtype != bool:
        tiny = jnp.finfo(sum_dtype(expect.dtype(given))).tiny  # XLA takes smaller ones for 0
        _all_fit(given, (given == 0) | (weights >= tiny), f"0, or at least {tiny}", f"{ratios}: multiply them all")
    return weights


def _all_fit(weights: np.ndarray, fit: np.ndarray, wanted: str, remedy: str) -> None:
    if not fit.all():
        index = tuple(int(i) for i in np.argwhere(~fit)[0])
        raise InputError(f"weights in the batch that are {wanted}", f"{weights[index]} at index {index}", remedy)


def _let_through(targets: Any) -> Any:
    """The targets, with zeros in place of the entries that their mask excludes, which may be anything."""
    if not isinstance(targets, Mapping) or targets.keys() != {"target", "mask"}:
        return targets
    t, mask = targets["target"], targets["mask"]
    if not is_floating(t) or not is_array(mask) or mask.shape != t.shape or mask.dtype != bool:
        return targets  # the loss says what it expects
    return {**targets, "target": np.where(np.asarray(mask), np.asarray(t), np.zeros((), t.dtype))}


def _check_finite(path: tuple, leaf: Any, may_forbid: bool) -> None:
    """Refuse NaN and infinity, but allow -inf in an entry `bias`, where it forbids a key to a query."""
    if not is_floating(leaf):
        return
    values = np.asarray(leaf)
    finite = np.isfinite(values)
    if may_forbid and path and getattr(path[-1], "key", None) == "bias":
        finite |= values == -np.inf
    if not finite.all():
        index = tuple(int(i) for i in np.argwhere(~finite)[0])
        where = f" of {jax.tree_util.keystr(path)}" if path else ""
        received = f"{values[index]} at index {index}{where}; {int((~finite).sum())} such of {values.size}"
        raise InputError("finite numbers", received, "clean the data: leave these examples out or mend them")
