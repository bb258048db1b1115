"""Reading a Hugging Face folder of safetensors lazily, and refusing a bad one before any work.

Left out: what else is in the folder (folders.py), what the tensors mean (model/structure.py) and
how they get into a model (model/skeleton.py).
"""

import hashlib
import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qmoe.checkpoint.decoding import Decoded, Made, decoded
from qmoe.checkpoint.folders import CONFIG, INDEX, read_index, read_json, weight_files
from qmoe.errors import CheckpointError
from qmoe.system.files import CONTENT, sha256
from qmoe.system.progress import progress

DTYPES = {
    "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


MAPPED = 1 << 28  # bytes read before files are unmapped


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor Inf. Read once and without a copy: `isfinite` makes
    several."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    low, high = (tensor if tensor.itemsize > 1 else tensor.float()).aminmax()
    return bool(low.isfinite() & high.isfinite())  # NaN goes through both


class Checkpoint:
    """The tensors of a model folder by name. Opening checks every shard's header; data is read
    only when asked for, from memory-mapped files."""

    def __init__(self, path: Path):
        self.path = path
        self.config = read_json(path / CONFIG)
        self._files = weight_files(path)
        self._handles: dict[str, Any] = {}
        self._where: dict[str, str] = {}
        for file in self._files:
            for name in self._handle(file).keys():  # noqa: SIM118
                if name in self._where:
                    raise CheckpointError(
                        f"{path}: {name!r} is in {self._where[name]} and in {file}; save the model "
                        "again (save_pretrained), or take the one that is not the model's out"
                    )
                self._where[name] = file
        self._check_index()
        self._decoded: dict[str, Decoded] = {}

    def decode(self) -> None:
        """Show tensors stored in a published 8- or 4-bit format as the 16-bit ones they stand for;
        CheckpointError for any other quantized checkpoint."""
        slices = {name: self.lazy(name) for name in self._where}
        encoding = self.config.get("quantization_config")
        self._decoded = decoded(encoding, str(self.path), slices, self._stored)

    def show(self, made: Made) -> None:
        """Show tensors in another form: `made` says of each new name which stored ones it is made
        of, and how (model/adapters.py). Those stay out of sight; names that are not all here change
        nothing. Raises CheckpointError where they do not have the shape for it."""
        for name, (parts, how) in made.items():
            if not all(part in self._where for part in parts):
                continue
            like = [torch.empty(self.lazy(p).get_shape(), device="meta") for p in parts]
            try:
                shape = tuple(how(*like).shape)
            except (RuntimeError, IndexError) as error:
                raise CheckpointError(
                    f"{self.path}: {parts[0]} has shape {tuple(like[0].shape)}, which is not what "
                    f"the model needs (by config.json): {error}"
                ) from error
            stored = self.lazy(parts[0]).get_dtype()
            compute = partial(self._made, parts, how)
            self._decoded[name] = Decoded(shape, parts, compute, stored, encoded=False)

    def _made(self, parts: tuple[str, ...], how: Callable[..., torch.Tensor]) -> torch.Tensor:
        return how(*map(self._stored, parts))

    def _open(self, file: str) -> Any:
        path = self.path / file
        if file not in os.listdir(self.path):  # not is_file, which fails on a name too long
            raise CheckpointError(f"{self.path}: shard {file} is named in {INDEX} but missing")
        try:
            return safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{path}: truncated or corrupt safetensors file ({error}); download it again"
            ) from error

    def _check_index(self) -> None:
        if not (self.path / INDEX).is_file():
            return
        for name, file in read_index(self.path).items():
            if self._where.get(name) != file:
                raise CheckpointError(
                    f"{self.path}: {INDEX} places {name!r} in {file}, it is not there"
                )

    def names(self) -> list[str]:
        hidden = {part for virtual in self._decoded.values() for part in virtual.parts}
        return [*(name for name in self._where if name not in hidden), *self._decoded]

    def lazy(self, name: str) -> Any:
        """A safetensors slice: shape and dtype now, data when indexed."""
        if name in self._decoded:
            return self._decoded[name]
        return self._handle(self._where[name]).get_slice(name)

    def _handle(self, file: str) -> Any:
        if file not in self._handles:
            self._handles[file] = self._open(file)
        return self._handles[file]

    def release(self) -> None:
        """Unmap the files, which are mapped again when asked for: what was read from them counts
        as this process's memory until then."""
        self._handles.clear()

    def tensor(self, name: str) -> torch.Tensor:
        if name in self._decoded:
            return self._decoded[name][...]
        return self._stored(name)

    def _stored(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = self._handle(self._where[name]).get_tensor(name)
        return tensor

    def files(self, names: list[str]) -> dict[Path, set[str]]:
        """The stored tensors that these are, or are made of, by the file they are in."""
        found: dict[Path, set[str]] = {}
        for name in names:
            for part in self._decoded[name].parts if name in self._decoded else (name,):
                found.setdefault(self.path / self._where[part], set()).add(part)
        return found

    def dtype(self, name: str) -> torch.dtype:
        """The stored dtype; CheckpointError for one that qmoe does not read."""
        stored = self.lazy(name).get_dtype()
        if stored not in DTYPES:
            raise CheckpointError(
                f"{self.path}: {name!r} is stored as {stored}; expected one of {', '.join(DTYPES)}"
            )
        return DTYPES[stored]

    def rank(self, name: str) -> int:
        """Number of dimensions."""
        return len(self.lazy(name).get_shape())

    def tensor_bytes(self, name: str) -> int:
        """Bytes of one tensor's data as stored, from the header alone."""
        virtual = self._decoded.get(name)
        if virtual is not None and virtual.encoded:
            parts = {n: self._handle(self._where[n]) for n in virtual.parts}
            shapes = [handle.get_slice(n).get_shape() for n, handle in parts.items()]
            return sum(torch.Size(shape).numel() for shape in shapes)  # a byte each, nearly
        return int(torch.Size(self.lazy(name).get_shape()).numel() * self.dtype(name).itemsize)

    def nbytes(self) -> int:
        """Bytes of the shard files."""
        return sum((self.path / file).stat().st_size for file in self._files)

    def fingerprints(self) -> list[str]:
        """What tells each shard from one with other contents: the digest of its tensors that qmoe
        writes into its header, with the file's size and time; of any other file the SHA-256."""
        found = []
        for file in self._files:
            digest = (self._handle(file).metadata() or {}).get(CONTENT)
            about = (self.path / file).stat()
            known = f"{digest} {about.st_size} {about.st_mtime_ns}"
            found.append(known if digest else sha256(self.path / file))
        return found

    def check_finite(self) -> str:
        """Read every tensor once; raises CheckpointError naming the first with NaN or Inf.

        Returns the SHA-256 of config.json and all tensors: which model this is.
        """
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        unmapped = 0
        for name in progress(sorted(self.names()), "checking weights"):
            tensor = self.tensor(name)
            unmapped += tensor.nbytes
            if unmapped > MAPPED:
                self.release()
                unmapped = 0
            if not is_finite(tensor):
                raise CheckpointError(f"{self.path}: tensor {name!r} holds NaN or Inf")
            digest.update(name.encode())
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()
