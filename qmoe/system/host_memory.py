"""Memory of this machine: what can be had, and giving back what is not needed.

A container or a batch job may have far less than the machine: the kernel kills what goes beyond the
limit of a control group, of its own or of one around it, without a word. The smallest limit counts.
"""

import ctypes
import resource
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path("/")
PROCESS = 450_000_000  # bytes of Python, torch and transformers themselves
# Of a group, by version: the files with its limit and with what it uses, and the entry of
# memory.stat that counts cached files, which it uses and gives up when memory is short.
V2 = ("memory.max", "memory.current", "inactive_file")
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


@dataclass(frozen=True)
class Room:
    """nbytes: of memory that can be had. reason: what leaves no more; it follows "free"."""

    nbytes: int
    reason: str


def free() -> int:
    """Bytes of memory that can be had: of the machine, or of the tightest limit on this process."""
    return room().nbytes


def room(root: Path = ROOT) -> Room:
    """The same with the reason. root: where /proc and /sys are read, for tests."""
    found = [Room(int(psutil.virtual_memory().available), "on this machine")]
    found += [*_left_by_control_groups(root), *_left_by_ulimit()]
    least = min(found, key=lambda r: r.nbytes)
    return Room(max(0, least.nbytes), least.reason)


def _left_by_control_groups(root: Path) -> Iterator[Room]:
    """What each control group leaves that this process is in, outermost ones included."""
    mounts = root / "sys/fs/cgroup"
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        # Version 2 is mounted at the top, or in `unified` where version 1 is there too. A container
        # may see its own group at the top and the path of the whole machine: what is not there is
        # passed over.
        tops = [mounts / "memory"] if controllers else [mounts, mounts / "unified"]
        parts = Path(path).parts[1:]
        for top in tops:
            for depth in range(len(parts), -1, -1):
                group = "/" + "/".join(parts[:depth])
                yield from _left_in(top.joinpath(*parts[:depth]), group, V1 if controllers else V2)


def _left_in(folder: Path, group: str, names: tuple[str, str, str]) -> Iterator[Room]:
    limit_name, used_name, files_name = names
    limit, used = _text(folder / limit_name).strip(), _text(folder / used_name).strip()
    if not limit.isdigit() or not used.isdigit():  # "max", or no such group
        return
    stat = dict(line.split() for line in _text(folder / "memory.stat").splitlines())
    left = int(limit) - int(used) + int(stat.get(files_name, 0))
    reason = f"under the limit of {limit} bytes of control group {group} ({limit_name})"
    yield Room(left, reason)


def _left_by_ulimit() -> Iterator[Room]:
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY:
        left = limit - psutil.Process().memory_info().vms
        yield Room(left, f"under the limit of {limit} bytes of address space (ulimit -v)")


def _text(path: Path) -> str:
    """What a file of the kernel says; nothing if it is not there."""
    try:
        return path.read_text()
    except OSError:
        return ""


def return_freed() -> None:
    """Give what was freed back to the system; glibc keeps it in its arenas otherwise."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
