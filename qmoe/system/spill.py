"""Tensors that wait: in memory, or on disk where calibration text is long and memory short.

A kept tensor lies in a file without a name that is mapped into memory: the operating system reads
it when it is used, and the disk space is free again when the tensor is. Values are the same either
way, so results do not depend on it.
"""

import mmap
import os
import tempfile
import weakref
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Scratch:
    """Where tensors wait: files in `folder`, or memory if it is None."""

    def __init__(self, folder: Path | None = None):
        self.folder = folder
        self._maps: weakref.WeakSet[mmap.mmap] = weakref.WeakSet()

    def keep(self, value: T) -> T:
        """A tensor, a tuple or list with tensors in it, or a copy that lies on disk. Raises OSError
        if the disk has no room."""
        if isinstance(value, (tuple, list)):
            return type(value)(map(self.keep, value))
        return self._keep(value) if isinstance(value, Tensor) else value

    def _keep(self, tensor: Tensor) -> Any:
        tensor = tensor.cpu()
        if self.folder is None or tensor.nbytes < mmap.PAGESIZE:
            return tensor
        for earlier in list(self._maps):
            # Pages that were read since: reading brings them back.
            earlier.madvise(mmap.MADV_DONTNEED)
        with tempfile.TemporaryFile(dir=self.folder) as file:
            # Reserved beforehand: a mapped page that finds no room when written ends the process.
            os.posix_fallocate(file.fileno(), 0, tensor.nbytes)
            mapped = mmap.mmap(file.fileno(), tensor.nbytes)
        self._maps.add(mapped)
        kept = torch.frombuffer(mapped, dtype=tensor.dtype).view(tensor.shape)
        kept.copy_(tensor)
        mapped.madvise(mmap.MADV_DONTNEED)
        return kept
