"""The loop around the step: batches in, metrics out, and a stop that says why when a number is no longer finite.

A mean over batches is the mean over all of their values, as if they were one batch: with the loss L_b of batch b, which
is the mean of its values l_i with weights w_i and masses m_i (`funcnet.train.objective`),

    L = sum_b M_b L_b / sum_b M_b        M_b = sum_i w_i m_i

and likewise for metrics, with the number W_b = sum_i w_i c_i in place of the mass M_b.
"""

import signal
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from funcnet._internal import expect
from funcnet._internal.expect import InputError, at, describe, is_array, is_floating
from funcnet._internal.numerics import sum_dtype
from funcnet.train.finite import WATCHED, Record, changed, not_finite
from funcnet.train.objective import (
    Batch,
    Objective,
    Share,
    an_objective,
    both,
    check_batch,
    check_weights,
    mass,
    may_weigh,
    no_shapes,
    predicted,
    share,
    weighed,
    weighted_sums,
)
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

Tree = Any
PROGRAMS = 8  # compiled programs that are kept for an objective
NORMS = WATCHED[1:]
IN_A_ROW = 1000  # consecutive batches in which nothing counts are an error


class Told(NamedTuple):
    """What one step reports: its means, and how much they count in means over several batches."""

    means: dict[str, Any]
    share: Share


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
    batches = _walkable(batches, "batches")
    check, scores = values_check(objective, params, state), _compiled(_scores, objective)
    scored, nothing = [], True
    for batch in batches:
        nothing = False
        if check(batch):
            scored.append(_floats(jax.device_get(scores(params, state, batch))))
    if nothing:
        raise InputError("at least one batch", "none", "pass a list of (inputs, targets)")
    if not scored:
        raise _nothing_counts()
    return _pooled(scored)


def _scores(objective: Objective) -> Callable[[Tree, Tree, Batch], tuple[dict[str, Array], Share]]:
    """The sums of the loss's values and of the metrics, compiled; not divided yet, so that 7 of 10 is exactly 0.7."""

    def scores(params, state, batch):
        inputs, targets, weights = check_batch(batch)
        prediction, values = predicted(objective, params, state, (inputs, targets))
        counting, _, _ = weighed(objective.loss, targets, weights)
        sums = weighted_sums(objective, prediction, targets, values, counting)
        del sums["weight"]
        return sums, share(objective, batch)

    return jax.jit(scores)


_programs: weakref.WeakKeyDictionary[Objective, Callable] = weakref.WeakKeyDictionary()


def _compiled(make: Callable[..., Any], objective: Objective, *options: Any) -> Any:
    """`make(objective, *options)`, cached for an objective's last `PROGRAMS` such calls, and freed with the objective.

    What is cached holds the objective by a weak reference: otherwise the cache would keep it alive. For an optimizer
    that cannot be hashed the program is made anew in each call.
    """
    try:
        hash(options)
    except TypeError:
        return make(objective, *options)
    if objective not in _programs:
        own = weakref.proxy(objective)
        _programs[objective] = lru_cache(PROGRAMS)(lambda make, *options: make(own, *options))
    return _programs[objective](make, *options)


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
    batches = _walkable(batches, "batches")
    accumulate = expect.count(accumulate, "accumulate")
    steps_per_call, log_every = expect.count(steps_per_call, "steps_per_call"), expect.count(log_every, "log_every")
    if expect.count(steps, "steps") % steps_per_call or log_every % steps_per_call:
        received = f"steps={steps}, log_every={log_every}, steps_per_call={steps_per_call}"
        raise InputError("steps and log_every that are multiples of steps_per_call", received, "change one of them")
    check = values_check(objective, train_state.params, train_state.state)
    validation = None if validation is None else _checked(check, validation)
    call = _compiled(_halting_call, objective, optimizer, accumulate, steps_per_call)
    folder = None if run_dir is None else start_run(run_dir, config, overwrite=overwrite)
    first, history, since, skipped = int(train_state.step), [], [], 0
    try:
        with progress(first, first + steps) as report, _interrupts() as held:
            for done, left_out, stacked in _stacked(check, batches, steps, steps_per_call):
                with held():
                    train_state, (told, made) = call(train_state, stacked)
                told, made = jax.device_get((told, made))
                rows = [_floats(jax.tree.map(lambda leaf, i=i: leaf[i], told)) for i in range(steps_per_call)]
                if not made.all():
                    bad = int(made.argmin())
                    batch = jax.tree.map(lambda leaf, i=bad: leaf[i], stacked)
                    step = first + done - steps_per_call + bad + 1
                    raise not_finite(objective, optimizer, accumulate, train_state, batch, step, rows[bad].means)
                since += rows
                skipped += left_out
                record = None
                if done % log_every == 0 or done == steps:
                    record = {"step": first + done, **_means(since)}
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
        return (train_state, alive), (Told(metrics, share(objective, batch)), alive)

    def call(train_state, stacked, weights):
        (train_state, _), told = scan_steps(guarded, steps, (train_state, jnp.array(True)), stacked, weights)
        return train_state, told

    return jitted(call)


@contextmanager
def _interrupts() -> Iterator[Callable[[], AbstractContextManager]]:
    """Delays Ctrl-C inside `held()`: after a train state is donated there is none until the next one arrives.

    Python drops an exception that a signal handler raises in a finaliser or a callback of its garbage collector. Such a
    Ctrl-C is not lost either: it is raised again at the end of the next `held()`.
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
    return after if after is before else jnp.where(alive, after, before)  # the key stays the same, and is not consumed


def _checked(check: Callable[[Batch], bool], batches: Iterable[Batch]) -> list[Batch]:
    """The validation batches as a list, checked before training begins."""
    batches = list(_walkable(batches, "validation"))
    if not batches:
        raise InputError("at least one validation batch", "none", "pass a list of (inputs, targets), or None")
    with at("validation"):
        counting = [check(batch) for batch in batches]
        if not any(counting):
            raise _nothing_counts()
    return batches


def _walkable(batches: Any, what: str) -> Iterable[Batch]:
    if not isinstance(batches, Iterable):
        remedy = "give a list or an iterator of (inputs, targets)"
        raise InputError(f"{what} to walk through", describe(batches), remedy)
    return batches


def _nothing_counts() -> InputError:
    return InputError("at least one target that counts", "none that does", "look at the labels and weights")


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


def _floats(told: Any) -> Any:
    return jax.tree.map(float, told)


def _divisor(share: Share, name: str) -> float:
    """What the sum called `name` is divided by to give the mean of its batch."""
    return share.mass if name == "loss" else share.weight


def _pooled(scored: list[tuple[Record, Share]]) -> Record:
    """The means over several batches, the loss first, from the sums of each."""
    top = max(share.e for _, share in scored)

    def total(number):
        return sum(2.0 ** (share.e - top) * number(sums, share) for sums, share in scored)

    def mean(name):
        return total(lambda sums, share: sums[name]) / (total(lambda sums, share: _divisor(share, name)) or 1.0)

    return {name: mean(name) for name in sorted(scored[0][0], key=lambda name: (name != "loss", name))}


def _means(told: list[Told]) -> Record:
    """The means over several steps; for norms every step counts the same."""

    def summed(each):
        own = each.means.keys() - NORMS
        return {name: each.means[name] * _divisor(each.share, name) for name in own}, each.share

    norms = {name: sum(each.means[name] for each in told) / len(told) for name in NORMS}
    return _pooled([summed(each) for each in told]) | norms
