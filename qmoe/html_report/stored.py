"""What the files of a quantized folder hold, read from their headers: bits of every expert, bytes
of every layer, and every tensor that is not packed."""

import re
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import safe_open

from qmoe.checkpoint.folders import weight_files

EXPERT = re.compile(r"^(.*\bexperts)\.(?:expert_)?(\d+)\.")  # as in the folder's config.json
PACKED, PARTS = ".weight_packed", (".weight_packed", ".weight_scale", ".weight_zero_point")
SIZES = {"F32": 4, "F64": 8, "I32": 4, "I64": 8, "BF16": 2, "F16": 2, "I8": 1, "U8": 1, "BOOL": 1}


@dataclass
class Shard:
    """A file: one layer, or all that is outside of the layers.

    widths: by experts module and expert, the bits of its integers (of its widest matrix).
    packed: bytes of integers, scales and zero points. weights: numbers that these stand for.
    unpacked: bytes of all other tensors, by name.
    """

    file: str
    widths: dict[str, dict[int, int]] = field(default_factory=lambda: defaultdict(dict))
    packed: int = 0
    weights: int = 0
    unpacked: dict[str, int] = field(default_factory=dict)

    @property
    def bits(self) -> float | None:
        """Bits of a packed weight, scales and zero points included; None if none is packed."""
        return 8 * self.packed / self.weights if self.weights else None


def read_stored(folder: Path) -> list[Shard]:
    """One record per file of weights, in order. CheckpointError if there are none."""
    return [_shard(folder, file) for file in weight_files(folder)]


def _shard(folder: Path, file: str) -> Shard:
    shard = Shard(file)
    with safe_open(folder / file, framework="pt") as tensors:
        names = sorted(tensors.keys())
        for name in names:
            place = tensors.get_slice(name)
            nbytes = SIZES.get(place.get_dtype(), 1)
            for length in place.get_shape():
                nbytes *= length
            owner = name.rpartition(".")[0]
            if f"{owner}{PACKED}" not in tensors.keys():  # noqa: SIM118
                shard.unpacked[name] = nbytes
            elif name.endswith(PARTS):
                shard.packed += nbytes
            if name.endswith(PACKED):
                shape = tensors.get_tensor(f"{owner}.weight_shape").tolist()
                shard.weights += shape[0] * shape[1]
                if found := EXPERT.match(name):
                    width = 32 * place.get_shape()[1] // shape[1]
                    widths = shard.widths[found[1]]
                    widths[int(found[2])] = max(width, widths.get(int(found[2]), 0))
    return shard
