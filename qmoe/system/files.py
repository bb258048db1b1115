"""Writing one safetensors file so that it is either whole or absent, and JSON."""

import errno
import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

CONTENT = "content_sha256"  # in the metadata of a file: of its tensors
FULL = ("No space", "File too large", "quota")


def sha256(path: Path) -> str:
    """Of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sort_metadata(path: Path) -> None:
    """Put the keys of a file's metadata in order: safetensors writes them in any, and equal runs
    are to write equal bytes."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        made = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(made) <= length, "safetensors writes its header in another form"
        file.seek(8)
        file.write(made.ljust(length))


def write_json(path: Path, value: Any) -> None:
    """A JSON file as people read it."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def content_sha256(tensors: dict[str, Tensor]) -> str:
    """Of the names, dtypes, shapes and bytes of contiguous tensors, in the order given."""
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write_safetensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write under a temporary name, flush to disk, rename.

    Raises OSError, with errno ENOSPC if there is no room (safetensors has an error of its own).
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # by the umask; safetensors lets nobody else read
        save_file(tensors, temporary, metadata=metadata)
        _sort_metadata(temporary)
        temporary.chmod(mode)
        with temporary.open("rb") as handle:
            os.fsync(handle.fileno())
        temporary.rename(path)
    except SafetensorError as error:
        full = any(word in str(error) for word in FULL)
        raise OSError(errno.ENOSPC if full else errno.EIO, f"{path}: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def to_json(result: Any) -> str:
    """A result as JSON, which has no word for infinite numbers: null stands for them."""
    return json.dumps(_finite(result), indent=2, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
