"""Printing that may fail: a full disk, a reader that has gone, letters that the encoding lacks."""

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from qmoe.errors import OutputError


@contextmanager
def printing(what: str) -> Iterator[None]:
    """What is printed in here is out at the end: OutputError if it cannot be written, and
    BrokenPipeError if nobody reads it, with nothing left that would fail again as Python ends."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        try:
            yield
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except OSError as error:
        _give_up(sys.stdout)
        if isinstance(error, BrokenPipeError):
            raise
        raise OutputError(f"standard output: {error.strerror}, for {what}") from error


def say(line: str) -> None:
    """Print to standard error, which may be as full."""
    try:
        print(line, file=sys.stderr, flush=True)
    except OSError:
        _give_up(sys.stderr)


def _give_up(stream: TextIO) -> None:
    """What could not be written would be tried, and fail, once more as Python ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
