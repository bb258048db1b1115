"""Watching modules while they run: hooks that are gone when the `with` block ends."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def hooked(
    before: Iterable[tuple[nn.Module, Callable[..., Any]]],
    after: Iterable[tuple[nn.Module, Callable[..., Any]]] = (),
    with_kwargs: bool = False,
) -> Iterator[None]:
    """Inside, each module of `before` calls its function with (module, args) when it is called, and
    each of `after` with (module, args, output) when it has run. with_kwargs: the first kind also
    gets the keyword arguments."""
    handles = [m.register_forward_pre_hook(f, with_kwargs=with_kwargs) for m, f in before]
    handles += [m.register_forward_hook(f) for m, f in after]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
