"""What a command line names: a function or layer as "package.module:name", arguments as texts."""

import importlib
import inspect
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from functools import reduce
from typing import Any

from funcnet._internal.errors import InputError, describe
from funcnet.check.report import said
from funcnet.layer import Layer


def named(text: str) -> Any:
    """The object that "package.module:name" names; modules are imported from the current directory too.

    Raises:
        InputError: if there is none.
    """
    module, _, name = text.partition(":")
    if not module or not name:
        raise InputError('"package.module:name"', repr(text), "write a colon between the module and the name in it")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = importlib.import_module(module)
    except (Exception, SystemExit) as error:
        remedy = f'run "import {module}" in Python, from the same directory, and mend what it says'
        raise InputError(f"the module {module}", said(error), remedy) from error
    try:
        return reduce(getattr, name.split("."), found)
    except AttributeError:
        public = [each for each in dir(found) if not each.startswith("_")]
        raise InputError(f"a name in {module}", repr(name), nearest(name, public)) from None


def function_or_layer(text: str) -> Callable | Layer:
    """The object named, or the layer that it makes when it is called without arguments."""
    thing = named(text)
    if isinstance(thing, Layer):
        return thing
    if not callable(thing):
        raise InputError("a function or a layer", f"{text}, {describe(thing)}", "name the function itself")
    return _made(thing) or thing


def _made(make: Callable) -> Layer | None:
    """The layer that `make()` returns; None if it needs arguments, or returns something else."""
    try:
        parameters = inspect.signature(make).parameters.values()
    except (TypeError, ValueError):  # it has no signature to be read
        return None
    if any(p.default is p.empty for p in parameters):
        return None
    try:
        made = make()
    except Exception:
        if not parameters:
            raise
        return None  # a function whose defaults are not meant to go together
    return made if isinstance(made, Layer) else None


def arguments(texts: Sequence[str], maker: str | None) -> tuple:
    """The arguments to check at: one spec per text, or what the callable named `maker` returns."""
    if maker is None:
        return tuple(texts)
    if texts:
        raise InputError("--arg or --args", "both", "leave one of them out")
    args = named(maker)()
    if not isinstance(args, tuple):
        raise InputError(f"a tuple of arguments from {maker}", describe(args), "return (x,) for one argument")
    return args


def again(target: str, **flags: Any) -> str:
    """The command line that checks a target; a flag is True, a value or several, and left out if it is empty."""
    words = ["python", "-m", "funcnet", "check", target]
    for name, value in flags.items():
        if value is True:
            words.append(f"--{name}")
        elif value is not None and value is not False:
            values = value if isinstance(value, (list, tuple)) else [value]
            words += [word for each in values for word in (f"--{name}", str(each))]
    return shlex.join(words)


def nearest(name: str, known: Iterable[str]) -> str:
    """A remedy for a name that is not known."""
    near = get_close_matches(name, sorted(set(known)), n=3, cutoff=0.5)
    return f"did you mean {' or '.join(map(repr, near))}?" if near else f"name one of {', '.join(sorted(set(known)))}"
