"""Ctrl-C while a compiled step holds the train state that it was given."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any


@contextmanager
def interrupts() -> Iterator[Callable[[], AbstractContextManager]]:
    """Delays Ctrl-C inside `held()`: after a train state is donated there is none until the next one arrives.

    Python drops an exception that a signal handler raises in a finaliser or a callback of its garbage collector. Such a
    Ctrl-C is not lost either: it is raised again at the end of the next `held()`.
    """
    default = signal.getsignal(signal.SIGINT)
    if not callable(default) or threading.current_thread() is not threading.main_thread():
        yield nullcontext
        return
    unheard, waiting = [], []

    def heard(*signalled: Any) -> None:
        unheard.append(signalled)
        if not waiting:
            default(*signalled)
            unheard.clear()

    @contextmanager
    def held() -> Iterator[None]:
        waiting.append(True)
        try:
            yield
        finally:
            waiting.clear()
            if unheard:
                default(*unheard.pop())

    signal.signal(signal.SIGINT, heard)
    try:
        yield held
    finally:
        signal.signal(signal.SIGINT, default)
