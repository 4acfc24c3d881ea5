"""The table of cases, checked by several processes, and what came of it."""

import gc
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import jax

from funcnet._internal.errors import InputError
from funcnet._internal.tables import aligned
from funcnet.check.cases import CASES, Case
from funcnet.check.judge import Leaf
from funcnet.check.named import again, nearest
from funcnet.check.report import Failure, Report
from funcnet.check.subject import fast
from funcnet.train.progress import progress

MOST_JOBS = 8  # by default, since each process has its own JAX in memory
WORST = 5  # leaves listed
CLEARED = 60  # checks after which JAX's caches are cleared
RARELY = 100_000, 50, 1000  # thresholds of Python's garbage collector
_DONE = count(1)  # checks of this process


@dataclass(frozen=True)
class Check:
    """One case in one dtype: its place in the table, its report, and how long it took."""

    case: int
    dtype: str
    report: Report
    seconds: float

    @property
    def name(self) -> str:
        return CASES[self.case].name


@dataclass(frozen=True)
class Outcome:
    """The checks, in the table's order, and how long all of them took."""

    checks: tuple[Check, ...]
    seconds: float

    @property
    def wrong(self) -> list[Check]:
        return [check for check in self.checks if not check.report.ok]

    @property
    def ok(self) -> bool:
        return not self.wrong

    @property
    def summary(self) -> str:
        """One line: how much was checked, and what does not hold."""
        rules = len({CASES[check.case].constructor for check in self.checks})
        cases = len({check.case for check in self.checks})
        leaves = [leaf for check in self.checks for leaf in check.report.leaves]
        held = sum(leaf.ok for leaf in leaves)
        many = {"rule": rules, "case": cases, "check": len(self.checks)}
        counted = ", ".join(f"{n} {what}{'s' * (n != 1)}" for what, n in many.items()) + f" in {self.seconds:.0f} s: "
        if self.ok:
            return counted + f"all {held} leaves hold"
        wrong = ", ".join(f"{check.name} ({check.dtype})" for check in self.wrong)
        return counted + f"{held} of {len(leaves)} leaves hold; wrong: {wrong}"

    def worst(self) -> list[tuple[Check, Leaf]]:
        """The leaves nearest to what they are allowed, or beyond it."""
        leaves = [(check, leaf) for check in self.checks for leaf in check.report.leaves if leaf.allowed]
        return sorted(leaves, key=lambda pair: pair[1].badness())[:WORST]

    def __str__(self) -> str:
        table = [f"  {line}" for line in aligned([_row(*pair) for pair in self.worst()])]
        reports = [f"{check.report}\n" for check in self.wrong]
        return "\n".join([*reports, "nearest to what is allowed:", *table, self.summary])

    def to_markdown(self) -> str:
        """The failures, the leaves nearest to what they are allowed, and the summary."""
        head = ["| case | dtype | leaf | error/scale | allowed |", "| --- | --- | --- | --- | --- |"]
        rows = ["| " + " | ".join(_cells(*pair)) + " |" for pair in self.worst()]
        reports = [check.report.to_markdown() for check in self.wrong]
        return "\n".join([*reports, *head, *rows, "", self.summary])

    def to_json(self) -> str:
        """Every report, with its case, dtype and seconds."""
        checks = [
            {"case": check.name, "dtype": check.dtype, "seconds": round(check.seconds, 3)}
            | json.loads(check.report.to_json())
            for check in self.checks
        ]
        whole = {"ok": self.ok, "summary": self.summary, "seconds": round(self.seconds, 3), "checks": checks}
        return json.dumps(whole, indent=2)


def _cells(check: Check, leaf: Leaf) -> list[str]:
    return [check.name, check.dtype, leaf.leaf, f"{leaf.relative:.1e}", f"{leaf.allowed:.1e}"]


def _row(check: Check, leaf: Leaf) -> list[str]:
    name, dtype, path, error, allowed = _cells(check, leaf)
    return [f"{name} ({dtype})", path, f"{error} of {allowed}"]


def selected(prefixes: Sequence[str]) -> list[int]:
    """The places of the cases whose names begin with one of the prefixes; all of them without any.

    Raises:
        InputError: if no name begins with one of them.
    """
    for prefix in prefixes:
        if not any(case.name.startswith(prefix) for case in CASES):
            remedy = nearest(prefix, [name for case in CASES for name in (case.constructor, case.name)])
            raise InputError("a case of the table (--list shows them)", repr(prefix), remedy)
    return [i for i, case in enumerate(CASES) if not prefixes or case.name.startswith(tuple(prefixes))]


def run(cases: Sequence[int], dtype: str, jobs: int | None, options: Mapping[str, Any]) -> Outcome:
    """Check the cases in all of their dtypes, or in the one given, with a line or a bar of progress on standard error.

    Args:
        cases: their places in the table.
        dtype: the one to check them in, or "" for each that a case has.
        jobs: how many processes; by default as many as cores, at most 8, and one where JAX has an accelerator.
        options: for `check_layer`.
    """
    tasks = {i: asked for i in cases if (asked := [each for each in CASES[i].dtypes if dtype in ("", each)])}
    order = [(i, each) for i, asked in tasks.items() for each in asked]
    if not tasks:
        raise InputError(f"cases that are checked in {dtype}", "none of those named", "leave --dtype out")
    jobs, start = min(jobs or _cores(), len(tasks)), time.perf_counter()
    checks, wrong, lines = [], 0, max(len(order) // 10, 1)
    with _started(tasks, jobs, options) as coming, progress(0, len(order), "check", sys.stderr) as report:
        for check in coming:
            checks.append(check)
            wrong += not check.report.ok
            due = len(checks) % lines == 0 or not check.report.ok
            report(len(checks), {"wrong": wrong} if due else None)
    checks.sort(key=lambda check: order.index((check.case, check.dtype)))
    return Outcome(tuple(checks), time.perf_counter() - start)


def _cores() -> int:
    return min(os.cpu_count() or 1, MOST_JOBS) if jax.default_backend() == "cpu" else 1


@contextmanager
def _started(tasks: Mapping[int, Sequence[str]], jobs: int, options: Mapping[str, Any]) -> Iterator[Iterator[Check]]:
    """The checks as they finish: in this process for one job, else in others, which end with the context in any case.

    A case is checked in all of its dtypes by one process: they share the program of its `init`.
    """
    if jobs == 1:
        yield (_check(i, dtype, options) for i, dtypes in tasks.items() for dtype in dtypes)
        return
    pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), _hurry, (fast(),))
    before = set(multiprocessing.active_children())
    try:
        with _deaf():
            futures = [pool.submit(_checks, i, dtypes, options) for i, dtypes in tasks.items()]
        yield _results(futures)
    except BaseException:
        for process in set(multiprocessing.active_children()) - before:
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _hurry(options: Mapping[str, Any]) -> None:
    """Compile everything in this process with these options, also what runs eagerly; XLA has not started yet.

    Programs are large and seldom garbage: collecting it as often as Python does by default takes a tenth of the time.
    """
    gc.set_threshold(*RARELY)
    flags = [f"--{name}={str(value).lower()}" for name, value in options.items()]
    os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *flags])


@contextmanager
def _deaf() -> Iterator[None]:
    """Processes started inside ignore Ctrl-C: their parent ends them, and they print nothing about it."""
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


def _results(futures: Sequence[Future]) -> Iterator[Check]:
    try:
        for future in as_completed(futures):
            yield from future.result()
    except BrokenProcessPool as error:
        received = "one was ended from outside, perhaps for want of memory"
        raise InputError("processes that live until they are done", received, "use --jobs 1") from error


def _checks(i: int, dtypes: Sequence[str], options: Mapping[str, Any]) -> list[Check]:
    return [_check(i, dtype, options) for dtype in dtypes]


def _check(i: int, dtype: str, options: Mapping[str, Any]) -> Check:
    """One check; an error that the layer or the checker raises counts as a failure."""
    case, start = CASES[i], time.perf_counter()
    try:
        report = case.check(dtype, **options)
    except Exception as error:
        failure = Failure("", "checker", "error", f"the check itself raises {type(error).__name__}: {error}")
        report = Report("", failures=(failure,))
    if next(_DONE) % CLEARED == 0:
        jax.clear_caches()  # programs are hardly ever used again, and hundreds of them take gigabytes
    title = f"{case.name}, {dtype}, seed {options.get('seed', 0)}"
    repeat = "" if report.ok else _again(case, dtype, report, options)
    return Check(i, dtype, replace(report, title=title, repeat=repeat, arrays={}), time.perf_counter() - start)


def _again(case: Case, dtype: str, report: Report, options: Mapping[str, Any]) -> str:
    """The command line that shows a failure, on the smallest shape."""
    x = case.x if report.smallest is None else report.smallest["x"]
    flags = {name: options.get(name) for name in ("seed", "directions")}
    return again(case.name, arg=jax.tree.leaves(x), dtype=dtype, oracle=options.get("oracles"), **flags)
