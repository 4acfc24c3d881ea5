"""`python -m benchmarks [NAME ...]`: check that all sides compute the same, time them, print tables, write JSON."""

import argparse
import json
import sys
from pathlib import Path

import jax

from benchmarks import harness, report, workloads
from benchmarks.peers import SIDES


def main(arguments: list[str] | None = None) -> None:
    """Run the named workloads, or all of them. A `harness.Disagreement` ends the run."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = _parser().parse_args(arguments)
    if options.list:
        print("\n".join(f"{name:18}{workloads.describe(name)}" for name in workloads.names()))
        return
    jax.config.update("jax_enable_compilation_cache", False)  # a compilation read from disk is not one
    environment = report.environment(arguments)
    print(report.heading(environment), flush=True)
    records = []
    for name in options.names or workloads.names():

        def progress(message: str, name: str = name) -> None:
            print(f"{name}: {message}", file=sys.stderr, flush=True)

        measured = harness.measure(workloads.load(name), options.rounds, options.compiles, options.sides, progress)
        records.append(report.record(name, measured))
        print(report.text(records[-1]), flush=True)
        if options.json:
            options.json.write_text(json.dumps(environment | {"workloads": records}, indent=1) + "\n")


def _parser() -> argparse.ArgumentParser:
    known = workloads.names()
    parser = argparse.ArgumentParser("python -m benchmarks", description="funcnet's training step beside its peers'.")
    add = parser.add_argument
    add("names", nargs="*", metavar="NAME", type=_one_of(known), help=f"all by default, of: {', '.join(known)}")
    add("--rounds", type=_positive, default=20, help="timed rounds, each with one sample of every side (20)")
    add("--compiles", type=_positive, default=5, help="compilations of every side (5)")
    add("--sides", type=_sides, default=[], help=f"all by default, or some of: {','.join(SIDES)}")
    add("--json", type=Path, metavar="FILE", help="write everything here as well")
    add("--list", action="store_true", help="list the workloads and stop")
    return parser


def _one_of(known):
    def check(value: str) -> str:
        if value not in known:
            raise argparse.ArgumentTypeError(f"{value!r} is none of {', '.join(known)}")
        return value

    return check


def _sides(value: str) -> list[str]:
    return [_one_of(SIDES)(side) for side in value.split(",")]


def _positive(value: str) -> int:
    if not value.isdecimal() or int(value) == 0:
        raise argparse.ArgumentTypeError(f"{value!r} is not a positive whole number")
    return int(value)


if __name__ == "__main__":
    main()
