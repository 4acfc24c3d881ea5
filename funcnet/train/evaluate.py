"""The mean loss and metrics of a model over many batches."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
from jax import Array

from funcnet._internal import expect
from funcnet._internal.errors import InputError
from funcnet.train.batch import Batch, check_batch, nothing_counts, walkable
from funcnet.train.finite import Record
from funcnet.train.means import floats, pooled
from funcnet.train.objective import Objective, an_objective, predicted, weighted_sums
from funcnet.train.programs import compiled
from funcnet.train.values import values_check
from funcnet.train.weights import Share, share, weighed

Tree = Any


def evaluate(objective: Objective, params: Tree, state: Tree, batches: Iterable[Batch]) -> Record:
    """The mean loss and metrics over all examples of `batches`, by `apply`: nothing is dropped, no state moves.

    With weights in the batches it is one weighted mean over all of them, whatever the batches' sizes. A batch in which
    nothing counts adds nothing to it.

    Args:
        objective, params, state: as for `fn.value_and_grad`.
        batches: pairs (inputs, targets), or (inputs, targets, weights); sizes may differ, each new size compiles once.
            Their values are checked, as by `fn.fit`.

    Raises:
        InputError: for no batches, for batches in which nothing counts at all, and for what does not fit the model or
            the loss.
    """
    an_objective(objective)
    expect.not_donated((params, state))
    batches = walkable(batches, "batches")
    check, scores = values_check(objective, params, state), compiled(_scores, objective)
    scored, nothing = [], True
    for batch in batches:
        nothing = False
        if check(batch):
            scored.append(floats(jax.device_get(scores(params, state, batch))))
    if nothing:
        raise InputError("at least one batch", "none", "pass a list of (inputs, targets)")
    if not scored:
        raise nothing_counts()
    return pooled(scored)


def _scores(objective: Objective) -> Callable[[Tree, Tree, Batch], tuple[dict[str, Array], Share]]:
    """The sums of the loss's values and of the metrics, compiled; not divided yet, so that 7 of 10 is exactly 0.7."""

    def scores(params, state, batch):
        inputs, targets, weights = check_batch(batch)
        prediction, values = predicted(objective, params, state, (inputs, targets))
        counting, _, _ = weighed(objective.loss, targets, weights)
        sums = weighted_sums(objective, prediction, targets, values, counting)
        del sums["weight"]
        return sums, share(objective.loss, batch)

    return jax.jit(scores)
