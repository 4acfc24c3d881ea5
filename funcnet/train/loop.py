"""The loop around the step: batches in, records out, and a stop that says why when a number is no longer finite."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from funcnet._internal import expect
from funcnet._internal.errors import InputError, at, describe
from funcnet.train.batch import Batch, nothing_counts, walkable
from funcnet.train.evaluate import evaluate
from funcnet.train.finite import WATCHED, Record, changed, not_finite
from funcnet.train.interrupts import interrupts
from funcnet.train.means import Told, floats, means
from funcnet.train.objective import Objective
from funcnet.train.programs import compiled
from funcnet.train.progress import progress
from funcnet.train.run import append_metrics, start_run
from funcnet.train.step import (
    TrainState,
    TrainStep,
    a_pair,
    a_train_state,
    its_optimizer,
    jitted,
    one_step,
    scan_steps,
)
from funcnet.train.values import values_check
from funcnet.train.weights import share

IN_A_ROW = 1000  # consecutive batches in which nothing counts are an error


def fit(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    train_state: TrainState,
    batches: Iterable[Batch],
    steps: int,
    *,
    steps_per_call: int = 1,
    accumulate: int = 1,
    log_every: int = 100,
    validation: Iterable[Batch] | None = None,
    run_dir: str | Path | None = None,
    config: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> tuple[TrainState, list[Record]]:
    """Train for `steps` steps and return the new state and the records that were logged.

    Args:
        objective, optimizer: as for `fn.train_step`.
        train_state: from `fn.init_train_state` or an earlier `fit`; donated, so it cannot be used again.
        batches: pairs (inputs, targets), or (inputs, targets, weights) as for `fn.value_and_grad`, at least `steps` of
            them. Each is checked before it is used: sizes, NaN and infinity, labels out of range, weights that are
            negative or so small that XLA takes them for 0. Entries that the mask of a target {"target", "mask"}
            excludes may be anything, and an entry named `bias` in a dict of inputs may hold -inf, which forbids a key
            to a query, as in `fn.attention`. A batch in which nothing counts, such as one with ignored labels only, is
            skipped and makes no step.
        steps: how many steps to make.
        steps_per_call: how many steps one compiled call makes; it must divide `steps` and `log_every`. Small models,
            bound by the cost of a call, run faster with 10 or 100.
        accumulate: micro-batches per step, as for `fn.train_step`.
        log_every: a record is made every so many steps, and at the end. It holds the step and the means since the
            previous record: of the loss and the metrics over all values that count in these batches, whatever the
            batches' sizes and weights; of the norms over the steps. It also holds how many batches were `skipped`, if
            any were, and the current `val_` metrics, if there is validation data.
        validation: batches for `evaluate`, listed once, since they are iterated over again for each record.
        run_dir: a folder for config.json, environment.json and metrics.jsonl, which has one JSON record per line.
        config: what config.json is to hold.
        overwrite: whether an earlier run in run_dir may be overwritten.

    A further call with the same objective, optimizer and options compiles nothing. Compiled programs are kept as long
    as their objective is, the last eight of each objective. An optimizer counts as a value: if its attributes are
    changed after a call, the change is not seen.

    Raises:
        NotFiniteError: a FloatingPointError, when a loss, a gradient, an update or a layer's new state is not finite.
            It names the step, the layer and the leaves; that step is not made, and records already written stay.
        InputError: for a batch that does not fit, too few of them, or a thousand in a row in which nothing counts, for
            a train state of another optimizer, and for a config that JSON cannot hold.
        FileExistsError: if run_dir holds an earlier run and overwrite is False.

        Every exception that stops training, that of Ctrl-C included, has the attribute `train_state`: the state after
        the last step that was made.
    """
    a_pair(objective, optimizer)
    a_train_state(train_state)
    expect.not_donated(train_state)
    its_optimizer(optimizer, train_state)
    batches = walkable(batches, "batches")
    accumulate = expect.count(accumulate, "accumulate")
    steps_per_call, log_every = expect.count(steps_per_call, "steps_per_call"), expect.count(log_every, "log_every")
    if expect.count(steps, "steps") % steps_per_call or log_every % steps_per_call:
        received = f"steps={steps}, log_every={log_every}, steps_per_call={steps_per_call}"
        raise InputError("steps and log_every that are multiples of steps_per_call", received, "change one of them")
    check = values_check(objective, train_state.params, train_state.state)
    validation = None if validation is None else _checked(check, validation)
    call = compiled(_halting_call, objective, optimizer, accumulate, steps_per_call)
    folder = None if run_dir is None else start_run(run_dir, config, overwrite=overwrite)
    first, history, since, skipped = int(train_state.step), [], [], 0
    try:
        with progress(first, first + steps) as report, interrupts() as held:
            for done, left_out, stacked in _stacked(check, batches, steps, steps_per_call):
                with held():
                    train_state, (told, made) = call(train_state, stacked)
                told, made = jax.device_get((told, made))
                rows = [floats(jax.tree.map(lambda leaf, i=i: leaf[i], told)) for i in range(steps_per_call)]
                if not made.all():
                    bad = int(made.argmin())
                    batch = jax.tree.map(lambda leaf, i=bad: leaf[i], stacked)
                    step = first + done - steps_per_call + bad + 1
                    raise not_finite(objective, optimizer, accumulate, train_state, batch, step, rows[bad].means)
                since += rows
                skipped += left_out
                record = None
                if done % log_every == 0 or done == steps:
                    record = {"step": first + done, **means(since)}
                    if skipped:
                        record["skipped"] = skipped
                    since, skipped = [], 0
                    if validation is not None:
                        record |= _validated(objective, train_state, validation)
                    history.append(record)
                    if folder is not None:
                        append_metrics(folder, record)
                report(first + done, record)
    except BaseException as stop:
        stop.train_state = train_state  # pyright: ignore[reportAttributeAccessIssue]
        raise
    return train_state, history


def _halting_call(
    objective: Objective, optimizer: optax.GradientTransformation, accumulate: int, steps: int
) -> TrainStep:
    """A jitted call of `steps` training steps, which keeps the train state unchanged from the first non-finite one on.

    It returns what each step reports, and whether the step was made.
    """
    step = one_step(objective, optimizer, accumulate, norms=True)

    def guarded(carry, batch, weights):
        train_state, alive = carry
        after, metrics = step(train_state, batch, weights)
        for number in (*(metrics[name] for name in WATCHED), *changed(train_state.state, after.state)):
            alive &= jnp.all(jnp.isfinite(number))
        train_state = jax.tree.map(partial(_select, alive), after, train_state)
        return (train_state, alive), (Told(metrics, share(objective.loss, batch)), alive)

    def call(train_state, stacked, weights):
        (train_state, _), told = scan_steps(guarded, steps, (train_state, jnp.array(True)), stacked, weights)
        return train_state, told

    return jitted(call)


def _select(alive: Array, after: Array, before: Array) -> Array:
    return after if after is before else jnp.where(alive, after, before)  # the key stays the same, and is not consumed


def _checked(check: Callable[[Batch], bool], batches: Iterable[Batch]) -> list[Batch]:
    """The validation batches as a list, checked before training begins."""
    batches = list(walkable(batches, "validation"))
    if not batches:
        raise InputError("at least one validation batch", "none", "pass a list of (inputs, targets), or None")
    with at("validation"):
        counting = [check(batch) for batch in batches]
        if not any(counting):
            raise nothing_counts()
    return batches


def _validated(objective: Objective, train_state: TrainState, validation: list[Batch]) -> Record:
    values = evaluate(objective, train_state.params, train_state.state, validation)
    return {f"val_{name}": value for name, value in values.items()}


def _stacked(
    check: Callable[[Batch], bool], batches: Iterable[Batch], steps: int, steps_per_call: int
) -> Iterator[tuple[int, int, Batch]]:
    """The checked batches, `steps_per_call` at a time along a new first axis, without those in which nothing counts.

    In front of each, how many steps will have been done with it, and how many batches were left out on the way to it.
    """
    left_out, source = 0, _counting(check, batches)
    for done in range(steps_per_call, steps + 1, steps_per_call):
        taken = list(islice(source, steps_per_call))
        before, left_out = left_out, taken[-1][0]
        group = [batch for _, batch in taken if batch is not None]
        if len(group) < steps_per_call:
            received = f"{done - steps_per_call + len(group)} batches"
            received += f" that count, and {left_out} in which nothing does" if left_out else ""
            remedy = "give an endless iterator, or ask for fewer steps"
            raise InputError(f"batches for {steps} steps, in which something counts", received, remedy)
        shapes = sorted({describe(batch) for batch in group})
        if len(shapes) > 1:
            remedy = "leave the remainder of the data for the next pass, or use steps_per_call=1"
            raise InputError(f"{steps_per_call} batches of one shape for one call", " and ".join(shapes), remedy)
        yield done, left_out - before, jax.tree.map(_stack, *map(tuple, group))


def _counting(check: Callable[[Batch], bool], batches: Iterable[Batch]) -> Iterator[tuple[int, Batch | None]]:
    """Each batch in which something counts, after the number of those left out so far; None for a batch at the end."""
    left_out = in_a_row = 0
    for batch in batches:
        if check(batch):
            in_a_row = 0
            yield left_out, batch
            continue
        left_out, in_a_row = left_out + 1, in_a_row + 1
        if in_a_row == IN_A_ROW:
            received = f"{IN_A_ROW} batches in a row in which nothing counts"
            raise InputError("batches in which something counts", received, "look at the labels and weights")
    yield left_out, None


def _stack(*leaves: Any) -> Any:
    return (jnp if isinstance(leaves[0], jax.Array) else np).stack(leaves)
