"""The packed matrices of one experts module (or of one linear) in one flat buffer on one device.

An expert is one contiguous range: the byte planes of its matrices (layout.py), then their scales
and zero points. So it is moved between memories with one copy (hosted/residency.py), and experts of
different widths lie side by side. `table` says where each matrix is.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int32, UInt8
from torch import Tensor, nn

from qmoe.format.quantized import Quantized
from qmoe.kernels.device.target import Order
from qmoe.kernels.layout import (
    matrix_bytes,
    pack,
    padded_rows,
    pair_rows,
    tail_subtiles,
    unpack,
)

ALIGN = 128
BITS, WEIGHTS, SCALES, ZEROS = range(4)


@dataclass(frozen=True)
class Matrix:
    """What all experts of one matrix share.

    n, k: logical size. rows: of the arena, before padding (paired rows count their own padding).
    bits: 0 if the experts' widths differ. group: 32, 64, 128, or 0 for one scale per row. zero:
    with zero points. paired: gate and up rows alternate by eights.
    """

    n: int
    k: int
    rows: int
    bits: int
    group: int
    zero: bool
    paired: bool

    @property
    def tail(self) -> int:
        return tail_subtiles(self.k)

    @property
    def scale_stride(self) -> int:
        return padded_rows(self.rows)

    @property
    def groups(self) -> int:
        return self.k // self.group if self.group else 1

    def weight_bytes(self, bits: int) -> int:
        return matrix_bytes(self.rows, self.k, bits)


@dataclass(frozen=True)
class Arena:
    """buffer (bytes): every expert's range. table (matrices, E, 4): bits, then the offsets of
    planes, scales and zero points in units of 128 bytes. dtype: of scales and activations."""

    matrices: tuple[Matrix, ...]
    buffer: UInt8[Tensor, " B"]
    table: Int32[Tensor, "matrices E 4"]
    order: Order
    dtype: torch.dtype

    @property
    def experts(self) -> int:
        return int(self.table.shape[1])

    def expert_range(self, e: int) -> tuple[int, int]:
        """First byte and length of an expert. The same length for all experts of equal widths."""
        start = int(self.table[0, e, WEIGHTS]) * ALIGN
        bits = [int(b) for b in self.table[:, e, BITS]]
        return start, expert_bytes(self.matrices, bits, self.dtype)

    def ranges(self) -> list[tuple[int, int]]:
        """`expert_range` of every expert."""
        return [self.expert_range(e) for e in range(self.experts)]

    def nbytes(self) -> int:
        return int(self.buffer.nbytes + self.table.nbytes)

    def __str__(self) -> str:
        sizes = ", ".join(f"{m.n}x{m.k} int{m.bits or '*'}" for m in self.matrices)
        return f"{self.experts} experts of {sizes}"


def build_arena(
    stacks: Sequence[Sequence[Quantized]],
    dtype: torch.dtype,
    order: Order,
    device: torch.device,
    paired: bool,
) -> Arena:
    """Pack matrices for the kernels: stacks[j][e] is matrix j of expert e, a stack with E = 1.

    dtype: of activations and scales. paired: the first matrix is gate over up [2I, K]. Packing runs
    on `device`, an expert at a time. Raises ValueError if experts disagree in anything but bits.
    """
    matrices = [_describe(stack, paired and j == 0) for j, stack in enumerate(stacks)]
    E = len(stacks[0])
    bits = [[stack[e].scheme.bits for stack in stacks] for e in range(E)]
    sizes = [expert_bytes(matrices, b, dtype) for b in bits]
    buffer = torch.zeros(sum(sizes), dtype=torch.uint8, device=device)
    table = torch.zeros(len(stacks), E, 4, dtype=torch.int32)
    start = 0
    for e in range(E):
        places = expert_layout(matrices, bits[e], dtype)
        for j, (matrix, stack) in enumerate(zip(matrices, stacks, strict=True)):
            planes, scales, zeros = _pack_matrix(matrix, stack[e], dtype, order, device)
            for column, data in ((WEIGHTS, planes), (SCALES, scales), (ZEROS, zeros)):
                at = start + places[j][column - 1]
                table[j, e, column] = at // ALIGN
                buffer[at : at + len(data)] = data
            table[j, e, BITS] = bits[e][j]
        start += sizes[e]
    return Arena(tuple(matrices), buffer, table.to(device), order, dtype)


def expert_layout(
    matrices: Sequence[Matrix], bits: Sequence[int], dtype: torch.dtype
) -> list[tuple[int, int, int]]:
    """Per matrix the offsets of planes, scales and zero points inside an expert, in bytes."""
    weights, at = [], 0
    for matrix, width in zip(matrices, bits, strict=True):
        weights.append(at)
        at += _aligned(matrix.weight_bytes(width))
    places = []
    for matrix, start in zip(matrices, weights, strict=True):
        values = matrix.groups * matrix.scale_stride
        scales = at
        at += _aligned(values * dtype.itemsize)
        places.append((start, scales, at))
        at += _aligned(values) if matrix.zero else 0
    return places


def expert_bytes(matrices: Sequence[Matrix], bits: Sequence[int], dtype: torch.dtype) -> int:
    """Length of an expert's range."""
    _, _, end = expert_layout(matrices, bits, dtype)[-1]
    last = matrices[-1]
    return end + (_aligned(last.groups * last.scale_stride) if last.zero else 0)


def expand(arena: Arena, j: int, e: int) -> Tensor:
    """Matrix j of expert e in floating point [N, K], in torch: for checks, not for speed."""
    matrix = arena.matrices[j]
    bits, *offsets = (int(v) for v in arena.table[j, e])
    weights, scales, zeros = (o * ALIGN for o in offsets)
    planes = arena.buffer[weights : weights + matrix.weight_bytes(bits)]
    q = unpack(planes, bits, matrix.rows, matrix.k, arena.order).float()
    values = (matrix.groups, matrix.scale_stride)
    count = values[0] * values[1]
    scale = arena.buffer[scales : scales + count * arena.dtype.itemsize].view(arena.dtype)
    scale = scale.view(values).T[: matrix.rows].float()
    q = q.unflatten(1, (matrix.groups, -1))
    if matrix.zero:
        zero = arena.buffer[zeros : zeros + count].view(values).T[: matrix.rows].float()
        q = q - (zero - (1 << (bits - 1)))[..., None]
    weight: Tensor = (q * scale[..., None]).flatten(1)
    if not matrix.paired:
        return weight
    rows = pair_rows(matrix.n).to(weight.device)
    ordered = torch.empty(matrix.n, matrix.k, device=weight.device)
    ordered[rows[rows >= 0]] = weight[rows >= 0]
    return ordered


def _aligned(size: int) -> int:
    return -(-size // ALIGN) * ALIGN


def _describe(stack: Sequence[Quantized], paired: bool) -> Matrix:
    shapes = {tuple(s.q.shape[1:]) for s in stack}
    groups = {s.scale.shape[-1] for s in stack}
    if len(shapes) > 1 or len(groups) > 1:
        raise ValueError(
            f"experts of one arena need one shape and one group size, got shapes {sorted(shapes)} "
            f"and {sorted(groups)} groups along K"
        )
    n, k = shapes.pop()
    count = groups.pop()
    group = 0 if count == 1 else k // count
    if group and (group * count != k or group not in (32, 64, 128)):
        raise ValueError(f"{count} groups along K = {k}: the kernels take groups of 32, 64 or 128")
    widths = {s.scheme.bits for s in stack}
    rows = len(pair_rows(n)) if paired else n
    zero = any(s.zero is not None for s in stack)
    return Matrix(n, k, rows, widths.pop() if len(widths) == 1 else 0, group, zero, paired)


def _pack_matrix(
    matrix: Matrix, stored: Quantized, dtype: torch.dtype, order: Order, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Byte planes, scales [G, rows] and zero points [G, rows] of one expert, as bytes."""
    bits, half = stored.scheme.bits, 1 << (stored.scheme.bits - 1)
    q = stored.q[0].to(device)
    scale = stored.scale[0].to(device, dtype)
    zero = torch.zeros_like(scale, dtype=torch.int8)
    if stored.zero is not None:
        zero = stored.zero[0].to(device)
    if matrix.zero and bits == 8:
        # The bfloat16 unpack needs zero points below 0: mirror the other groups, w = (-s)(~q - ~z).
        flip = zero >= 0
        zero = torch.where(flip, ~zero, zero)
        scale = torch.where(flip, -scale, scale)
        q = torch.where(flip.repeat_interleave(q.shape[1] // flip.shape[1], 1), ~q, q)
    if matrix.paired:
        rows = pair_rows(matrix.n).to(device)
        q, scale, zero = (_take_rows(t, rows) for t in (q, scale, zero))
    planes = pack(q, bits, order)
    scales = _pad_rows(scale, matrix.scale_stride).T.contiguous().view(torch.uint8).flatten()
    zeros = _pad_rows((zero.to(torch.int16) + half).to(torch.uint8), matrix.scale_stride)
    return planes, scales, zeros.T.contiguous().flatten() if matrix.zero else planes[:0]


def _take_rows(tensor: Tensor, rows: Tensor) -> Tensor:
    """Rows of a matrix by index; -1 gives zeros."""
    taken = tensor[rows.clamp(min=0)]
    taken[rows < 0] = 0
    return taken


def _pad_rows(tensor: Tensor, rows: int) -> Tensor:
    return nn.functional.pad(tensor, (0, 0, 0, rows - len(tensor)))
