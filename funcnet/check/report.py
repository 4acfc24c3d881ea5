"""What a check found: every leaf with a verdict by each oracle, what is wrong, and how to see it again."""

import json
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np

from funcnet._internal.errors import InputError
from funcnet._internal.tables import tabulated
from funcnet.check.judge import Leaf


@dataclass(frozen=True)
class Failure:
    """One thing that is wrong.

    Attributes:
        leaf: the leaf's path, or what else is wrong, such as "residuals.rstd"; empty for the function as a whole.
        oracle: who says so: "autodiff", "numerical", "algebra", "residuals", "laws", or "reference".
        kind: what is wrong: "value", "not finite", "structure", "dtype", "linearity", "vmap", ..
        message: a sentence.
        index, got, wanted: the element and its two values, where it is about values.
    """

    leaf: str
    oracle: str
    kind: str
    message: str
    index: tuple[int, ...] = ()
    got: complex | None = None
    wanted: complex | None = None

    def __str__(self) -> str:
        where = f"{self.leaf}: " if self.leaf else ""
        return f"{where}{self.message} ({self.oracle}, {self.kind})"


@dataclass(frozen=True)
class Report:
    """What a check found.

    Attributes:
        title: what was checked against what.
        leaves: every gradient leaf, worst first.
        failures: all that is wrong; empty if the rule holds.
        notes: what else there is to know: which custom rules were replaced, what an oracle could not tell and why.
        oracles: who was asked.
        repeat: the line that shows the failure again, on the smallest shape found; empty if nothing failed.
        smallest: what was checked, at that shape: a tree of specs (`funcnet.check.spec`) and arrays.
        arrays: by leaf, the gradient and its reference, for pictures.
    """

    title: str
    leaves: tuple[Leaf, ...] = ()
    failures: tuple[Failure, ...] = ()
    notes: tuple[str, ...] = ()
    oracles: tuple[str, ...] = ()
    repeat: str = ""
    smallest: Any = field(default=None, repr=False, compare=False)
    arrays: Mapping[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict, repr=False, compare=False)

    @property
    def ok(self) -> bool:
        """Whether nothing failed."""
        return not self.failures

    def raise_for_failure(self) -> None:
        """Raise AssertionError with the report as its message unless everything holds."""
        if not self.ok:
            raise AssertionError(str(self))

    @property
    def summary(self) -> str:
        """One line: how many leaves are wrong, and which."""
        if self.ok:
            return self._held()
        wrong = [leaf.leaf for leaf in self.leaves if not leaf.ok]
        others = [f.leaf or f.kind for f in self.failures if f.leaf not in wrong]
        counted = f"{len(wrong)} of {len(self.leaves)} leaves wrong: {', '.join(wrong)}" if wrong else ""
        beside = ("also wrong: " if wrong else "wrong: ") + ", ".join(dict.fromkeys(others)) if others else ""
        return "; ".join(filter(None, [counted, beside]))

    def __str__(self) -> str:
        head, *rows = self._rows()
        left = {0, 1, *(i for i, name in enumerate(head) if i > 6 and name not in ("got", "reference"))}
        table = tabulated(head, rows, {*range(len(head))} - left) if self.leaves else []
        return "\n".join([self.title, *table, *self._sentences("  "), self.summary])

    def to_markdown(self) -> str:
        """The report as Markdown: a table and a list."""
        head, *rows = self._rows()
        cells = [head, ["---"] * len(head), *rows]
        table = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in cells]
        sentences = ["- " + line.strip() for line in self._sentences("")]
        parts = [f"**{self.title}**", "\n".join(table) if self.leaves else "", "\n".join(sentences), self.summary]
        return "\n\n".join(filter(None, parts)) + "\n"

    def to_json(self) -> str:
        """The report as JSON; complex numbers, and those that JSON does not have (inf, nan), are strings."""
        leaves = [{**_plain(leaf), "ok": leaf.ok} for leaf in self.leaves]
        whole = {
            "title": self.title,
            "ok": self.ok,
            "leaves": leaves,
            "failures": [_plain(failure) for failure in self.failures],
            "notes": self.notes,
            "oracles": self.oracles,
            "repeat": self.repeat,
        }
        return json.dumps(whole, indent=2)

    def plot(self, path: str | Path, leaf: str | None = None) -> None:
        """Draw the worst leaf, or the one named, as a PNG: where its errors are, and its values against the reference.

        Raises:
            InputError: if there is no such leaf, or it has no values to draw.
            ImportError: if matplotlib is missing: the extra `plots` brings it.
        """
        from funcnet.check.picture import draw

        known = {each.leaf: each for each in self.leaves if each.leaf in self.arrays}
        name = leaf or next(iter(known), "")
        if name not in known:
            remedy = "name a leaf that has a gradient and a reference of one shape"
            raise InputError(f"one of the leaves {list(known)}", repr(leaf), remedy)
        draw(known[name], *self.arrays[name], path)

    def _held(self) -> str:
        of_leaves = {oracle for leaf in self.leaves for oracle, word in leaf.verdicts.items() if word != "-"}
        told = [oracle for oracle in self.oracles if oracle in (*of_leaves, "residuals", "laws")]
        if not told and (self.oracles or not self.leaves):
            return "nothing was compared: " + ("no oracle could tell" if self.leaves else "there is no gradient")
        count = f"all {len(self.leaves)} leaves hold" if len(self.leaves) > 1 else "the one leaf holds"
        return (count if self.leaves else "there is no gradient; the rest holds") + (
            f", judged by {', '.join(told)}" if told else ""
        )

    def _rows(self) -> list[list[str]]:
        oracles = list(dict.fromkeys(oracle for leaf in self.leaves for oracle in leaf.verdicts))
        head = ["leaf", "type", "scale", "error", "error/scale", "allowed", "ulps", *oracles]
        return [[*head, "worst at", "got", "reference"], *(_row(leaf, oracles) for leaf in self.leaves)]

    def _sentences(self, indent: str) -> list[str]:
        lines = [f"{indent}WRONG  {failure}" for failure in self.failures]
        lines += [f"{indent}LIKELY {leaf.leaf}: {leaf.diagnosis}" for leaf in self.leaves if leaf.diagnosis]
        lines += [f"{indent}note   {note}" for note in self.notes]
        return lines + ([f"{indent}again  {self.repeat}"] if self.repeat else [])


def _row(leaf: Leaf, oracles: list[str]) -> list[str]:
    kind = f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]" if leaf.dtype else ""
    verdicts = [leaf.verdicts.get(oracle, "-") for oracle in oracles]
    if not leaf.allowed:  # nothing was compared
        return [leaf.leaf, kind, "", "", "", "", "", *verdicts, "", "", ""]
    numbers = (
        f"{leaf.scale:.3g}",
        f"{leaf.error:.1e}",
        f"{leaf.relative:.1e}",
        f"{leaf.allowed:.1e}",
        f"{leaf.ulps:.2g}",
    )
    worst = str(list(leaf.index)), f"{leaf.got:.9g}", f"{leaf.wanted:.9g}"
    return [leaf.leaf, kind, *numbers, *verdicts, *worst]


def _plain(record: Any) -> dict:
    """A dataclass as JSON takes it."""
    return {name: _number(value) for name, value in vars(record).items()}


def _number(value: Any) -> Any:
    if isinstance(value, complex) or (isinstance(value, float) and not np.isfinite(value)):
        return str(value)
    return dict(value) if isinstance(value, Mapping) else value


def said(error: BaseException, most: int = 300) -> str:
    """The first paragraph of an error on one line, between the error's type and the place that raised it."""
    words = " ".join(str(error).split("\n\n")[0].split())[:most]
    return f"{type(error).__name__}: {words}{_where(error)}"


def _where(error: BaseException) -> str:
    """The last line of a traceback that is neither JAX's nor the checker's: of the rule, or of what it called."""
    skipped = tuple(str(Path(file).parent) for file in (jax.__file__, np.__file__, __file__))
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith((*skipped, "<"))]
    return f" ({Path(frames[-1].filename).name}:{frames[-1].lineno}, in {frames[-1].name})" if frames else ""


def values_failure(leaf: Leaf, oracle: str, kind: str = "value", what: str = "the gradient") -> Failure:
    """The failure of a leaf whose worst element is off by more than is allowed."""
    if np.isfinite(leaf.wanted) and not np.isfinite(leaf.got):
        kind = "not finite"
    where = f" at {list(leaf.index)}" if leaf.index else ""
    message = f"{what}{where} is {leaf.got:.9g}, and {leaf.wanted:.9g} in the reference"
    return Failure(leaf.leaf, oracle, kind, message, leaf.index, leaf.got, leaf.wanted)
