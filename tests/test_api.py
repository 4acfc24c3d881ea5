"""docs/api.md names everything public, each with the first sentence of its docstring.

    python tests/test_api.py

writes the page.
"""

import inspect
import re
from pathlib import Path

import funcnet as fn

PAGE = Path(__file__).parents[1] / "docs" / "api.md"
ROOMS = {
    "layers": "Layers",
    "combinators": "Combinators",
    "compositions": "Compositions",
    "losses": "Losses",
    "train": "Training",
    "gradients": "Gradients: factors and contractions",
    "layer": "A layer of your own",
    "structure": "A layer of your own",
    "check": "The checker",
    "inspect": "Reports",
    "calculus": "Derivatives of the textbook",
    "interop": "Next to other libraries",
    "_internal": "Errors",
}


def room(name):
    given = getattr(fn, name)
    made = type(given[0]) if isinstance(given, tuple) else type(given) if not hasattr(given, "__name__") else given
    return ROOMS[made.__module__.split(".")[1]]


def heading(name):
    given = getattr(fn, name)
    if not inspect.isfunction(given):
        return f"`{name}`"
    parameters = inspect.signature(given).parameters.values()
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in parameters]
    text = re.sub(r"<class '.*?(\w+)'>", r"\1", str(inspect.Signature(bare))).replace("'", '"')
    return f"`{name}{text}`"


def said(name):
    """The first sentence of the docstring, on one line."""
    given = getattr(fn, name)
    text = f"A tuple of `{type(given[0]).__name__}`s." if isinstance(given, tuple) else given.__doc__
    first = " ".join(inspect.cleandoc(text).split("\n\n")[0].split())
    return re.split(r"(?<=[a-z\])`>]\.)\s+(?=[A-Z`])", first)[0]


def written():
    lines = ["# Every public name", "", "`import funcnet as fn`; each is `fn.` and the name. `help` says the rest."]
    for title in dict.fromkeys(ROOMS.values()):
        names = sorted((name for name in fn.__all__ if room(name) == title), key=str.lower)
        lines += ["", f"## {title}", "", *(f"- {heading(name)}: {said(name)}" for name in names)]
    return "\n".join(lines) + "\n"


def test_the_page_is_what_the_code_says():
    assert PAGE.read_text() == written(), "write it anew: python tests/test_api.py"


if __name__ == "__main__":
    PAGE.write_text(written())
