"""Launching the Triton kernels: schedules, products, sums, expansion.

Buffers come from torch's allocator and nothing is read back, so a CUDA graph can capture a launch.
Letters: P = T * A assignments, N outputs, K inputs of a product.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from qmoe.kernels import launch
from qmoe.kernels.activation import NONE, Activation
from qmoe.kernels.arena import Arena
from qmoe.kernels.device.dequant import dequantize
from qmoe.kernels.device.gemm import grouped_gemm
from qmoe.kernels.device.route import (
    count_assignments,
    gate_rows,
    place_assignments,
    sum_contributions,
)
from qmoe.kernels.launch import Table, Tile

ROUTE_BLOCK = 512
SUM_BLOCK = 2048
GATE_BLOCK = 1024


@dataclass(frozen=True)
class Schedule:
    """Which rows each program computes (device/route.py). inline: P2 of device/gemm.py."""

    ids: Tensor
    order: Tensor
    tiles: Tensor
    inline: int
    grid: int
    rows: int


def schedule(ids: Int[Tensor, "T A"], E: int, BM: int, inline_rows: int) -> Schedule:
    """Schedule assignments for tiles of BM rows; one or two launches, none for small batches, of
    `inline_rows` at most."""
    P, T = ids.numel(), len(ids)
    inline = launch.inline_width(P, T, inline_rows)
    ids = ids.reshape(-1).contiguous()
    most = launch.most_tiles(P, E, BM)
    if inline:
        return Schedule(ids, ids, ids, inline, P, P)
    order, tiles = place(ids, E, BM, most)
    return Schedule(ids, order, tiles, 0, most, P)


def every_row(x: Tensor, BM: int) -> Schedule:
    """The schedule of a linear: one matrix, all rows of x [P, K]."""
    return Schedule(x, x, x, -1, -(-len(x) // BM), len(x))


def place(ids: Tensor, E: int, BM: int, most: int) -> tuple[Tensor, Tensor]:
    """order (most * BM) and tiles (1 + most) of device/route.py."""
    order = ids.new_empty(most * BM, dtype=torch.int32)
    tiles = ids.new_empty(1 + most, dtype=torch.int32)
    _place(ids, E, BM, order, tiles, inverse=False)
    return order, tiles


def sort(ids: Int[Tensor, " P"], E: int) -> tuple[Tensor, Tensor, Tensor]:
    """Assignments by expert: order (P) with those without an expert left out, the place of each
    assignment in it (P), and where each expert's run ends (E)."""
    order, inverse = (torch.empty_like(ids, dtype=torch.int32) for _ in range(2))
    return order, inverse, _place(ids, E, 1, order, inverse, inverse=True)


def _place(ids: Tensor, E: int, BM: int, order: Tensor, tiles: Tensor, inverse: bool) -> Tensor:
    P = len(ids)
    blocks = -(-P // ROUTE_BLOCK)
    E2 = _power_of_two(E + 1)
    ends = ids.new_empty(E, dtype=torch.int32)
    counts = ids.new_empty(blocks * E2, dtype=torch.int32)
    if blocks > 1:
        count_assignments[(blocks,)](ids, counts, P, E, BLOCK=ROUTE_BLOCK, E2=E2)
    place_assignments[(blocks,)](
        ids, counts, order, tiles, ends, P, E, blocks,
        BM=BM, BLOCK=ROUTE_BLOCK, E2=E2, ONE_BLOCK=blocks == 1, INVERSE=inverse,
    )  # fmt: skip
    return ends


@dataclass(frozen=True)
class Epilogue:
    """What happens to a product before it is stored. bias [E, N] is added first; an activation
    leaves I = N / 2 columns; gates [P] multiply rows."""

    activation: Activation = NONE
    gates: Tensor | None = None
    bias: Tensor | None = None


def product(
    x: Float[Tensor, "rows K"],
    plan: Schedule,
    arena: Arena,
    j: int,
    tile: Tile,
    table: Table,
    out: Tensor,
    after: Epilogue,
) -> None:
    """out [split, P, N] = matrix j of each assignment's expert times its row of x.

    x has a row per assignment or per token. With an activation there is no split.
    """
    gates, bias, activation = after.gates, after.bias, after.activation
    matrix = arena.matrices[j]
    P, E = plan.rows, arena.experts
    fused = activation.name != "none"
    grid = (plan.grid, -(-matrix.scale_stride // tile.BN), len(out))
    grouped_gemm[grid](
        x,
        arena.buffer,
        arena.table[j],
        out if bias is None else bias,
        out if gates is None else gates,
        out,
        plan.ids,
        plan.order,
        plan.tiles,
        matrix.n,
        matrix.k,
        P,
        P // len(x),
        x.stride(0),
        out.stride(1),
        matrix.scale_stride,
        out.stride(0),
        E,
        activation.alpha,
        activation.limit,
        BM=tile.BM,
        BN=tile.BN,
        BITS=matrix.bits,
        GROUP=matrix.group,
        TAIL=matrix.tail,
        ZERO=matrix.zero,
        ACT=activation.name if fused else "none",
        INTERLEAVED=matrix.paired,
        BIAS=bias is not None,
        WEIGHTED=gates is not None,
        P2=plan.inline,
        SPLIT=len(out),
        PTX=table.ptx and x.dtype != torch.float32,
        ORDER=arena.order,
        **tile.options(),
        **early(table),
    )


def early(table: Table) -> dict[str, bool]:
    """What a kernel is told and launched with that may start before the one in front is done."""
    return {"EARLY": True, "launch_pdl": True} if table.early else {"EARLY": False}


def sum_parts(
    parts: Float[Tensor, "split P N"],
    ids: Tensor | None,
    y: Float[Tensor, "T N"],
    E: int,
    table: Table,
    places: tuple[Tensor, Tensor] | None = None,
) -> None:
    """y from parts; without ids every part counts. places: each assignment's row of parts, and the
    gate that it is yet to be multiplied with."""
    T, N = y.shape
    A = (parts.shape[1] if ids is None else len(ids)) // T
    A2 = _power_of_two(A)
    block = max(SUM_BLOCK // A2, 64)
    inverse, gates = places or (parts, parts)
    sum_contributions[(T, -(-N // block))](
        parts, parts if ids is None else ids, inverse, gates, y, N, A, E,
        parts.stride(0), parts.stride(1), y.stride(0),
        SPLIT=len(parts), BLOCK=block, A2=A2, ALL=ids is None, SORTED=places is not None,
        **early(table),
    )  # fmt: skip


def activate(product: Float[Tensor, "rows N"], activation: Activation) -> Float[Tensor, "rows I"]:
    """The activation of whole products, for batches that expand the weights."""
    rows, width = len(product), product.shape[1] // 2
    out = product.new_empty(rows, width)
    gate_rows[(rows, -(-width // GATE_BLOCK))](
        product, out, width, activation.alpha, activation.limit,
        ACT=activation.name, BLOCK=GATE_BLOCK,
    )  # fmt: skip
    return out


def expanded(arena: Arena, j: int, first: int, last: int) -> Float[Tensor, "E N K"]:
    """Matrix j of experts first..last-1 in floating point, original row order."""
    matrix = arena.matrices[j]
    out = torch.empty(
        last - first, matrix.n, matrix.k, dtype=arena.dtype, device=arena.buffer.device
    )
    grid = (matrix.scale_stride // 128, -(-matrix.k // 32), last - first)
    dequantize[grid](
        arena.buffer, arena.table[j], out, first, matrix.n, matrix.k, matrix.scale_stride,
        GROUP=matrix.group, TAIL=matrix.tail, ZERO=matrix.zero,
        INTERLEAVED=matrix.paired, ORDER=arena.order,
    )  # fmt: skip
    return out


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()
