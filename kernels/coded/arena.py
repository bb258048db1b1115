"""The matrices in EXL3's codes of one experts module (or of one linear) in one flat buffer.

As in kernels/arena.py an expert is one contiguous range, which slots can hold, and `table` says
where each matrix is: its rate in half bits, then the offsets of codes, suh and svh in units of 128
bytes. Codes lie in the order in which the kernel takes them (device/coded.py):

    [K / 64] [N / 16] [4 tiles along K] [words of a tile]

so that what a program reads at once lies together. Tiles keep the bits that the checkpoint has.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Int32, UInt8
from torch import Tensor

from qmoe.format.exl3 import SIDE, Codebook
from qmoe.format.trellis import Codes, padded
from qmoe.kernels.arena import ALIGN, WEIGHTS

RATE = 0  # column of the table; WEIGHTS has the offset of codes
SUH, SVH = 2, 3
STEP = 4  # tiles along K that lie side by side


@dataclass(frozen=True)
class CodedMatrix:
    """What all experts of one matrix share: its size [n, k], the rates that occur, as a set of
    bits (bit r: r half bits a weight), and the codebook."""

    n: int
    k: int
    rates: int
    codebook: Codebook


@dataclass(frozen=True)
class CodedArena:
    """buffer (bytes): every expert's range. table: see above. first: how many of the matrices share
    the first product's input (gate and up: 2). dtype: of activations."""

    matrices: tuple[CodedMatrix, ...]
    first: int
    buffer: UInt8[Tensor, " B"]
    table: Int32[Tensor, "matrices E 4"]
    dtype: torch.dtype

    @property
    def experts(self) -> int:
        return int(self.table.shape[1])

    def ranges(self) -> list[tuple[int, int]]:
        """First byte and length of every expert."""
        table = self.table.tolist()
        starts = [table[0][e][WEIGHTS] * ALIGN for e in range(self.experts)]
        return [
            (start, _expert_bytes(self.matrices, [matrix[e][RATE] for matrix in table]))
            for e, start in enumerate(starts)
        ]

    def nbytes(self) -> int:
        return int(self.buffer.nbytes + self.table.nbytes)

    def __str__(self) -> str:
        sizes = ", ".join(f"{m.n}x{m.k} {m.codebook}" for m in self.matrices)
        return f"{self.experts} experts of {sizes}"


def build_coded_arena(
    matrices: Sequence[Sequence[Codes]], first: int, dtype: torch.dtype, device: torch.device
) -> CodedArena:
    """matrices[j][e]: matrix j of expert e, a stack with E = 1; rates may differ. Raises ValueError
    if experts disagree in anything else, or matrices of one product in the codebook."""
    kinds = tuple(_describe(stack) for stack in matrices)
    if len({m.codebook for m in kinds[:first]}) > 1:
        raise ValueError(f"gate and up of one module need one codebook, got {kinds[:first]}")
    rates = [[int(2 * stack[e].rate) for stack in matrices] for e in range(len(matrices[0]))]
    sizes = [_expert_bytes(kinds, each) for each in rates]
    buffer = torch.zeros(sum(sizes), dtype=torch.uint8, device=device)
    table = torch.zeros(len(matrices), len(sizes), 4, dtype=torch.int32)
    at = 0
    for e, size in enumerate(sizes):
        place = at
        for j, stack in enumerate(matrices):
            table[j, e, RATE] = rates[e][j]
            for column, part in enumerate(_parts(stack[e]), WEIGHTS):
                data = part.view(torch.uint8).flatten().to(device)
                table[j, e, column] = place // ALIGN
                buffer[place : place + len(data)] = data
                place += -(-len(data) // ALIGN) * ALIGN
        at += size
    return CodedArena(kinds, first, buffer, table.to(device), dtype)


def experts_of(codes: Codes) -> list[Codes]:
    """The matrices of a stack, each as a stack of its own."""
    parts = [[tensor[e, None] for tensor in codes.tensors()] for e in range(len(codes.trellis))]
    return [replace(codes, trellis=t, suh=suh, svh=svh) for t, suh, svh in parts]


def stored_codes(arena: CodedArena, j: int, e: int) -> Codes:
    """Matrix j of expert e as a checkpoint has it, in host memory: the inverse of packing."""
    matrix, (rate, *places) = arena.matrices[j], arena.table[j, e].tolist()
    N, K = padded(matrix.n), padded(matrix.k)
    counts = (N * K * rate // 16, 2 * K, 2 * N)
    found = [
        arena.buffer[place * ALIGN : place * ALIGN + count].cpu()
        for place, count in zip(places, counts, strict=True)
    ]
    words = found[0].view(torch.int16).view(-1, N // SIDE, STEP, 8 * rate)
    trellis = words.transpose(1, 2).reshape(1, K // SIDE, N // SIDE, 8 * rate)
    suh, svh = (scales.view(torch.float16)[None] for scales in found[1:])
    return Codes(trellis, suh, svh, matrix.codebook, matrix.n, matrix.k)


def _parts(codes: Codes) -> tuple[Tensor, Tensor, Tensor]:
    """Codes in the arena's order, suh and svh."""
    k, n, words = codes.trellis.shape[1:]
    ordered = codes.trellis[0].view(k // STEP, STEP, n, words).transpose(1, 2).contiguous()
    return ordered, codes.suh[0].contiguous(), codes.svh[0].contiguous()


def _expert_bytes(matrices: Sequence[CodedMatrix], rates: Sequence[int]) -> int:
    """Length of an expert's range: all its parts are multiples of 128 bytes."""
    sizes = [(padded(m.n), padded(m.k)) for m in matrices]
    return sum(n * k * rate // 16 + 2 * (n + k) for (n, k), rate in zip(sizes, rates, strict=True))


def _describe(stack: Sequence[Codes]) -> CodedMatrix:
    kinds = {(codes.n, codes.k, codes.codebook) for codes in stack}
    if len(kinds) > 1:
        raise ValueError(f"experts of one arena need one shape and codebook, got {sorted(kinds)}")
    rates = sum({1 << int(2 * codes.rate) for codes in stack})
    return CodedMatrix(*kinds.pop()[:2], rates, stack[0].codebook)
