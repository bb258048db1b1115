"""Memory of this machine: what can be had, and giving back what is not needed."""

import ctypes
from pathlib import Path

import psutil

CGROUP = Path("/sys/fs/cgroup")


def free() -> int:
    """Bytes of memory that can be had: of the machine, or of the container if that is less."""
    left: int = psutil.virtual_memory().available
    try:
        limit = int((CGROUP / "memory.max").read_text())
        left = min(left, limit - int((CGROUP / "memory.current").read_text()))
    except (OSError, ValueError):  # no such limit
        pass
    return left


def return_freed() -> None:
    """Give what was freed back to the system; glibc keeps it in its arenas otherwise."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
