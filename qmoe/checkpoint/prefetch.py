"""The bytes of the layer that comes next, read while this one is solved.

They go into the system's file cache, not into memory of ours: what a model larger than memory needs
next is there when it is asked for, and where the cache is short of room only the gain is lost.
(posix_fadvise, which is there for this, stops after a few hundred kilobytes on Linux.)
"""

import json
import threading
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

PIECE = 8 << 20  # bytes read at once


def read_ahead(tensors: dict[Path, set[str]]) -> threading.Thread:
    """Read tensors, by the safetensors file they are in, in a thread that stops where the process
    wants to end. (Not a daemon: one that is cut off aborts the process.) Raises nothing: who needs
    a tensor reads it and says what is wrong with it."""
    thread = threading.Thread(target=_read, args=(tensors,))
    thread.start()
    return thread


def _read(tensors: dict[Path, set[str]]) -> int:
    """The number of bytes that were read."""
    buffer, total = memoryview(bytearray(PIECE)), 0
    wanted = threading.main_thread().is_alive
    for path, names in tensors.items():
        with suppress(OSError), path.open("rb", buffering=0) as file:
            for begin, end in _spans(path, names):
                file.seek(begin)
                while wanted() and begin < end and (found := file.readinto(buffer[: end - begin])):
                    begin, total = begin + found, total + found
    return total


def _spans(path: Path, names: Iterable[str]) -> list[tuple[int, int]]:
    """Where tensors lie in a safetensors file: first byte and the one behind the last."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    places = [header[name]["data_offsets"] for name in names]
    return sorted((8 + size + begin, 8 + size + end) for begin, end in places)
