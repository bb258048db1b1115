"""Progress with time left, on a terminal; nothing anywhere else."""

from collections.abc import Iterable, Iterator
from typing import Protocol, TypeVar, runtime_checkable

T = TypeVar("T")


@runtime_checkable
class Track(Protocol):
    """Iterates over items, showing how far it is with `what`."""

    def __call__(self, items: Iterable[T], what: str) -> Iterable[T]: ...


def silent(items: Iterable[T], what: str) -> Iterator[T]:
    """Iterate without a word."""
    yield from items


def on_terminal(items: Iterable[T], what: str) -> Iterator[T]:
    """A bar on standard error if that is a terminal."""
    from rich.console import Console  # here, so that the library works where rich is missing
    from rich.progress import track

    console = Console(stderr=True)
    yield from track(items, description=what, console=console, disable=not console.is_terminal)
