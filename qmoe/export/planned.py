"""How each tensor of a GGUF is stored, and its bytes.

A packed tensor takes the smallest block type that has exactly its weights, all its experts the
same. What is not packed stays as it is stored, but for what llama.cpp wants in float32: vectors and
routers.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import gguf
import numpy as np
import torch
from torch import Tensor

from qmoe.checkpoint.reader import Checkpoint
from qmoe.errors import AuditError, ConfigError, UnsupportedModelError
from qmoe.export.block_types import BLOCK_TYPES, BlockType, Bytes
from qmoe.export.grid import Grid, grid_of, near_enough, refitted
from qmoe.export.tensors import Entry, read_quantized

KIND = gguf.GGMLQuantizationType
PLAIN = {torch.float32: KIND.F32, torch.bfloat16: KIND.BF16, torch.float16: KIND.F16}


@dataclass(frozen=True)
class Planned:
    """shape: [N], [N, K] or [P, N, K]. moved: scales that float16 does not have and that become the
    nearest it has; off: by which share at most."""

    entry: Entry
    kind: gguf.GGMLQuantizationType
    shape: tuple[int, ...]
    moved: int = 0
    off: float = 0.0

    @property
    def nbytes(self) -> int:
        block, size = gguf.GGML_QUANT_SIZES[self.kind]
        return int(np.prod(self.shape)) // block * size


def planned(checkpoint: Checkpoint, entry: Entry) -> Planned:
    """Choose how a tensor is stored. UnsupportedModelError for rotated weights, ConfigError for
    those that no block type holds."""
    if entry.scheme is None or entry.transposed:
        tensor = _whole(checkpoint, entry)
        in_float32 = (
            entry.scheme is not None
            or tensor.dim() == 1
            or entry.name.endswith(".bias")
            or "ffn_gate_inp" in entry.name
        )
        kind = KIND.F32 if in_float32 else PLAIN[tensor.dtype]
        return Planned(entry, kind, tuple(tensor.shape))
    if entry.scheme.rotation:
        raise UnsupportedModelError(
            f"{checkpoint.path}: its weights are rotated, so their inputs have to be rotated at "
            "run time, which llama.cpp does not do; quantize with --rotate fused or off"
        )
    kept, moved, off, count = list(BLOCK_TYPES), 0, 0.0, 0
    for grid in _grids(checkpoint, entry):
        grid, here, most = refitted(grid)
        moved, off, count = moved + here, max(off, most), count + 1
        if not near_enough(off):
            raise ConfigError(
                f"{entry.stored[0]}: llama.cpp's block types have scales in float16, in which one "
                f"of this tensor would be off by {off:.1%}; quantize again with --target "
                "llama.cpp, which keeps scales within float16"
            )
        kept = [kind for kind in kept if kind.holds(grid)]
    if not kept:
        raise ConfigError(
            f"{entry.stored[0]}: no block type of llama.cpp holds {entry.scheme}; quantize again "
            "with 8 bits and no zero points, or with 4 bits or less"
        )
    stacked = len(entry.stored) > 1 or (entry.rows is not None and entry.rows.dim() == 2)
    shape = (count, *grid.step.shape) if stacked else grid.step.shape
    return Planned(entry, gguf.GGMLQuantizationType[kept[0].name], shape, moved, off)


def parts(checkpoint: Checkpoint, plan: Planned) -> Iterator[np.ndarray]:
    """The bytes of a tensor, [N, *] of one matrix after the other. AuditError if the `gguf` package
    decodes them to other weights than the checkpoint's."""
    entry = plan.entry
    if entry.scheme is None or entry.transposed:
        tensor = _whole(checkpoint, entry)
        if plan.kind == KIND.F32:
            tensor = tensor.float()
        yield tensor.contiguous().view(torch.uint8).numpy()
        return
    kind = next(kind for kind in BLOCK_TYPES if kind.name == plan.kind.name)
    for grid in _grids(checkpoint, entry):
        yield checked(refitted(grid)[0], kind, entry.stored[0])


def checked(grid: Grid, kind: BlockType, name: str) -> Bytes:
    """A grid's bytes, which are decoded again and compared; AuditError if that fails."""
    made = kind.encode(grid)
    if not np.array_equal(
        gguf.quants.dequantize(made, gguf.GGMLQuantizationType[kind.name]), grid.weight()
    ):
        raise AuditError(
            f"{name}: as {kind.name} it decodes to other weights; this is a bug of qmoe"
        )
    return made


def _grids(checkpoint: Checkpoint, entry: Entry) -> Iterator[Grid]:
    """The matrices of a packed tensor, one after the other."""
    assert entry.scheme is not None
    for name in entry.stored:
        whole = read_quantized(checkpoint, name, entry.scheme)
        checkpoint.release()
        for rows in _row_sets(entry):
            if rows is None:
                yield grid_of(whole, 0)
                continue
            zero = None if whole.zero is None else whole.zero[:, rows]
            q, scale = whole.q[:, rows], whole.scale[:, rows]
            yield grid_of(replace(whole, q=q, scale=scale, zero=zero), 0)


def _row_sets(entry: Entry) -> list[Tensor | None]:
    if entry.rows is None:
        return [None]
    return [entry.rows] if entry.rows.dim() == 1 else list(entry.rows)


def _whole(checkpoint: Checkpoint, entry: Entry) -> Tensor:
    """A tensor that has no block type: as it is stored, or in float32 what its grid stands for."""
    (name,) = entry.stored
    if entry.scheme is None:
        tensor = checkpoint.tensor(name)
    else:
        tensor = torch.from_numpy(
            grid_of(read_quantized(checkpoint, name, entry.scheme), 0).weight()
        )
    if entry.rows is not None:
        last = entry.name.endswith(".bias")  # of a bias [E, N], the rows of a matrix are values
        tensor = tensor[..., entry.rows] if last else tensor[entry.rows]
    return tensor.mT if entry.transposed else tensor
