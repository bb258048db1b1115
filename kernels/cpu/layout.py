"""The layout of the CPU kernels: blocks of 16 rows, interleaved along K. csrc/qmoe_cpu.h has it
in full.

The matrices of all experts lie in one buffer, each with its own bits, groups and zero points; a
table says where and what they are. Every instruction set reads the same layout.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd

import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from qmoe.config import CHANNEL, Scheme
from qmoe.format.packing import StoredWords, packed_words
from qmoe.format.quantized import Quantized
from qmoe.kernels.cpu.library import SourceStruct, StackStruct, write

VERSION = 1  # of the layout; kept in cache files
ROWS, STEP, ALIGN = 16, 32, 64
FIELDS = 6  # of a matrix in the table
DATA, BLOCK, ZEROS, CODES, BITS, GROUPS = range(FIELDS)
TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


@dataclass(frozen=True)
class Shape:
    """What all matrices of a stack share.

    n, k: logical size. piece: columns that are padded to whole steps of 32 (every group is made of
    whole pieces). paired: gate rows and up rows take turns in blocks of 16. dtype: of the scales.
    offset: the zero point that all codes share, 0 if they do not.
    """

    n: int
    k: int
    piece: int
    paired: bool
    dtype: torch.dtype
    offset: int

    def numbers(self) -> list[int]:
        """As the C code takes them: n, k, piece, paired, scale type, offset."""
        return [self.n, self.k, self.piece, int(self.paired), TYPES[self.dtype], self.offset]

    @property
    def steps(self) -> int:
        return self.k // self.piece * -(-self.piece // STEP)

    @property
    def parts(self) -> int:
        return 2 if self.paired else 1


@dataclass(frozen=True)
class Packed:
    """A stack in the kernels' layout.

    table [E, 6]: of each matrix the first byte in the buffer; of its blocks the bytes and where
    zero points (0: none) and codes start; bits; groups.
    """

    shape: Shape
    buffer: UInt8[Tensor, " B"]
    table: Int64[Tensor, "E 6"]


def pack(
    stacks: Sequence[Quantized | StoredWords], dtype: torch.dtype, paired: bool = False
) -> Packed:
    """Stacks of one or more matrices each, all [*, N, K], as one; scales are kept in `dtype`.

    ValueError if the matrices differ in size, or scales or zero points are not one per group.
    """
    n, k = _size(stacks[0])
    kinds = [
        (stack.scheme.bits, stack.scale.shape[-1], stack.zero is not None)
        for stack in stacks
        for _ in stack.scale
    ]
    shape, table, size = arrange(kinds, n, k, dtype, paired)
    buffer = torch.empty(size, dtype=torch.uint8)
    # Kept until they are written: the sources are pointers into these.
    kept = [_contiguous(stack, (n, k), dtype) for stack in stacks]
    sources = [source for tensors in kept for source in _sources(*tensors)]
    stack = StackStruct(buffer.data_ptr(), table.data_ptr(), None, len(table), *shape.numbers())
    write(stack, sources, torch.get_num_threads())
    return Packed(shape, buffer, table)


def _size(stack: Quantized | StoredWords) -> tuple[int, int]:
    """Rows and columns of a stack's matrices."""
    columns = stack.k if isinstance(stack, StoredWords) else stack.q.shape[-1]
    return stack.scale.shape[1], columns


def _contiguous(
    stack: Quantized | StoredWords, size: tuple[int, int], dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes (int8, or words), scales in `dtype` and zero points, all as C reads them."""
    codes = stack.words if isinstance(stack, StoredWords) else stack.q
    scale, zero, (e, n, groups) = stack.scale, stack.zero, stack.scale.shape
    columns = packed_words(size[1], stack.scheme.bits) if codes.dtype == torch.int32 else size[1]
    wrong = codes.shape != (e, n, columns) or _size(stack) != size or size[1] % groups
    if wrong or (zero is not None and zero.shape != scale.shape):
        raise ValueError(
            f"expected matrices {list(size)} with scales and zero points for each group, found "
            f"integers {list(codes.shape)}, scales {list(scale.shape)}, zero points "
            f"{None if zero is None else list(zero.shape)}"
        )
    zero = None if zero is None else zero.contiguous()
    return codes.contiguous(), scale.to(dtype).contiguous(), zero


def _sources(codes: Tensor, scale: Tensor, zero: Tensor | None) -> list[SourceStruct]:
    """Of each matrix of a stack."""
    row = codes.shape[2] * codes.itemsize
    return [
        SourceStruct(
            codes[e].data_ptr(), scale[e].data_ptr(), None if zero is None else zero[e].data_ptr(),
            row, codes.dtype == torch.int32,
        )
        for e in range(len(codes))
    ]  # fmt: skip


def arrange(
    kinds: Sequence[tuple[int, int, bool]], n: int, k: int, dtype: torch.dtype, paired: bool = False
) -> tuple[Shape, Int64[Tensor, "E 6"], int]:
    """Where everything lies, without the bytes: the shape, the table, and the buffer's size.

    kinds: of each matrix [n, k] its bits, its groups, and whether it has zero points.
    """
    piece = gcd(*(k // groups for _, groups, _ in kinds))
    offsets = {0 if zeros else 1 << (bits - 1) for bits, _, zeros in kinds}
    shape = Shape(n, k, piece, paired, dtype, offsets.pop() if len(offsets) == 1 else 0)
    rows, size = [], 0
    for bits, groups, zeros in kinds:
        scales = groups * ROWS * dtype.itemsize
        codes = -(-(scales + zeros * groups * ROWS) // ALIGN) * ALIGN
        block = codes + 64 * bits * shape.steps
        rows.append([size, block, scales * zeros, codes, bits, groups])
        size += block * _blocks(shape)
    return shape, torch.tensor(rows, dtype=torch.int64), size


def unpack(packed: Packed, e: int) -> Quantized:
    """Matrix e as it was packed, [1, N, K]; its scheme is not kept and is made anew."""
    row = [int(v) for v in packed.table[e]]
    shape, bits = packed.shape, row[BITS]
    blocks = _blocks_of(packed.buffer, row, shape)
    vectors = _spread(blocks[:, row[CODES] :].reshape(len(blocks), shape.steps, bits, 64), bits)
    rows = vectors.view(len(blocks), shape.steps, 8, ROWS, 4).permute(0, 3, 1, 2, 4)
    q = rows.reshape(-1, shape.k // shape.piece, shape.steps * STEP * shape.piece // shape.k)
    q = _in_order(q[..., : shape.piece].reshape(-1, shape.k), shape)
    size, half = row[GROUPS] * ROWS, 1 << (bits - 1)
    scale = blocks[:, : size * shape.dtype.itemsize].contiguous().view(shape.dtype)
    scale = _in_order(_rows_of(scale, row[GROUPS]), shape)
    zero = None
    if row[ZEROS]:
        zero = _in_order(_rows_of(blocks[:, row[ZEROS] : row[ZEROS] + size], row[GROUPS]), shape)
        zero = (zero.to(torch.int16) - half).to(torch.int8)[None]
    codes = (q.to(torch.int16) - half).to(torch.int8)
    return Quantized(codes[None], scale[None], zero, scheme_of(packed, e))


def scheme_of(packed: Packed, e: int) -> Scheme:
    """How matrix e is quantized. A rotation is not kept, and one group is one channel."""
    row = [int(v) for v in packed.table[e]]
    group = CHANNEL if row[GROUPS] == 1 else packed.shape.k // row[GROUPS]
    return Scheme(row[BITS], group, row[ZEROS] == 0)


def code_bytes(packed: Packed) -> int:
    """Bytes of the codes alone, padding included."""
    blocks = _blocks(packed.shape)
    return sum(64 * int(row[BITS]) * packed.shape.steps * blocks for row in packed.table)


def _blocks(shape: Shape) -> int:
    return shape.parts * -(-(shape.n // shape.parts) // ROWS)


def _blocks_of(buffer: Tensor, row: Sequence[int], shape: Shape) -> UInt8[Tensor, "b s"]:
    """The blocks of the matrix with this row of the table."""
    end = row[DATA] + row[BLOCK] * _blocks(shape)
    return buffer[row[DATA] : end].view(-1, row[BLOCK])


def _in_order(rows: Tensor, shape: Shape) -> Tensor:
    """[blocks * 16, *] to [N, *]: the padding is gone, gate rows come before up rows."""
    parts = rows.unflatten(0, (-1, shape.parts, ROWS)).transpose(0, 1).flatten(1, 2)
    made: Tensor = parts[:, : shape.n // shape.parts].flatten(0, 1).contiguous()
    return made


def _rows_of(columns: Tensor, groups: int) -> Tensor:
    """[blocks, G * 16] to [blocks * 16, G]."""
    made: Tensor = columns.unflatten(1, (groups, ROWS)).transpose(1, 2).flatten(0, 1).contiguous()
    return made


def _spread(packed: UInt8[Tensor, "b s bits 64"], bits: int) -> UInt8[Tensor, "b s 8 64"]:
    """Eight vectors of codes from `bits` vectors."""
    if bits == 8:
        return packed
    low = 4 if bits == 4 else 2
    shifts = torch.arange(0, 8, low, dtype=torch.uint8)[:, None]
    fields = packed[:, :, :low, None] >> shifts & ((1 << low) - 1)
    vectors = fields.flatten(2, 3)
    if bits != 3:
        return vectors
    places = torch.arange(8, dtype=torch.uint8)[:, None]
    return vectors | (packed[:, :, 2:3] >> places & 1) << 2
