"""Progress of a loop: a bar where there is a terminal and rich, plain lines where there is not."""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

Report = Callable[[int, Mapping[str, float] | None], None]


@contextmanager
def progress(first: int, last: int) -> Iterator[Report]:
    """Yield `report(step, record)`, to be called with every step; record is None where nothing was logged."""
    console = _console()
    if console is None:
        yield lambda step, record: print(f"step {step}/{last}  {_text(record)}", flush=True) if record else None
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


def _console():
    """rich's console if standard output is a terminal and rich is there, else None."""
    if not sys.stdout.isatty():
        return None
    try:
        from rich.console import Console
    except ImportError:
        return None
    return Console()


def _text(record: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in record.items() if name != "step")
