"""Writing one safetensors file so that it is either whole or absent."""

import errno
import os
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

FULL = ("No space", "File too large", "quota")


def write_safetensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write under a temporary name, flush to disk, rename.

    Raises OSError, with errno ENOSPC if there is no room (safetensors has an error of its own).
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        save_file(tensors, temporary, metadata=metadata)
        with temporary.open("rb") as handle:
            os.fsync(handle.fileno())
        temporary.rename(path)
    except SafetensorError as error:
        full = any(word in str(error) for word in FULL)
        raise OSError(errno.ENOSPC if full else errno.EIO, f"{path}: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)
