"""Writing a model folder so that it is either whole or absent."""

import errno
import json
import os
import shutil
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from qmoe.checkpoint import INDEX, SINGLE
from qmoe.errors import OutputError

MARKER = ".qmoe-partial"  # holds the process id of the run that is writing
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".msgpack", ".h5", ".onnx")


def check_destination(dst: Path, needed: int) -> None:
    """Refuse a destination that exists, cannot be made, or has less than `needed` bytes free."""
    if os.path.lexists(dst):
        raise OutputError(f"{dst}: already exists; remove it or choose another destination")
    parent = dst.parent
    if not parent.is_dir():
        raise OutputError(f"{dst}: its parent folder {parent} does not exist")
    if not os.access(parent, os.W_OK):
        raise OutputError(f"{dst}: no permission to write in {parent}")
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise OutputError(
            f"{dst}: needs about {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free on this disk"
        )


class OutputFolder:
    """A folder under a temporary name beside `dst`, renamed to it when the `with` block ends well
    and removed when it does not. A leftover of a killed run has the same name and is replaced."""

    def __init__(self, dst: Path, shards: int):
        self.dst, self.shards = dst, shards
        self.path = dst.with_name(dst.name + ".partial")
        self._weight_map: dict[str, str] = {}
        self._bytes = 0

    def __enter__(self) -> "OutputFolder":
        try:
            self._remove_leftover()
            self.path.mkdir()
            (self.path / MARKER).write_text(str(os.getpid()))
        except OSError as error:
            raise OutputError(f"{self.dst}: cannot write beside it: {error}") from error
        return self

    def _remove_leftover(self) -> None:
        """Remove what a killed run of ours left; refuse anything else under that name."""
        if not os.path.lexists(self.path):
            return
        marker = self.path / MARKER
        if not marker.is_file():
            raise OutputError(f"{self.path}: is in the way and not a leftover of qmoe; move it")
        pid = marker.read_text().strip()
        if pid.isdigit() and int(pid) != os.getpid() and psutil.pid_exists(int(pid)):
            raise OutputError(f"{self.path}: process {pid} is writing it; wait or end that first")
        shutil.rmtree(self.path)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        if kind is None:
            (self.path / MARKER).unlink()
            self.path.rename(self.dst)
            return
        shutil.rmtree(self.path, ignore_errors=True)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise OutputError(f"{self.dst}: the disk is full; nothing was left behind") from error

    def write_shard(self, i: int, tensors: dict[str, Tensor]) -> None:
        """Write shard i (0-based) of the model."""
        file = f"model-{i + 1:05d}-of-{self.shards:05d}.safetensors" if self.shards > 1 else SINGLE
        whole = {name: tensor.contiguous() for name, tensor in sorted(tensors.items())}
        try:
            save_file(whole, self.path / file, metadata={"format": "pt"})
            with (self.path / file).open("rb") as handle:
                os.fsync(handle.fileno())
        except SafetensorError as error:
            if any(word in str(error) for word in ("No space", "File too large", "os error 28")):
                raise OSError(errno.ENOSPC, str(error)) from error
            raise OutputError(f"{self.dst}: writing {file} failed: {error}") from error
        self._weight_map |= dict.fromkeys(whole, file)
        self._bytes += sum(tensor.nbytes for tensor in whole.values())

    def write_json(self, name: str, value: dict[str, Any]) -> None:
        text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
        (self.path / name).write_text(text, encoding="utf-8")

    def write_index(self) -> None:
        if self.shards > 1:
            size = {"total_size": self._bytes}
            self.write_json(
                INDEX, {"metadata": size, "weight_map": dict(sorted(self._weight_map.items()))}
            )

    def copy_companions(self, source: Path) -> None:
        """Tokenizer, generation config, chat template, model code: every file without weights."""
        for file in sorted(source.iterdir()):
            skip = file.name in ("config.json", INDEX) or file.suffix in WEIGHTS
            if file.is_file() and not skip and not file.name.startswith("."):
                shutil.copyfile(file, self.path / file.name)
