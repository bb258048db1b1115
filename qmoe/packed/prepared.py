"""Weights in the layout of the CPU kernels, kept in a file between loads.

Putting packed words into the kernels' layout takes longer than reading them. It is done once: the
result goes into the user's cache directory, and later loads map that file, so that the weights are
ready as soon as the file is checked, and processes share its pages. The file belongs to the exact
contents of the checkpoint (`Checkpoint.fingerprints`); kernels/cpu/cache.py says how a damaged one
is found.
"""

import hashlib
import os
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from qmoe._version import __version__
from qmoe.checkpoint.folders import CONFIG
from qmoe.checkpoint.reader import Checkpoint
from qmoe.kernels.cpu.cache import StaleCache, cache_key, open_cache, write_cache
from qmoe.kernels.cpu.stack import CpuStack
from qmoe.system.printing import say
from qmoe.system.sizes import format_size

WORTH = 1 << 28  # bytes of a checkpoint below which loading is quick anyway


def prepared_file(checkpoint: Checkpoint, dtype: torch.dtype) -> tuple[Path, str] | None:
    """The file for a checkpoint that runs in `dtype`, and the key that it must have. None where the
    weights are too small to be worth one, or where the user has no home to keep it in."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if checkpoint.nbytes() < WORTH or not os.path.isabs(home):
        return None
    config = hashlib.sha256((checkpoint.path / CONFIG).read_bytes()).hexdigest()
    # Which rows are paired follows from the code of qmoe and of the model.
    code = [__version__, transformers.__version__]
    key = cache_key([config, *checkpoint.fingerprints(), str(dtype), *code])
    return Path(home) / "qmoe" / f"{checkpoint.path.name}-{key[:16]}.cpu", key


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
