"""Progress of a loop: a bar where there is a terminal and rich, plain lines where there is not."""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TextIO

Report = Callable[[int, Mapping[str, float] | None], None]


@contextmanager
def progress(first: int, last: int, what: str = "step", out: TextIO | None = None) -> Iterator[Report]:
    """Yield `report(step, record)`, to be called with every step; record is None where nothing was logged.

    Args:
        first, last: the number of the step before the first one to come, and of the last one.
        what: what a step is called in plain lines.
        out: where to write; standard output by default.
    """
    stream = out or sys.stdout
    console = _console(stream)
    if console is None:
        line = lambda step, record: print(f"{what} {step}/{last}  {_text(record)}", file=stream, flush=True)
        yield lambda step, record: line(step, record) if record else None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("", total=last, completed=first)

        def report(step: int, record: Mapping[str, float] | None) -> None:
            bar.update(task, completed=step)
            if record:
                bar.update(task, description=_text(record))

        yield report


def _console(out: TextIO):
    """rich's console if `out` is a terminal and rich is there, else None."""
    if not out.isatty():
        return None
    try:
        from rich.console import Console
    except ImportError:
        return None
    return Console(file=out)


def _text(record: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in record.items() if name != "step")
