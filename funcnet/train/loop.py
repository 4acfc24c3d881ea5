"""The loop around the step: batches in, metrics out, and a stop that says why when a number is no longer finite."""

import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from funcnet import expect
from funcnet.expect import InputError, at, describe, is_floating
from funcnet.progress import progress
from funcnet.train.finite import WATCHED, Record, is_finite, not_finite
from funcnet.train.objective import Batch, Objective, check_batch, mass, split, weighted_sums
from funcnet.train.run import append_metrics, start_run
from funcnet.train.step import TrainState, TrainStep, jitted, one_step, scan_steps

Tree = Any


def evaluate(objective: Objective, params: Tree, state: Tree, batches: Iterable[Batch]) -> Record:
    """The mean loss and metrics over all examples of `batches`, by `apply`: nothing is dropped, no state moves.

    Args:
        objective, params, state: as for `fn.value_and_grad`.
        batches: pairs (inputs, targets); sizes may differ, each new size compiles once. Their values are checked.

    Raises:
        InputError: for no batches, and for what does not fit the model or the loss.
    """
    sums: dict[str, float] = {}
    check = values_check(objective, params, state)
    for batch in batches:
        check(batch)
        for name, value in jax.device_get(_sums(objective, params, state, batch)).items():
            sums[name] = sums.get(name, 0.0) + float(value)
    if not sums:
        raise InputError("at least one batch", "none", "pass a list of (inputs, targets)")
    weight, divisor = sums.pop("weight"), sums.pop("mass")
    return {name: value / (divisor if name == "loss" else weight) for name, value in sums.items()}


@partial(jax.jit, static_argnums=0)
def _sums(objective: Objective, params: Tree, state: Tree, batch: Batch) -> dict[str, Array]:
    inputs, targets = batch
    own, states = split(params, state)
    prediction = objective.model.apply(own.model, states.model, inputs)
    with at(objective.loss.name):
        values = objective.loss.apply(own.loss, states.loss, (prediction, targets))
    counted = objective.loss.counted(targets).astype(values.dtype)
    divisor = jnp.sum(mass(objective.loss, targets))
    return weighted_sums(objective, prediction, targets, values, counted) | {"mass": divisor}


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
        batches: pairs (inputs, targets), at least `steps` of them; each is checked before it is used: sizes, NaN and
            infinity, labels out of range.
        steps: how many to make.
        steps_per_call: how many steps one compiled call makes; it must divide `steps` and `log_every`. Small models,
            bound by the cost of a call, run faster with 10 or 100.
        accumulate: micro-batches a step, as for `fn.train_step`.
        log_every: a record every so many steps, and one at the end. It holds the step and the means of all metrics
            since the record before, with `val_` metrics of the moment if there is validation data.
        validation: pairs (inputs, targets) for `evaluate`; a list, since it is walked again for each record.
        run_dir: a folder for config.json, environment.json and metrics.jsonl, a JSON record a line.
        config: what config.json is to hold.
        overwrite: whether an earlier run in run_dir may be overwritten.

    Raises:
        NotFiniteError: a FloatingPointError, when a loss, gradient or update is not finite. It names the step, the
            layer and the leaves; that step is not made, and records stay written.
        InputError: for a batch that does not fit, or too few of them.
        FileExistsError: if run_dir holds an earlier run and overwrite is False.

        Whatever stops training, Ctrl-C included, carries `train_state`: the state after the last step that was made.
    """
    steps_per_call, log_every = expect.count(steps_per_call, "steps_per_call"), expect.count(log_every, "log_every")
    if expect.count(steps, "steps") % steps_per_call or log_every % steps_per_call:
        received = f"steps={steps}, log_every={log_every}, steps_per_call={steps_per_call}"
        raise InputError("steps and log_every that are multiples of steps_per_call", received, "change one of them")
    check = values_check(objective, train_state.params, train_state.state)
    validation = None if validation is None else _checked(check, validation)
    call = _halting_call(objective, optimizer, accumulate, steps_per_call)
    folder = None if run_dir is None else start_run(run_dir, config, overwrite=overwrite)
    first, history, since = int(train_state.step), [], []
    try:
        with progress(first, first + steps) as report, _interrupts() as held:
            for done, stacked in _stacked(check, batches, steps, steps_per_call):
                with held():
                    train_state, metrics = call(train_state, stacked)
                rows = _rows(jax.device_get(metrics))
                for i, row in enumerate(rows):
                    if not is_finite(row):
                        batch = jax.tree.map(lambda leaf, i=i: leaf[i], stacked)
                        raise not_finite(objective, train_state, batch, first + done - steps_per_call + i + 1, row)
                since += rows
                record = None
                if done % log_every == 0 or done == steps:
                    record = {"step": first + done, **_means(since)}
                    since = []
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
    """A jitted call of `steps` training steps, which leaves the train state alone from the first non-finite one on."""
    step = one_step(objective, optimizer, accumulate, norms=True)

    def guarded(carry, batch, weights):
        train_state, alive = carry
        after, metrics = step(train_state, batch, weights)
        for name in WATCHED:
            alive &= jnp.isfinite(metrics[name])
        return (jax.tree.map(partial(_select, alive), after, train_state), alive), metrics

    def call(train_state, stacked, weights):
        (train_state, _), metrics = scan_steps(guarded, steps, (train_state, jnp.array(True)), stacked, weights)
        return train_state, metrics

    return jitted(call)


@contextmanager
def _interrupts() -> Iterator[Callable[[], AbstractContextManager]]:
    """Inside `held()` Ctrl-C waits: between the donation of a train state and the arrival of the next there is none.

    Python drops an exception that a signal raises in a finaliser or a callback of its garbage collector. Such a Ctrl-C
    is not lost either: it is raised again at the end of the next `held()`.
    """
    default = signal.getsignal(signal.SIGINT)
    if not callable(default) or threading.current_thread() is not threading.main_thread():
        yield nullcontext
        return
    unheard, waiting = [], []

    def heard(*signalled: Any) -> None:
        unheard.append(signalled)
        if not waiting:
            default(*signalled)
            unheard.clear()

    @contextmanager
    def held() -> Iterator[None]:
        waiting.append(True)
        try:
            yield
        finally:
            waiting.clear()
            if unheard:
                default(*unheard.pop())

    signal.signal(signal.SIGINT, heard)
    try:
        yield held
    finally:
        signal.signal(signal.SIGINT, default)


def _select(alive: Array, after: Array, before: Array) -> Array:
    return jnp.where(alive, after, before)


def _checked(check: Callable[[Batch], None], batches: Iterable[Batch]) -> list[Batch]:
    """Validation data, looked at before training begins."""
    batches = list(batches)
    if not batches:
        raise InputError("at least one validation batch", "none", "pass a list of (inputs, targets), or None")
    with at("validation"):
        for batch in batches:
            check(batch)
    return batches


def _validated(objective: Objective, train_state: TrainState, validation: list[Batch]) -> Record:
    values = evaluate(objective, train_state.params, train_state.state, validation)
    return {f"val_{name}": value for name, value in values.items()}


def _stacked(
    check: Callable[[Batch], None], batches: Iterable[Batch], steps: int, steps_per_call: int
) -> Iterator[tuple[int, Batch]]:
    """The checked batches, `steps_per_call` at a time along a new first axis, and how many steps will then be done."""
    source = iter(batches)
    for done in range(steps_per_call, steps + 1, steps_per_call):
        group = list(islice(source, steps_per_call))
        if len(group) < steps_per_call:
            remedy = "give an endless iterator, or ask for fewer steps"
            raise InputError(f"batches for {steps} steps", f"{done - steps_per_call + len(group)} batches", remedy)
        for batch in group:
            check(batch)
        shapes = sorted({describe(batch) for batch in group})
        if len(shapes) > 1:
            remedy = "leave the remainder of the data for the next pass, or use steps_per_call=1"
            raise InputError(f"{steps_per_call} batches of one shape for one call", " and ".join(shapes), remedy)
        yield done, jax.tree.map(_stack, *map(tuple, group))


def _stack(*leaves: Any) -> Any:
    return (jnp if isinstance(leaves[0], jax.Array) else np).stack(leaves)


def values_check(objective: Objective, params: Tree, state: Tree) -> Callable[[Batch], None]:
    """A function that refuses a batch with NaN or infinity in it, or with targets that do not fit the predictions."""
    own, states = split(*expect.shapes((params, state)))
    predictions: dict[str, Any] = {}

    def check(batch: Batch) -> None:
        inputs, targets = check_batch(batch)
        for name, part in (("inputs", inputs), ("targets", targets)):
            with at(name):
                for path, leaf in jax.tree_util.tree_leaves_with_path(part):
                    _check_finite(jax.tree_util.keystr(path), leaf)
        shape = describe(inputs)
        if shape not in predictions:
            predictions[shape] = jax.eval_shape(objective.model.apply, own.model, states.model, expect.shapes(inputs))
        with at(objective.loss.name):
            objective.loss.check(predictions[shape], targets)
            if not np.any(objective.loss.counted(targets)):
                raise InputError("at least one target that counts", "none that does", "leave such batches out")

    return check


def _check_finite(path: str, leaf: Any) -> None:
    if not is_floating(leaf):
        return
    values = np.asarray(leaf)
    finite = np.isfinite(values)
    if not finite.all():
        index = tuple(int(i) for i in np.argwhere(~finite)[0])
        received = (
            f"{values[index]} at index {index}{path and f' of {path}'}; {int((~finite).sum())} such of {values.size}"
        )
        raise InputError("finite numbers", received, "clean the data: leave these examples out or mend them")


def _rows(metrics: dict[str, Any]) -> list[Record]:
    """Metrics with an axis of steps as one record a step."""
    names = sorted(metrics, key=lambda name: (name != "loss", name))
    columns = {name: np.asarray(metrics[name], np.float64).tolist() for name in names}
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _means(rows: list[Record]) -> Record:
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}
