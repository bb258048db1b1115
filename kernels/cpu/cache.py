"""Named tensors in one file that is mapped into memory: the CPU layout of a checkpoint, made once.

    16 bytes   "qmoe cpu layout\\n"
    8 bytes    length of the index
    32 bytes   SHA-256 of the index
    index      JSON: key, size of the file, tensors (name, dtype, shape, place); then the sums
    tensors    each from a multiple of 4096 on, with zeros up to the next one

The sums are one 64-bit integer for each page of 4096 bytes, the sum of its 512 words: reading them
again goes at the memory's speed, and no page can change, move or be missing unnoticed by accident.
Whoever can write the file can make any tensors pass, as with the checkpoint itself, so nothing that
steers memory access (layout.py's table) is kept in it.

The key says of what the tensors were made; a file with another key is as good as none.
"""

import hashlib
import json
import mmap
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from qmoe.errors import QmoeError
from qmoe.kernels.cpu.layout import VERSION
from qmoe.system.printing import say

MAGIC, PAGE = b"qmoe cpu layout\n", 4096
HEAD = len(MAGIC) + 8 + 32
TYPES = {str(t): t for t in (torch.uint8, torch.int64, torch.float32)}
Tensors = dict[str, Tensor]


class StaleCache(QmoeError):
    """A cache file that is missing, damaged, or of something else; the message says which."""


def cache_key(parts: list[str]) -> str:
    """Of the digests and settings that the tensors follow from, and the version of the layout."""
    return hashlib.sha256(json.dumps([VERSION, *parts]).encode()).hexdigest()


def cache_path(folder: Path, key: str) -> Path:
    """Beside the checkpoint if that folder can be written, else in the user's cache directory."""
    name = f"qmoe_cpu_{key[:16]}.cache"
    if os.access(folder, os.W_OK):
        return folder / name
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "qmoe" / name


def cached(path: Path, key: str, build: Callable[[], Tensors]) -> Tensors:
    """The tensors of the cache at `path`, or if it is not good those of `build`, which are then
    written there. One line on standard error says why a file that is there was not used, and that
    one could not be written; neither is an error."""
    try:
        return open_cache(path, key)
    except StaleCache as error:
        if path.exists():
            say(f"{error}; it is made again")
    tensors = build()
    try:
        write_cache(path, key, tensors)
    except OSError as error:
        say(f"{path}: {error.strerror}; the next load has to prepare the weights again")
        return tensors
    return open_cache(path, key)


def write_cache(path: Path, key: str, tensors: Mapping[str, Tensor]) -> None:
    """Write the file whole or not at all. OSError if it cannot be written."""
    pages = {name: _pages(tensor) for name, tensor in tensors.items()}
    sums = b"".join(_sums(of).numpy().tobytes() for of in pages.values())
    listed, place = [], 0
    for name, tensor in tensors.items():
        listed.append([name, str(tensor.dtype), list(tensor.shape), place])
        place += pages[name].nbytes
    # Places count from the first tensor, so that the index need not know its own length.
    head = json.dumps({"key": key, "size": place, "tensors": listed}).encode() + b"\n"
    index = head + sums
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, made = tempfile.mkstemp(prefix=path.name + ".", suffix=".partial", dir=path.parent)
    try:
        with open(handle, "wb") as file:
            file.write(MAGIC + len(index).to_bytes(8, "little") + hashlib.sha256(index).digest())
            file.write(index + bytes(-(HEAD + len(index)) % PAGE))
            for of in pages.values():
                file.write(of.reshape(-1).view(torch.uint8).numpy().data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(made, path)
    finally:
        Path(made).unlink(missing_ok=True)  # it is there still if something failed


def open_cache(path: Path, key: str) -> Tensors:
    """The tensors of a file, mapped: pages come from the file when they are used, and processes
    share them. Every page is read once, to compare its sum. Raises StaleCache."""
    try:
        with open(path, "rb") as file:
            listed, sums, start = _index(file, path, key)
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        tensors = {}
        for name, dtype, shape, place in listed:
            tensors[name], count = _tensor(data, TYPES[dtype], shape, start + place, sums)
            sums = sums[count:]
    except OSError as error:
        raise StaleCache(f"{path}: {error.strerror}") from error
    except _Changed as error:
        raise StaleCache(f"{path}: {name} has changed since it was written") from error
    except (IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise StaleCache(f"{path}: its index cannot be read ({error})") from error
    return tensors


class _Changed(Exception):
    """A page whose sum is another."""


def _tensor(
    data: mmap.mmap, dtype: torch.dtype, shape: list[int], place: int, sums: Tensor
) -> tuple[Tensor, int]:
    """A tensor at a place of the file, and how many pages it takes."""
    size = dtype.itemsize * torch.Size(shape).numel()
    count = -(-size // PAGE)
    if not count:
        return torch.empty(shape, dtype=dtype), 0
    whole = torch.frombuffer(data, dtype=torch.int64, offset=place, count=count * PAGE // 8)
    if not torch.equal(_sums(whole.view(-1, PAGE // 8)), sums[:count]):
        raise _Changed
    return whole.view(torch.uint8)[:size].view(dtype).view(shape), count


def _index(file: BinaryIO, path: Path, key: str) -> tuple[list[Any], Tensor, int]:
    """What is listed, the sums, and where the tensors start."""
    size, head = os.fstat(file.fileno()).st_size, file.read(HEAD)
    if len(head) < HEAD or not head.startswith(MAGIC):
        raise StaleCache(f"{path}: this is no cache of packed weights")
    length = int.from_bytes(head[len(MAGIC) :][:8], "little")
    if length > size:
        raise StaleCache(f"{path}: it is cut off")
    index = file.read(length)
    if hashlib.sha256(index).digest() != head[-32:]:
        raise StaleCache(f"{path}: its index has changed since it was written")
    found = json.loads(index[: index.index(b"\n")])
    if found["key"] != key:
        raise StaleCache(f"{path}: it was made of other weights or by another version")
    start = -(-(HEAD + length) // PAGE) * PAGE
    if start + found["size"] != size:
        raise StaleCache(f"{path}: expected {start + found['size']} bytes, found {size}")
    raw = index[index.index(b"\n") + 1 :]
    sums = torch.frombuffer(bytearray(raw), dtype=torch.int64) if raw else torch.empty(0).long()
    return found["tensors"], sums, start


def _pages(tensor: Tensor) -> Tensor:
    """The bytes of a tensor as words [pages, 512]; a copy only if the last page needs zeros."""
    raw = tensor.contiguous().reshape(-1).view(torch.uint8)
    if raw.numel() % PAGE:
        raw = torch.nn.functional.pad(raw, (0, -raw.numel() % PAGE))
    return raw.view(torch.int64).view(-1, PAGE // 8)


def _sums(pages: Tensor) -> Tensor:
    return pages.sum(1)
