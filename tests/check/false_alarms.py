"""Right rules at many points: how near the checker comes to a false alarm, and how small a mistake it still finds.

    python -m tests.check.false_alarms [--seeds 1000] [--cases norm] [--dtypes float64 bfloat16] [--processes 2]

Every case (`funcnet.check.cases`) in each of its dtypes is compiled once; a seed draws other parameters, inputs and
cotangents. Integers and keys stay. Autodiff, linearity and the output are asked at every point, numerical differences
at each fourth and forward mode at each hundredth.
"""

import argparse
import copy
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from itertools import count
from multiprocessing import get_context

import jax
import jax.numpy as jnp
import numpy as np

from funcnet._internal.casting import cast
from funcnet.check import algebra
from funcnet.check.autodiff import autodiff
from funcnet.check.cases import CASES, DTYPES, Case
from funcnet.check.judge import as_float64, leaves_of
from funcnet.check.layer import layer_at, moved
from funcnet.check.numerical import numerical
from funcnet.check.report import Failure
from funcnet.check.slopes import Numerical
from funcnet.check.spec import drawn, settled, specs
from funcnet.check.subject import Point
from funcnet.layer import unrounded

OURS = {case.name: case for case in CASES}
VARY = {"rule", "references", "plain_output", "baseline_error"}  # what of a point depends on its values


@dataclass
class Tally:
    """What became of one case in one dtype.

    Attributes:
        case, dtype: of which.
        ratios: error over what is allowed, by leaf, one for each seed.
        alarms: the failures, with their seeds.
        caught: by leaf, the smallest share of an element by which it may be off and is refused: of its largest element,
            and of one drawn at random.
    """

    case: str
    dtype: str
    ratios: dict[str, list[float]] = field(default_factory=dict)
    alarms: list[tuple[int, Failure]] = field(default_factory=list)
    caught: dict[str, tuple[float, float]] = field(default_factory=dict)


def tally(name: str, dtype: str, seeds: int) -> Tally:
    """A case in a dtype at `seeds` points."""
    found = Tally(name, dtype)
    case = next(case for case in CASES if case.name == name)
    for seed, (point, finder) in zip(range(seeds), _points(case, dtype), strict=False):
        leaves, _, failures = autodiff(point, finder, True)
        failures += algebra.linearity(point) + algebra.output(point)
        failures += numerical(point, finder)[1] if "numerical" in case.oracles and seed % 4 == 0 else []
        failures += algebra.adjoint(point, finder) if "algebra" in case.oracles and seed % 100 == 50 else []
        found.alarms += [(seed, failure) for failure in failures]
        for leaf in leaves:
            found.ratios.setdefault(leaf.leaf, []).append(leaf.relative / (leaf.allowed or 1.0))
        if seed == 0:
            found.caught = {leaf.leaf: _caught(point, leaf.leaf) for leaf in leaves if leaf.scale}
    return found


def _points(case: Case, dtype: str) -> Iterator[tuple[Point, Numerical]]:
    """A case at one point after another; all of them run what is compiled for the first."""
    x = settled(specs(case.x), 0)
    first = Point(layer_at(case.layer, x, None, None, jnp.dtype(dtype), 0), 0, 3)
    if failures := algebra.structure(first):
        raise AssertionError(f"{case.name}: {failures[0]}")
    for name in (*VARY - {"baseline_error"}, "_baseline"):
        getattr(first, name)  # every point shares what is compiled, of its own error when it is first asked for
    finder, init = Numerical(first), jax.jit(case.layer.init)
    for seed in count():
        point = copy.copy(first)
        for name in VARY & point.__dict__.keys():
            del point.__dict__[name]
        point.rng, point.notes = np.random.default_rng([seed, 1]), []
        with first.subject.mode():
            values = cast(drawn(x, seed), dtype)
            params = jax.tree.map(lambda p, rng=point.rng: moved(p, rng), init(jax.random.key(seed), values)[0])
            named = {**leaves_of(cast(params, dtype, unrounded(case.layer)), "params"), **leaves_of(values, "x")}
        point.values = {path: np.asarray(named[path]) for path in first.values}
        point.dys = [point.draw(point.outputs) for _ in range(2)]
        near = Numerical(point)
        near.__dict__["_along"] = finder._along
        yield point, near


def _caught(point: Point, path: str) -> tuple[float, float]:
    """The smallest 2^-k by which the largest element of a leaf, or one drawn at random, may be off and is refused."""
    right, wanted = point.rule[0][path], point.references[0][path]
    nonzero = np.flatnonzero(wanted)
    return _smallest(point, path, np.abs(wanted).argmax(), right, wanted), _smallest(
        point, path, point.rng.choice(nonzero), right, wanted
    )


def _smallest(point: Point, path: str, i: int, right: np.ndarray, wanted: np.ndarray) -> float:
    found = float("inf")
    for share in 2.0 ** np.arange(4, -50, -1):
        wrong = right.copy()
        wrong.ravel()[i] = (as_float64(right).ravel()[i] * (1 + share)).astype(right.dtype)
        if point.measured(path, wrong, wanted).within:
            break
        found = float(share)
    return found


def tallies(names: Sequence[str], dtypes: Sequence[str], seeds: int, processes: int) -> list[Tally]:
    """Every case in every dtype that it is checked in."""
    rows = [(name, dtype) for name in names for dtype in dtypes if dtype in OURS[name].dtypes]
    found = []
    with ProcessPoolExecutor(processes, get_context("spawn"), prepare) as pool:
        for each in pool.map(tally, *zip(*rows, strict=True), [seeds] * len(rows)):
            found.append(each)
            if not len(found) % 20:
                print(f"{len(found)} of {len(rows)}", file=sys.stderr, flush=True)
    return found


def prepare() -> None:
    """The rules that the tests run under (conftest.py)."""
    jax.config.update("jax_numpy_rank_promotion", "raise")
    jax.config.update("jax_numpy_dtype_promotion", "strict")


def summary(found: Sequence[Tally]) -> str:
    """By dtype: how many leaves were judged, the refusals, error over allowed, and the smallest mistake found."""
    head = ("dtype", "judged", "refused", "median", "99%", "99.9%", "largest", "caught: largest", "at random", "where")
    rows = [head]
    for dtype in [dtype for dtype in DTYPES if any(each.dtype == dtype for each in found)]:
        these = [each for each in found if each.dtype == dtype]
        each_leaf = {(each.case, leaf): max(ratios) for each in these for leaf, ratios in each.ratios.items()}
        ratios = np.concatenate([ratios for each in these for ratios in each.ratios.values()])
        numbers = [*np.quantile(ratios, [0.5, 0.99, 0.999]), ratios.max()]
        caught = [np.median([pair[i] for each in these for pair in each.caught.values()]) for i in (0, 1)]
        alarms = sum(len(each.alarms) for each in these)
        worst = " ".join(max(each_leaf, key=lambda key: each_leaf[key]))
        shown = [f"{number:.3f}" for number in numbers] + [f"{share:.1e}" for share in caught]
        rows.append((dtype, f"{ratios.size:,}", str(alarms), *shown, worst))
    return "\n".join("".join(f"{cell:<17}" if i > 6 else f"{cell:<10}" for i, cell in enumerate(row)) for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=1000)
    parser.add_argument("--cases", nargs="*", default=[""], help="only cases with one of these in their names")
    parser.add_argument("--dtypes", nargs="*", default=DTYPES)
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    names = [name for name in OURS if any(part in name for part in args.cases)]
    found = tallies(names, args.dtypes, args.seeds, args.processes)
    print(summary(found))
    for each in found:
        for seed, failure in each.alarms[:5]:
            print(f"{each.case}, {each.dtype}, seed {seed}: {failure}")
    print("nearest to an alarm")
    near = [(max(ratios), each.case, each.dtype, leaf) for each in found for leaf, ratios in each.ratios.items()]
    for ratio, *where in sorted(near, reverse=True)[:20]:
        print(f"{ratio:8.3f}  {', '.join(where)}")


if __name__ == "__main__":
    main()
