"""Weights in the layout of the CPU kernels, kept in a file between loads.

Putting packed words into the kernels' layout takes longer than reading them. It is done once: the
result goes into the user's cache directory, and later loads map that file, so that the weights are
ready as soon as the file is checked, and processes share its pages. The file belongs to the exact
contents of the checkpoint (`Checkpoint.fingerprints`); kernels/cpu/cache.py says how a damaged one
is found.
"""

import hashlib
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from qmoe._version import __version__
from qmoe.checkpoint.folders import CONFIG
from qmoe.checkpoint.reader import Checkpoint
from qmoe.errors import OutputError
from qmoe.kernels.cpu.cache import StaleCache, cache_key, open_cache, write_cache
from qmoe.kernels.cpu.stack import CpuStack
from qmoe.system.printing import say
from qmoe.system.sizes import format_size

SUFFIX = ".cpu"
WORTH = 1 << 28  # bytes of a checkpoint below which loading is quick anyway


def prepared_file(checkpoint: Checkpoint, dtype: torch.dtype) -> tuple[Path, str] | None:
    """The file for a checkpoint that runs in `dtype`, and the key that it must have. None where the
    weights are too small to be worth one, or where the user has no home to keep it in."""
    folder = cache_folder()
    if checkpoint.nbytes() < WORTH or folder is None:
        return None
    config = hashlib.sha256((checkpoint.path / CONFIG).read_bytes()).hexdigest()
    # Which rows are paired follows from the code of qmoe and of the model.
    code = [__version__, transformers.__version__]
    key = cache_key([config, *checkpoint.fingerprints(), str(dtype), *code])
    return folder / f"{checkpoint.path.name}-{key[:16]}{SUFFIX}", key


def cache_folder() -> Path | None:
    """Where prepared files are kept, whether or not it exists; None for a user without a home."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(home) / "qmoe" if os.path.isabs(home) else None


@dataclass(frozen=True)
class PreparedFile:
    """A file of the cache folder. nbytes: its size. unused_days: days since a load last read it, or
    since it was written, as far as the file system keeps times of reading."""

    path: Path
    nbytes: int
    unused_days: float


def prepared_files() -> list[PreparedFile]:
    """The files in the cache folder that `keep_prepared` wrote, with those that a killed process
    left unfinished, the longest unused first."""
    folder, now, found = cache_folder(), time.time(), []
    for path in [] if folder is None or not folder.is_dir() else folder.iterdir():
        if path.is_file() and (path.suffix == SUFFIX or path.match(f"*{SUFFIX}.*.partial")):
            stat = path.stat()
            unused = max(0.0, now - max(stat.st_atime, stat.st_mtime)) / 86400
            found.append(PreparedFile(path, stat.st_size, unused))
    return sorted(found, key=lambda file: (-file.unused_days, file.path))


def remove_prepared(unused_days: float = 0) -> list[PreparedFile]:
    """Remove the prepared files that nothing has read for so many days; returns them. Models that
    are loaded keep what they have mapped. OutputError if a file cannot be removed."""
    old = [file for file in prepared_files() if file.unused_days >= unused_days]
    for file in old:
        try:
            file.path.unlink(missing_ok=True)
        except OSError as error:
            raise OutputError(f"{file.path}: cannot be removed: {error.strerror}") from error
    return old


def open_prepared(path: Path, key: str) -> dict[str, Tensor] | None:
    """The buffers by the name of the module they are for, mapped; None if they have to be made. One
    line on standard error says why a file that is there is not used."""
    try:
        return open_cache(path, key)
    except StaleCache as error:
        if path.exists():
            say(f"{error}; it is made again")
        return None


def keep_prepared(model: Any, path: Path, key: str) -> None:
    """Write the buffers of a loaded model to the file, and let the model use the file's from then
    on. If that cannot be done, a line on standard error says so."""
    stacks = {name: m for name, m in model.named_modules() if isinstance(m, CpuStack)}
    buffers = {
        f"{name.rpartition('.')[0]}.{i}": stack.packed(i).buffer
        for name, stack in stacks.items()
        for i in range(len(stack.shapes))
    }
    try:
        write_cache(path, key, buffers)
        mapped = open_cache(path, key)
    except (OSError, StaleCache) as error:
        why = error.strerror if isinstance(error, OSError) else error
        say(f"{path}: {why}; the next load has to prepare the weights again")
        return
    for name, stack in stacks.items():
        for i in range(len(stack.shapes)):
            setattr(stack, f"buffer{i}", mapped[f"{name.rpartition('.')[0]}.{i}"])
    size = format_size(sum(buffer.nbytes for buffer in buffers.values()))
    say(f"{path}: {size} of weights in the CPU kernels' layout, for the next load; remove at will")
