"""`python -m funcnet check`: the library's own rules, or a function or layer of yours, from the command line."""

import argparse
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax

from funcnet._internal.errors import InputError
from funcnet.check import table
from funcnet.check.cases import CASES, DTYPES
from funcnet.check.checker import ORACLES, check_layer, check_vjp
from funcnet.check.named import again, arguments, function_or_layer, named, nearest
from funcnet.check.report import Report
from funcnet.layer import Layer
from funcnet.train.plots import pyplot

ABOUT = """\
Is a hand-written backward rule the derivative of its forward pass?

Without a name, or with the beginnings of names of cases, funcnet's own rules are checked. With the name of a
function, its VJP is checked, custom rules inside it included; with the name of a funcnet layer, or of something that
returns one, its backward pass. Modules are imported from the current directory as well.
"""
EXAMPLES = """\
examples:
  python -m funcnet check                                    all of funcnet's rules: every oracle in float64,
                                                             autodiff in the other dtypes
  python -m funcnet check dense layer_norm/rank              the cases whose names begin so
  python -m funcnet check dense --arg "f32[8,16]"            the layer of one case, at another input
  python -m funcnet check mine.ops:f --arg "f32[8,16]" --arg "i32[8]<100"
  python -m funcnet check mine.ops:f --args mine.ops:make_args --x64
  python -m funcnet check mine.layers:my_layer --arg "bf16[8,16]" --dtype bfloat16

arguments to be drawn:
  f32[8,16]  bf16[n,m]  f32[8]>0  f32[8]>-1<1  i32[8]<100  bool[8]  c64[3]  key
  A letter is a size drawn from the seed; integers need an upper bound.

exit status:
  0  everything holds        1  something is wrong        2  bad input        130  stopped by Ctrl-C
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit status."""
    options = _parser().parse_args(argv)
    try:
        with redirect_stdout(sys.stderr):  # what a user's module prints is not part of the answer
            ok, answer = _check(options)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except (Exception, SystemExit) as error:
        if options.traceback:
            raise
        notes = "".join(f"\n  {note}" for note in getattr(error, "__notes__", ()) if "JAX" not in note)  # not JAX's
        remedy = "\n  remedy    add --traceback to see where"
        print(f"{type(error).__name__}: {error}{notes}{remedy}", file=sys.stderr)
        return 2
    print(answer)
    return 0 if ok else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m funcnet", description="funcnet's command line.")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    about = "check backward rules: funcnet's own, or a function or layer of yours"
    usage = "%(prog)s [NAME ...] [options]"
    check = commands.add_parser("check", help=about, usage=usage, description=ABOUT, epilog=EXAMPLES)
    check.formatter_class = lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=26, width=110)
    add = check.add_argument
    add("names", nargs="*", metavar="NAME", help="package.module:function, or the beginning of a case's name")
    add("--list", action="store_true", help="list the cases, or those named, and stop")

    add = check.add_argument_group("at what point").add_argument
    add("--arg", action="append", default=[], metavar="SPEC", help="an argument to be drawn; once for each")
    add("--args", metavar="MODULE:NAME", help="a callable that returns the tuple of arguments instead")
    add(
        "--dtype",
        default="",
        choices=DTYPES,
        metavar="NAME",
        help=f"{', '.join(DTYPES)}: of a layer (float64 by default); of the cases, in this one only",
    )
    add("--x64", action="store_true", help="run a function in JAX's 64-bit mode, in float64")
    add("--seed", type=_not_negative, default=0, metavar="N", help="of everything that is drawn (0)")

    add = check.add_argument_group("how").add_argument
    add(
        "--oracle",
        action="append",
        choices=ORACLES,
        metavar="NAME",
        help=f"ask only this one, of {', '.join(ORACLES)}; repeatable",
    )
    add("--directions", type=_positive, default=3, metavar="N", help="random directions in each leaf (3)")
    add("--reference", metavar="MODULE:NAME", help="a function with the same values, to be differentiated by JAX")
    add("--no-shrink", action="store_true", help="do not look for a smaller shape that fails as well")
    add("--jobs", type=_positive, metavar="N", help="processes for the cases (one a core)")

    shown = check.add_argument_group("what to show")
    add, form = shown.add_argument, shown.add_mutually_exclusive_group().add_argument
    form("--json", action="store_true", help="the report as JSON, and nothing else, on standard output")
    form("--markdown", action="store_true", help="the report as Markdown")
    add("--plot", type=Path, metavar="FILE.png", help="draw the worst leaf")
    add("--traceback", action="store_true", help="show where an error was raised")
    return parser


def _positive(text: str) -> int:
    return _at_least(1, text)


def _not_negative(text: str) -> int:
    return _at_least(0, text)


def _at_least(least: int, text: str) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least}")
    return int(text)


def _check(options: argparse.Namespace) -> tuple[bool, str]:
    """Whether everything holds, and what to print."""
    if options.list:
        _refuse(options, "json", "a check, to be reported")
        cases = [CASES[i] for i in table.selected(options.names)]
        width = max(len(case.name) for case in cases) + 2
        return True, "\n".join(f"{case.name:{width}}{', '.join(jax.tree.leaves(case.x))}" for case in cases)
    if options.arg or options.args or any(":" in name for name in options.names):
        return _one(options)
    for flag in ("x64", "reference", "plot"):
        _refuse(options, flag, "a function or layer to go with it")
    given = _given(options) | ({"oracles": tuple(options.oracle)} if options.oracle else {})
    outcome = table.run(table.selected(options.names), options.dtype, options.jobs, given)
    return outcome.ok, _shown(options, outcome)


def _one(options: argparse.Namespace) -> tuple[bool, str]:
    if len(options.names) != 1:
        raise InputError("one name with --arg, or with a colon", f"{options.names}", "check one after the other")
    target = options.names[0]
    thing = function_or_layer(target) if ":" in target else _layer_of_case(target)
    if options.plot:
        _drawable(options.plot)
    args = arguments(options.arg, options.args)
    if not args:
        raise InputError(f"the input of {target}", "no --arg", 'add --arg "f32[8,16]", once for each argument')
    report = _layer(thing, args, options) if isinstance(thing, Layer) else _function(thing, args, options)
    if not report.ok:
        report = replace(report, repeat=_again(target, report, options))
    if options.plot:
        report.plot(options.plot)
    return report.ok, _shown(options, report)


def _drawable(path: Path) -> None:
    """Refuse a picture that could not be drawn before anything is checked."""
    if path.suffix != ".png":
        raise InputError("a file that ends in .png", f"--plot {path}", "give it that ending")
    if not path.absolute().parent.is_dir():
        raise InputError("a file in a folder that is there", f"--plot {path}", "make the folder first")
    pyplot()


def _layer_of_case(name: str) -> Layer:
    for case in CASES:
        if case.name == name:
            return case.layer
    raise InputError("the full name of a case with --arg", repr(name), nearest(name, [case.name for case in CASES]))


def _layer(layer: Layer, args: tuple, options: argparse.Namespace) -> Report:
    _refuse(options, "x64", "--dtype float64, a layer's default")
    _refuse(options, "reference", "a function with it")
    oracles = tuple(options.oracle or ORACLES)
    x = args[0] if len(args) == 1 else args
    return check_layer(layer, x, dtype=options.dtype or "float64", oracles=oracles, **_given(options))


def _function(f: Any, args: tuple, options: argparse.Namespace) -> Report:
    _refuse(options, "dtype", 'the dtypes in --arg, such as "bf16[8]"')
    reference = named(options.reference) if options.reference else None
    oracles = tuple(options.oracle or ORACLES[:3])
    if of_layers := set(oracles) - set(ORACLES[:3]):
        raise InputError("an oracle for a function", ", ".join(of_layers), f"ask one of {', '.join(ORACLES[:3])}")
    return check_vjp(f, *args, reference=reference, oracles=oracles, x64=options.x64, **_given(options))


def _given(options: argparse.Namespace) -> dict[str, Any]:
    """The options of every check. Arrays of the user's own are not shrunk, as no command line could express that."""
    shrink = not options.no_shrink and not options.args
    return {"seed": options.seed, "directions": options.directions, "shrink": shrink}


def _refuse(options: argparse.Namespace, flag: str, wanted: str) -> None:
    if getattr(options, flag):
        raise InputError(wanted, f"--{flag}", "leave it out")


def _again(target: str, report: Report, options: argparse.Namespace) -> str:
    """The command line that shows a failure, on the smallest shape."""
    found = [] if options.args else jax.tree.leaves(report.smallest)
    flags = {"arg": found, "args": options.args, "dtype": options.dtype or None, "x64": options.x64}
    flags |= {"reference": options.reference, "oracle": options.oracle, "seed": options.seed}
    flags |= {"directions": options.directions, "no-shrink": options.no_shrink}
    return again(target, **flags)


def _shown(options: argparse.Namespace, found: Report | table.Outcome) -> str:
    if options.json:
        return found.to_json()
    return found.to_markdown() if options.markdown else str(found)
