"""Every mistake that a machine can make in funcnet's own backward code, and whether the checker refuses it.

    python -m tests.check.mutations [--files norm losses] [--sample 100] [--seed 0] [--processes 2]

One mutant at a time (`tests.check.mutate`) stands in its file's place while funcnet is imported anew, and is checked on
the cases (`funcnet.check.cases`) that run its line: by autodiff in float64 and bfloat16, then by the other oracles. It
is refused if the report is not ok, or if it raises an error. What survives is to be in `tests.check.equivalent`, with a
reason. The forward pass has no mutants, so that what autodiff says of it is computed once for all of them.
"""

import argparse
import copy
import importlib
import random
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import local
from types import CodeType, ModuleType
from typing import Any

import jax
import jax.numpy as jnp

import funcnet as fn
from funcnet._internal.casting import cast
from funcnet.check.algebra import structure
from funcnet.check.autodiff import autodiff
from funcnet.check.cases import Case
from funcnet.check.laws import fisher_diagonal
from funcnet.check.layer import pulling
from funcnet.check.slopes import Numerical
from funcnet.check.spec import drawn, settled, specs
from funcnet.check.subject import Point, quickly
from tests.check.equivalent import CHOICES, EQUIVALENT
from tests.check.mutate import Mutant, mutants

PACKAGE = Path(fn.__file__).parent
FILES = [
    "layer.py",
    *(
        f"{family}/{path.name}"
        for family in ("_internal", "gradients", "combinators", "layers", "losses")
        for path in sorted((PACKAGE / family).glob("[a-z]*.py"))
    ),
    "interop/jax.py",
]
MANY, FEW, ALL = 12, 3, 60  # cases that are asked about a mutant: by autodiff, by other oracles, at last by autodiff
AUTODIFF = ("autodiff",)
LONGEST = 120  # seconds for one mutant
REFUSED, RAISED, SURVIVED = "refused by a report", "refused by an error", "survived"  # never to end counts as an error


class _Loader(SourceFileLoader):
    """Loads a file, once compiled, or a mutant of it."""

    def __init__(self, name: str, path: str, mutant: Mutant):
        super().__init__(name, path)
        self.mutant = mutant

    def get_code(self, fullname: str) -> CodeType:
        mutated = Path(self.path) == PACKAGE / self.mutant.file
        return compile(self.mutant.source, self.path, "exec") if mutated else _code(self.path)


@cache
def _code(path: str) -> CodeType:
    return compile(Path(path).read_text(), path, "exec")


class _Finder:
    """Finds funcnet with a mutant in it."""

    def __init__(self, mutant: Mutant):
        self.mutant = mutant

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path) if _ours(name) else None
        if spec is not None:
            spec.loader = _Loader(name, spec.origin, self.mutant)
        return spec


def _ours(name: str) -> bool:
    return name.split(".")[0] == "funcnet"


@dataclass(frozen=True)
class Library:
    """A funcnet: its checker and its cases by name."""

    checker: ModuleType
    cases: dict[str, Case]


def library() -> Library:
    """The funcnet that is imported now."""
    cases = importlib.import_module("funcnet.check.cases").CASES
    return Library(importlib.import_module("funcnet.check.checker"), {case.name: case for case in cases})


@contextmanager
def imported(mutant: Mutant) -> Iterator[Library]:
    """funcnet with this mutant in it."""
    kept = {name: sys.modules.pop(name) for name in list(sys.modules) if _ours(name)}
    finder = _Finder(mutant)
    sys.meta_path.insert(0, finder)
    try:
        yield library()
    finally:
        sys.meta_path.remove(finder)
        for name in filter(_ours, list(sys.modules)):
            del sys.modules[name]
        sys.modules.update(kept)


OURS = library()


def prepare(cache_folder: str) -> None:
    """The rules that the tests run under (conftest.py); what was compiled for one mutant serves the next."""
    jax.config.update("jax_numpy_rank_promotion", "raise")
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_compilation_cache_dir", cache_folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def verdict(mutant: Mutant, names: Sequence[str]) -> str:
    """What the checker says of a mutant on the cases of these names."""
    try:
        with imported(mutant) as mutated:
            for question in _questions(names):
                word = _refused(mutated, *question)
                if word and _holds(*question):
                    return word
    except Exception:
        return RAISED
    return SURVIVED


def _questions(names: Sequence[str]) -> list[tuple[str, str, tuple[str, ...]]]:
    """What to ask on these cases, the cheapest and likeliest first: (name, dtype, oracles)."""
    first = [(name, OURS.cases[name].dtypes[0]) for name in names]
    half = [(name, "bfloat16") for name in names if "bfloat16" in OURS.cases[name].dtypes]
    return [
        *((*point, AUTODIFF) for point in first[:MANY] + half[:MANY]),
        *((*point, ("laws",)) for point in first[:FEW] + half[:FEW]),
        *((*point, ("algebra", "numerical")) for point in first[:FEW]),
        *((*point, AUTODIFF) for point in first[MANY:ALL] + half[MANY:ALL]),
    ]


def _refused(given: Library, name: str, dtype: str, oracles: tuple[str, ...]) -> str:
    try:
        if oracles == AUTODIFF:
            return "" if _as_autodiff(given.cases[name], dtype) else REFUSED
        subject = subject_of(given, name, dtype)
        return "" if given.checker.examine(subject, oracles, 0, 2, explain=False).ok else REFUSED
    except Exception:
        return RAISED


def _as_autodiff(case: Case, dtype: str) -> bool:
    """Whether the rule of a case has structure and values of our own case's plain program."""
    ours, finder = _asked(case.name, dtype)
    point = copy.copy(ours)
    subject = ours.subject
    point.subject = replace(subject, pull=pulling(case.layer, subject.state, subject.key))
    for name in ("rule", "gotten"):
        point.__dict__.pop(name, None)
    point.compiled, point.broken, point.shown, point.notes = quickly(point.pull), set(), {}, []
    return not structure(point) and not autodiff(point, finder, True)[2]


@cache
def _asked(name: str, dtype: str) -> tuple[Point, Numerical]:
    """One of our own cases at a point, its references computed."""
    point = Point(subject_of(OURS, name, dtype), 0, 2)
    _ = point.references, point.terms
    return point, Numerical(point)


def subject_of(given: Library, name: str, dtype: str, seed: int = 0) -> Any:
    """A case at a point."""
    checker, case = given.checker, given.cases[name]
    x = checker.settled(checker.specs(case.x), seed)
    return checker.layer_at(case.layer, x, None, None, jnp.dtype(dtype), seed)


@cache
def _holds(name: str, dtype: str, oracles: tuple[str, ...]) -> bool:
    """Whether a case passes without a mutant: else its refusals say nothing."""
    return not _refused(OURS, name, dtype, oracles)


def lines_run(case: Case) -> set[tuple[str, int]]:
    """The lines of funcnet that a case's passes run, as (file, line), also those for half precision alone."""
    found = set()

    def line(frame, event, _):
        found.add((frame.f_code.co_filename, frame.f_lineno))
        return line

    def call(frame, event, _):
        return line if frame.f_code.co_filename.startswith(str(PACKAGE)) else None

    for dtype in {case.dtypes[0], *{"bfloat16"}.intersection(case.dtypes)}:
        with jax.enable_x64(dtype == "float64"):
            key, x = jax.random.key(0), cast(drawn(settled(specs(case.x), 0), 0), dtype)
            params, state = jax.eval_shape(case.layer.init, key, x)
            sys.settrace(call)
            try:
                jax.eval_shape(lambda *args: _passes(case.layer, *args), params, state, x, key)
            finally:
                sys.settrace(None)
    return {(str(Path(file).relative_to(PACKAGE)), number) for file, number in found}


def _passes(layer: fn.Layer, params: Any, state: Any, x: Any, key: Any) -> Any:
    y, _, residuals = layer.fwd(params, state, x, key)
    dy = jax.tree.map(lambda leaf: leaf if jnp.issubdtype(leaf.dtype, jnp.floating) else None, y)
    pull = lambda contract: layer.bwd(params, residuals, dy, contract)
    with suppress(fn.InputError):  # an input without an axis of examples
        for method in ("total", "per_example", "squared_norm"):
            asked = lambda factor, param, method=method: getattr(factor, method)(param)
            jax.tree.map(asked, pull(fn.keep)[0], params, is_leaf=fn.is_factor)
        return [pull(contract) for contract in (fn.total, fn.rows, fn.per_example, fn.squared_norm, fisher_diagonal)]


def _nearest(mutant: Mutant, run: dict[str, set[tuple[str, int]]]) -> list[str]:
    """The cases that run a mutant's line, the shortest first; if none does, those that run the most of its file."""
    direct = [name for name in run if any((mutant.file, line) in run[name] for line in mutant.lines)]
    share = {name: sum(file == mutant.file for file, _ in run[name]) for name in run}
    return sorted(direct, key=lambda name: len(run[name])) or sorted(run, key=lambda name: -share[name])


def judged(chosen: Sequence[Mutant], processes: int, progress: bool = False) -> list[tuple[Mutant, str]]:
    """Every mutant with what became of it."""
    run = {name: lines_run(case) for name, case in OURS.cases.items()}
    names = [_nearest(mutant, run) for mutant in chosen]
    found = []
    with TemporaryDirectory() as folder, ThreadPoolExecutor(processes) as threads:
        own = local()

        def ask(mutant: Mutant, names: Sequence[str]) -> str:
            own.judge = getattr(own, "judge", None) or Judge(folder)
            return own.judge.ask(mutant, names)

        for mutant, word in zip(chosen, threads.map(ask, chosen, names), strict=True):
            found.append((mutant, word))
            if progress and word == SURVIVED and not explained(mutant):
                print("survived", mutant, file=sys.stderr)
            if progress and not len(found) % 20:
                print(f"{len(found)} of {len(chosen)}", file=sys.stderr, flush=True)
    return found


class Judge:
    """A process that judges one mutant after the other; one that takes too long is ended, for it may loop for ever."""

    def __init__(self, folder: str):
        self.folder = folder
        self._start()

    def _start(self) -> None:
        context = get_context("spawn")
        self.here, there = context.Pipe()
        self.process = context.Process(target=_judging, args=(self.folder, there), daemon=True)
        self.process.start()

    def ask(self, mutant: Mutant, names: Sequence[str]) -> str:
        self.here.send((mutant, names))
        if self.here.poll(LONGEST):
            return self.here.recv()
        self.process.kill()
        self._start()
        return RAISED


def _judging(folder: str, there: Connection) -> None:
    prepare(folder)
    while True:
        there.send(verdict(*there.recv()))


def explained(mutant: Mutant) -> bool:
    """Whether it is known to be no mistake."""
    return mutant.key in EQUIVALENT or f"{mutant.where}: {mutant.before}" in CHOICES


def unexplained(found: Sequence[tuple[Mutant, str]]) -> list[Mutant]:
    """Mutants that survived though they are mistakes."""
    return [mutant for mutant, word in found if word == SURVIVED and not explained(mutant)]


def stale(found: Sequence[tuple[Mutant, str]]) -> list[str]:
    """Explanations of mutants that did not survive."""
    return sorted({mutant.key for mutant, word in found if word != SURVIVED} & EQUIVALENT.keys())


def sampled(everything: list[Mutant], size: int | None, seed: int = 0) -> list[Mutant]:
    return everything if size is None else random.Random(seed).sample(everything, min(size, len(everything)))


def table(found: Sequence[tuple[Mutant, str]]) -> str:
    """Counts by file."""
    counts = Counter((mutant.file, word) for mutant, word in found)
    words = (REFUSED, RAISED, SURVIVED)
    rows = [["file", "mutants", *words, "of these explained"]]
    for file in dict.fromkeys(mutant.file for mutant, _ in found):
        known = sum(m.file == file and w == SURVIVED and explained(m) for m, w in found)
        each = [counts[file, word] for word in words]
        rows.append([file, *map(str, (sum(each), *each, known))])
    rows.append(["all", *(str(sum(int(row[i]) for row in rows[1:])) for i in range(1, len(rows[0])))])
    return "\n".join(f"{row[0]:24}" + "".join(f"{cell:>21}" for cell in row[1:]) for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", nargs="*", default=[""], help="only files with one of these in their names")
    parser.add_argument("--sample", type=int, help="how many mutants, drawn by the seed; by default all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    chosen = [m for m in mutants(PACKAGE, FILES) if any(part in m.file for part in args.files)]
    found = judged(sampled(chosen, args.sample, args.seed), args.processes, progress=True)
    print("", table(found), sep="\n")
    for mutant in unexplained(found):
        print("survived", mutant)
    for key in stale(found):
        print("explained, but refused", key)


if __name__ == "__main__":
    main()
