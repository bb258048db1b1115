"""What quantized weights take in memory, in the layouts that the kernels read.

On a GPU and on a CPU rows and columns are padded to whole tiles, each in its own way, and zero
points take a byte each. So this is a little more than what the files take (sizes.py).
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from qmoe.config import QuantConfig
from qmoe.kernels.cpu.layout import ROWS, STEP, arrange
from qmoe.model.source import Source
from qmoe.plan.sizes import Stack, unquantized

if TYPE_CHECKING:
    from qmoe.kernels.arena import Matrix

CPU_ROW = 6 * 8  # bytes of a matrix in the table of the CPU kernels
GPU_ROW = 4 * 4  # and in that of the GPU kernels


@dataclass(frozen=True)
class Packed:
    """The matrices of one module: an experts module, or a linear (one expert).

    layer: the decoder layer it is in, empty for lm_head.
    integers, scales: bytes of one expert, zero points counted with the scales. table: bytes that
    the kernels' table of all experts takes. unpacked: most bytes that its integers take while the
    module is loaded, unpacked to one byte each. on_cpu: bytes of one expert in the layout of the
    CPU's kernels.
    """

    name: str
    layer: str
    routed: bool
    experts: int
    integers: int
    scales: int
    table: int
    unpacked: int
    on_cpu: int = 0

    @property
    def expert(self) -> int:
        """Bytes of one expert."""
        return self.integers + self.scales

    @property
    def nbytes(self) -> int:
        return self.experts * self.expert + self.table


@dataclass(frozen=True)
class Weights:
    """packed: modules in decoder layers whose weights are quantized. head: the quantized lm_head.
    embeddings, lm_head (0 if it is the embedding, or quantized), other: bytes of what stays as it
    is. in_layers: of `other`, those in decoder layers."""

    packed: list[Packed]
    head: Packed | None
    embeddings: int
    lm_head: int
    other: int
    in_layers: int

    @property
    def routed(self) -> list[Packed]:
        return [module for module in self.packed if module.routed]

    @property
    def dense(self) -> list[Packed]:
        return [module for module in self.packed if not module.routed]

    @property
    def read_whole(self) -> int:
        """Bytes that every token reads: of decoder layers all but routed experts, and the output
        projection, which is the embedding if it is tied."""
        head = (self.lm_head or self.embeddings) if self.head is None else self.head.nbytes
        return sum(module.nbytes for module in self.dense) + head + self.in_layers

    def loading(self) -> int:
        """The most bytes that a layer takes, besides what stays of it, while it is loaded: its
        tensors as stored, and unpacked."""
        layers: dict[str, int] = defaultdict(int)
        for module in self.packed:
            layers[module.layer] += module.nbytes + module.unpacked
        return max(layers.values())


def in_memory(source: Source, config: QuantConfig, parts: Sequence[Stack], gpu: bool) -> Weights:
    """The weights of the model quantized by `config`, without a layer that predicts tokens beyond
    the next, which is not loaded. parts: what `stacks` (sizes.py) found. gpu:
    in the layout of the GPU's kernels, or in that of the CPU's."""
    dtype = source.weight_dtype()
    modules: dict[str, list[Stack]] = {}
    for part in parts:
        if not source.predicts(part.layer):
            modules.setdefault(part.module, []).append(part)
    packed = [_packed(together, dtype, gpu) for together in modules.values()]
    rest = unquantized(source, config, parts)
    return Weights(
        [module for module in packed if module.layer],
        next((module for module in packed if not module.layer), None),
        rest.embeddings,
        rest.lm_head,
        rest.other,
        rest.in_layers,
    )


def _packed(parts: Sequence[Stack], dtype: torch.dtype, gpu: bool) -> Packed:
    E = parts[0].shape[0]
    measured = [*(_on_gpu if gpu else _on_cpu)(parts, dtype)]
    sizes = [E * N * K for _, N, K in (part.shape for part in parts)]
    return Packed(
        name=parts[0].module,
        layer=parts[0].layer,
        routed=parts[0].routed,
        experts=E,
        integers=measured[0],
        scales=measured[1],
        table=E * len(parts) * (GPU_ROW if gpu else CPU_ROW),
        unpacked=sum(sizes) + max(sizes),
        on_cpu=sum(_on_cpu(parts, dtype)) + len(parts) * CPU_ROW,
    )


def _paired(parts: Sequence[Stack]) -> bool:
    """Whether gate and up rows take turns, so that the activation is computed with the product."""
    return len(parts) > 1 and parts[0].matrices > 1 and not parts[0].scheme.rotation


def _on_gpu(parts: Sequence[Stack], dtype: torch.dtype) -> tuple[int, int]:
    """Bytes of an expert's integers and of its scales (kernels/arena.py)."""
    # Here, because only machines that have Triton can import the layout of its kernels.
    from qmoe.kernels.arena import expert_bytes

    matrices = gpu_matrices(parts)
    bits = [part.scheme.bits for part in parts]
    integers = sum(m.weight_bytes(b) for m, b in zip(matrices, bits, strict=True))
    return integers, expert_bytes(matrices, bits, dtype) - integers


def gpu_matrices(parts: Sequence[Stack]) -> "list[Matrix]":
    """The matrices of one module as the kernels of GPUs lay them out."""
    from qmoe.kernels.arena import Matrix
    from qmoe.kernels.layout import pair_rows

    matrices = []
    for i, part in enumerate(parts):
        (_, N, K), groups = part.shape, part.scheme.groups(part.shape[2])
        rows = len(pair_rows(N)) if i == 0 and _paired(parts) else N
        group, zero = (0 if groups == 1 else K // groups), not part.scheme.symmetric
        matrices.append(Matrix(N, K, rows, part.scheme.bits, group, zero, rows != N))
    return matrices


def expert_sizes(parts: Sequence[Stack], dtype: torch.dtype) -> list[int]:
    """Bytes of each expert of a module in the layout of the GPU's kernels, whatever its widths."""
    from qmoe.kernels.arena import expert_bytes

    matrices = gpu_matrices(parts)
    each = zip(*(part.each_width() for part in parts), strict=True)
    return [expert_bytes(matrices, bits, dtype) for bits in each]


def _on_cpu(parts: Sequence[Stack], dtype: torch.dtype) -> tuple[int, int]:
    """Bytes of an expert's integers and of its scales (kernels/cpu/layout.py)."""
    integers = total = 0
    for i, part in enumerate(parts):
        (_, N, K), scheme = part.shape, part.scheme
        kind = (scheme.bits, scheme.groups(K), not scheme.symmetric)
        shape, _, size = arrange([kind], N, K, dtype, i == 0 and _paired(parts))
        blocks = shape.parts * -(-(N // shape.parts) // ROWS)
        integers += blocks * ROWS * shape.steps * STEP * scheme.bits // 8
        total += size
    return integers, total - integers
