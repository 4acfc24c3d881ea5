"""What is measured and how: that all sides of a workload agree, then their compile time, memory and step time.

Agreement is shown first in float64, where frameworks differ by rounding of about 1e-14 and a wrong formula cannot hide:
the loss, every gradient leaf, and the loss along three training steps, which covers the optimizer. Then in float32, for
the very objects that are timed: the loss, every leaf, and the loss that the timed step returns. The error of a leaf is
|a - b| / |b| in the Euclidean norm.

Repetitions are interleaved, in orders in which every side follows every other side equally often.
"""

import gc
import math
import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

PACKAGES = {"equinox", "flax", "torch"}
EXACT = 1e-9

Leaves = Mapping[str, Mapping[str, np.ndarray]]


class Side(NamedTuple):
    """One framework's training step on one workload, with parameters and optimizer state of its own.

    Attributes:
        loss_and_grads: () -> (loss, {path: {field: gradient}}) at the parameters that the side has now.
        step: makes one whole training step and returns its loss once that is computed.
        lower: () -> the step as a `jax.stages.Lowered`, ready to compile; None for a side that is not compiled.
    """

    loss_and_grads: Callable[[], tuple[float, Leaves]]
    step: Callable[[], Any]
    lower: Callable[[], jax.stages.Lowered] | None = None


@dataclass(frozen=True)
class Workload:
    """One task and how each framework does it.

    Attributes:
        title: sizes, loss, batch and dtype in one line.
        sides: name -> a function that makes the side; it may raise ModuleNotFoundError for what is not installed.
        step_target, temp_target: the ratios of step times and temporary memory, funcnet / plain, to be reached.
        exact: the largest float64 error of a leaf or loss.
        rounding: the largest float32 error of a gradient leaf that counts as rounding.
    """

    title: str
    sides: Mapping[str, Callable[[], Side]]
    step_target: float = 1.02
    temp_target: float = 1.0
    exact: float = EXACT
    rounding: float = 2e-5


class Answer(NamedTuple):
    """What one side computes: its first loss and gradients, and its losses over some training steps."""

    loss: float
    grads: Leaves
    losses: list[float]


class Compilation(NamedTuple):
    """Seconds to trace and lower, seconds that XLA took, and the program's memory in bytes by kind."""

    trace: float
    xla: float
    memory: dict[str, int]


class Measurement(NamedTuple):
    """The outcome of a workload; the mappings have the sides that ran as their keys.

    Attributes:
        workload: the float32 workload.
        errors: dtype -> what `disagreements` allowed and found.
        compilations: repetitions, in order; none for a side that is not compiled.
        calls: how many steps a sample has.
        seconds: for each round, seconds a step.
        missing: sides that are not installed.
        others: how many cores everything else on the machine used during the timing; None where that cannot be read.
    """

    workload: Workload
    errors: dict[str, dict[str, Any]]
    compilations: dict[str, list[Compilation]]
    calls: dict[str, int]
    seconds: dict[str, list[float]]
    missing: list[str]
    others: float | None


class Disagreement(AssertionError):
    """Sides of a workload that do not compute the same thing."""


def measure(
    make: Callable[[str], Workload],
    rounds: int,
    compiles: int,
    only: Collection[str] = (),
    progress: Callable[[str], None] = lambda message: None,
) -> Measurement:
    """Check one workload, then compile it `compiles` times and time it in `rounds` rounds.

    Args:
        make: dtype -> Workload.
        rounds, compiles: how many repetitions of each side.
        only: the sides to run; all of them if empty.
        progress: is told what happens now.

    Raises:
        Disagreement: naming side, leaf and error, if two sides do not compute the same.
    """
    progress("checking in float64")
    with jax.enable_x64(True):
        workload = make("float64")
        exact = {name: answer(side, steps=3) for name, side in _installed(workload, only)}
    errors = {"float64": compare(exact, workload.exact, workload.exact)}
    del exact
    jax.clear_caches()

    progress("checking in float32")
    workload = make("float32")
    sides = dict(_installed(workload, only))
    rounded = {name: answer(side, steps=1) for name, side in sides.items()}
    errors["float32"] = compare(rounded, workload.rounding, Workload.rounding)
    del rounded

    progress(f"compiling, {compiles} times each")
    compilations = compile_interleaved(sides, compiles)
    progress(f"timing, {rounds} rounds")
    with _OtherLoad() as others:
        calls, seconds = time_interleaved(sides, rounds)
    missing = [name for name in workload.sides if name not in sides and (name in only or not only)]
    return Measurement(workload, errors, compilations, calls, seconds, missing, others.cores)


def _installed(workload: Workload, only: Collection[str]) -> Iterator[tuple[str, Side]]:
    for name, make in workload.sides.items():
        if only and name not in only:
            continue
        try:
            side = make()
        except ModuleNotFoundError as error:
            if error.name not in PACKAGES:
                raise
            continue
        yield name, side


def answer(side: Side, steps: int) -> Answer:
    loss, grads = side.loss_and_grads()
    return Answer(loss, grads, [float(side.step()) for _ in range(steps)])


def compare(answers: Mapping[str, Answer], tolerance: float, loss_tolerance: float) -> dict[str, Any]:
    """Compare all sides with plain JAX, or with the first one where that did not run.

    Returns:
        The tolerances, and for each side the relative error of its losses and the worst leaf with its error.

    Raises:
        Disagreement: with a line for every loss or leaf that is too far off.
    """
    reference = "plain" if "plain" in answers else next(iter(answers))
    wanted = answers[reference]
    found, complaints = {}, []
    for name, given in answers.items():
        leaves = _errors(given.grads, wanted.grads)
        pairs = zip([given.loss, *given.losses], [wanted.loss, *wanted.losses], strict=True)
        losses = [_error(np.asarray(a), np.asarray(b)) for a, b in pairs]
        worst = max(leaves, key=lambda leaf: math.inf if math.isnan(leaves[leaf]) else leaves[leaf])
        found[name] = {"loss": max(losses), "leaf": worst, "leaf_error": leaves[worst]}
        too_far = {f"gradient of {leaf}": (error, tolerance) for leaf, error in leaves.items()}
        too_far |= {f"loss of step {i}" if i else "loss": (error, loss_tolerance) for i, error in enumerate(losses)}
        complaints += [
            f"{name}: {what} differs from {reference}'s by {error:.1e} of its size, more than {limit:.0e}"
            for what, (error, limit) in too_far.items()
            if not error <= limit  # NaN is too far as well
        ]
    if complaints:
        raise Disagreement("the sides do not compute the same\n" + "\n".join(complaints))
    return {"leaf_tolerance": tolerance, "loss_tolerance": loss_tolerance, "against": reference, "sides": found}


def _errors(given: Leaves, wanted: Leaves) -> dict[str, float]:
    """The error of every leaf of either side; infinite where one of them lacks it."""
    a, b = _flat(given), _flat(wanted)
    return {leaf: _error(a[leaf], b[leaf]) if leaf in a and leaf in b else math.inf for leaf in sorted({*a, *b})}


def _flat(leaves: Leaves) -> dict[str, np.ndarray]:
    return {f"{path}/{field}": leaf for path, fields in leaves.items() for field, leaf in fields.items()}


def _error(given: np.ndarray, wanted: np.ndarray) -> float:
    """|given - wanted| / |wanted|; infinite for different shapes, and for zeros, which compare nothing."""
    if given.shape != wanted.shape or not np.any(wanted):
        return math.inf
    given, wanted = given.astype(np.float64), wanted.astype(np.float64)
    return float(np.linalg.norm(given - wanted) / np.linalg.norm(wanted))


def compile_interleaved(sides: Mapping[str, Side], repetitions: int) -> dict[str, list[Compilation]]:
    """Trace and compile each side's step `repetitions` times from empty caches, after one time that does not count."""
    lowers = {name: side.lower for name, side in sides.items() if side.lower is not None}
    found: dict[str, list[Compilation]] = {name: [] for name in sides}
    for order in orders(list(lowers), repetitions + 1):
        for name in order:
            jax.clear_caches()
            gc.collect()
            found[name].append(_compile(lowers[name]))
    return {name: each[1:] for name, each in found.items()}


def _compile(lower: Callable[[], jax.stages.Lowered]) -> Compilation:
    start = time.perf_counter()
    lowered = lower()
    traced = time.perf_counter()
    compiled = lowered.compile()
    done = time.perf_counter()
    memory = compiled.memory_analysis()
    size = {kind: getattr(memory, f"{kind}_size_in_bytes") for kind in ("temp", "argument", "output", "alias")}
    return Compilation(traced - start, done - traced, size)


def time_interleaved(
    sides: Mapping[str, Side], rounds: int, least: float = 0.02, warm: float = 0.005
) -> tuple[dict[str, int], dict[str, list[float]]]:
    """One sample of each side in each round: as many steps as fill `least` seconds, their mean.

    Each sample is preceded by uncounted steps that fill `warm` seconds, so that a side does not pay for its neighbour's
    caches and for threads that still spin. Garbage collection stays on, as in training, but skips what exists already.

    Returns:
        The number of steps in a sample, and the samples in seconds a step, both by side.
    """
    once = {name: min(_time(side.step, 1) for _ in range(4)) for name, side in sides.items()}
    calls = {name: math.ceil(least / seconds) for name, seconds in once.items()}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    gc.collect()
    gc.freeze()
    try:
        for order in orders(list(sides), rounds):
            for name in order:
                _time(sides[name].step, math.ceil(warm / once[name]))
                seconds[name].append(_time(sides[name].step, calls[name]))
    finally:
        gc.unfreeze()
    return calls, seconds


def _time(step: Callable[[], Any], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        step()
    return (time.perf_counter() - start) / calls


class _OtherLoad:
    """How many cores were busy with something else than this process, on average, while the context was open."""

    def __enter__(self):
        self.cores, self._start = None, self._now()
        return self

    def __exit__(self, *exception):
        start, end = self._start, self._now()
        if start and end and end[0] > start[0]:
            self.cores = max(0.0, (end[1] - start[1]) / (end[0] - start[0]))

    @staticmethod
    def _now():
        """(seconds of the clock, seconds that cores gave to others so far), or None without Linux's /proc/stat."""
        try:
            user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
        except OSError:
            return None
        busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
        return time.perf_counter(), busy - time.process_time()


def orders(names: list[str], rounds: int) -> Iterator[list[str]]:
    """`rounds` orders of `names`, each following each other one equally often within them (a Williams design).

    Rotations of 0, 1, n-1, 2, n-2, .. have every neighbour once for even n; with their reverses, twice for any n.
    """
    n = len(names)
    zigzag = [(i + 1) // 2 if i % 2 else -(i // 2) for i in range(n)]
    rotations = [[names[(i + r) % n] for i in zigzag] for r in range(n)]
    both = [order for rotation in rotations for order in (rotation, rotation[::-1])]
    return islice(cycle(both), rounds)
