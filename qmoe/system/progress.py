"""Progress with time left, on a terminal and only where it was asked for."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

T = TypeVar("T")
_shown = ContextVar("shown", default=False)


@contextmanager
def shown(wanted: bool = True) -> Iterator[None]:
    """Inside, `progress` shows bars, or none, whatever is asked for outside."""
    token = _shown.set(wanted)
    try:
        yield
    finally:
        _shown.reset(token)


def is_shown() -> bool:
    """Whether `progress` shows bars here."""
    return _shown.get()


def progress(items: Iterable[T], what: str) -> Iterator[T]:
    """Iterate over items; a bar named `what` stands on standard error if bars are shown and that is
    a terminal."""
    if not _shown.get():
        yield from items
        return
    from rich.console import Console  # here, so that the library works where rich is missing
    from rich.progress import track

    console = Console(stderr=True)
    yield from track(items, description=what, console=console, disable=not console.is_terminal)
