"""Whole layers on an arena of EXL3's codes: the routed experts, and a linear. Triton underneath.

Five launches for small batches: inputs are rotated, multiplied, rotated with the activation between
the products, multiplied again, rotated and summed; large ones need one or two more for the
schedule. Nothing is read back by the host. Products are summed in float32 and multiplied in
float16 (float32 in models of float32), into which codes decode without rounding; bfloat16 would
round both weights and inputs more.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from qmoe.format.trellis import BLOCK, padded
from qmoe.kernels import launch
from qmoe.kernels.activation import Activation
from qmoe.kernels.coded.arena import CodedArena
from qmoe.kernels.coded.tiles import ROWS, choose, starts_table
from qmoe.kernels.device.coded import coded_gemm
from qmoe.kernels.device.turn import turn_and_sum, turn_between, turn_in, turn_out
from qmoe.kernels.grouped import Schedule, every_row, schedule
from qmoe.kernels.launch import Tile
from qmoe.kernels.layer import FLOAT32_ASSIGNMENTS, device_table


def routed_experts(
    x: Float[Tensor, "T H"],
    ids: Int[Tensor, "T A"],
    gates: Float[Tensor, "T A"],
    arena: CodedArena,
    activation: Activation,
    first_bias: Float[Tensor, "E N"] | None = None,
    second_bias: Float[Tensor, "E H2"] | None = None,
) -> Float[Tensor, "T H2"]:
    """y[t] = sum over a of gates[t, a] * (W2[e] @ activation(W1[e] @ x[t] + b1[e]) + b2[e]).

    e = ids[t, a]; ids >= E are skipped. The arena holds gate, up and down. The same inputs give the
    same bits.
    """
    if len(ids) == 0:
        return x.new_empty(0, arena.matrices[-1].n)
    plan, tile = _plan(ids, arena)
    sums = _product(_turned(x, plan, arena, 0), plan, arena, 0, tile)
    matrix, P = arena.matrices[0], plan.rows
    mid = torch.empty(1, P, padded(matrix.n), dtype=_working(x.dtype), device=x.device)
    turn_between[(-(-P // ROWS), padded(matrix.n) // BLOCK)](
        sums, arena.buffer, arena.table, sums if first_bias is None else first_bias, plan.ids, mid,
        matrix.n, padded(matrix.n), P, arena.experts, sums.stride(0), activation.alpha,
        activation.limit, ACT=activation.name, SPLIT=len(sums), BIAS=first_bias is not None,
        ROWS=ROWS, ORDER=_order(x), HALVES=_halves(x),
    )  # fmt: skip
    return _second(mid, plan, gates, arena, tile, second_bias, x.dtype)


def first_product(
    x: Float[Tensor, "T H"], ids: Int[Tensor, "T A"], arena: CodedArena, bias: Tensor | None = None
) -> Float[Tensor, "P N"]:
    """The first matrices of each assignment's expert, for activations that are not fused; rows
    without an expert hold whatever was in memory."""
    if len(x) == 0:
        return x.new_empty(0, sum(m.n for m in arena.matrices[: arena.first]))
    plan, tile = _plan(ids, arena)
    return _first(x, plan, arena, tile, bias)


def second_product(
    mid: Float[Tensor, "P I"],
    ids: Int[Tensor, "T A"],
    gates: Float[Tensor, "T A"],
    arena: CodedArena,
    bias: Tensor | None = None,
) -> Float[Tensor, "T H2"]:
    """The last matrix, weighed by the gates and summed per token."""
    if len(ids) == 0:
        return mid.new_empty(0, arena.matrices[-1].n)
    plan, tile = _plan(ids, arena)
    turned = _turned(mid, plan, arena, arena.first)
    return _second(turned, plan, gates, arena, tile, bias, mid.dtype)


def linear(x: Float[Tensor, "M K"], arena: CodedArena, bias: Tensor | None = None) -> Tensor:
    """x times the transpose of the arena's only matrix [N, K], plus bias [N]."""
    if len(x) == 0:
        return x.new_empty(0, arena.matrices[0].n)
    tile = choose(device_table(x.device)[0], len(x), 1)
    given = None if bias is None else bias[None]
    return _first(x, every_row(x, tile.BM), arena, tile, given)


def _plan(ids: Tensor, arena: CodedArena) -> tuple[Schedule, Tile]:
    table, _ = device_table(ids.device)
    tile = choose(table, ids.numel(), arena.experts)
    return schedule(ids, arena.experts, tile.BM, table.inline_rows), tile


def _working(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype == torch.float32 else torch.float16


def _halves(x: Tensor) -> bool:
    """Whether rotations multiply in halves of bfloat16, which matrix units take."""
    return x.device.type == "cuda" and x.dtype != torch.float32


def _order(x: Tensor) -> str:
    return device_table(x.device)[0].order


def _turned(x: Tensor, plan: Schedule, arena: CodedArena, j: int) -> Float[Tensor, "parts P K"]:
    """Inputs of the product of matrix j (and up beside gate) by its scales, rotated."""
    parts, k, P = arena.first if j == 0 else 1, arena.matrices[j].k, plan.rows
    x = x.contiguous()
    out = torch.empty(parts, P, padded(k), dtype=_working(x.dtype), device=x.device)
    turn_in[(-(-P // ROWS), padded(k) // BLOCK, parts)](
        x, arena.buffer, arena.table[j:], plan.ids, out, k, padded(k), P, arena.experts,
        P // len(x), x.stride(0), ROWS=ROWS, ONE=plan.inline < 0, ORDER=_order(x),
        HALVES=_halves(x),
    )  # fmt: skip
    return out


def _product(
    turned: Float[Tensor, "parts P K"], plan: Schedule, arena: CodedArena, j: int, tile: Tile
) -> Float[Tensor, "split P N"]:
    """The shares of Q times rotated inputs, for the matrices that start at j."""
    parts, P, K = turned.shape
    table, multiprocessors = device_table(turned.device)
    matrices = arena.matrices[j : j + parts]
    N, rates = padded(matrices[0].n), 0
    for matrix in matrices:
        rates |= matrix.rates
    blocks = plan.grid if plan.inline < 0 else min(P, arena.experts)
    split = launch.choose_split(tile, blocks, blocks, parts * N, K, multiprocessors * table.waves)
    small = P <= FLOAT32_ASSIGNMENTS or turned.dtype == torch.float32
    dtype = torch.float32 if small else torch.bfloat16
    sums = torch.empty(split, P, parts * N, dtype=dtype, device=turned.device)
    coded_gemm[(plan.grid, parts * N // tile.BN, split)](
        turned, arena.buffer, arena.table[j:], starts_table(turned.device), sums, plan.ids,
        plan.order, plan.tiles, N, K, P, arena.experts, sums.stride(0),
        BM=tile.BM, BN=tile.BN, RATES=rates, CODEBOOK=matrices[0].codebook, P2=plan.inline,
        SPLIT=split, PTX=table.ptx and turned.dtype == torch.float16, ORDER=table.order,
        **tile.options(),
    )  # fmt: skip
    return sums


def _first(
    x: Tensor, plan: Schedule, arena: CodedArena, tile: Tile, bias: Tensor | None
) -> Float[Tensor, "P N"]:
    sums = _product(_turned(x, plan, arena, 0), plan, arena, 0, tile)
    matrix, P = arena.matrices[0], plan.rows
    out = x.new_empty(P, arena.first * matrix.n)
    turn_out[(-(-P // ROWS), padded(matrix.n) // BLOCK, arena.first)](
        sums, arena.buffer, arena.table, sums if bias is None else bias, plan.ids, out, matrix.n,
        padded(matrix.n), P, arena.experts, sums.stride(0), SPLIT=len(sums),
        BIAS=bias is not None, ROWS=ROWS, ONE=plan.inline < 0, HALVES=_halves(x),
    )  # fmt: skip
    return out


def _second(
    turned: Tensor,
    plan: Schedule,
    gates: Tensor,
    arena: CodedArena,
    tile: Tile,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Float[Tensor, "T H2"]:
    j, (T, A) = arena.first, gates.shape
    sums, matrix = _product(turned, plan, arena, j, tile), arena.matrices[j]
    y = torch.empty(T, matrix.n, dtype=dtype, device=turned.device)
    width = 1 << (A - 1).bit_length()
    tokens = max(1, ROWS // width)
    turn_and_sum[(-(-T // tokens), padded(matrix.n) // BLOCK)](
        sums, arena.buffer, arena.table[j:], sums if bias is None else bias, plan.ids,
        gates.reshape(-1).contiguous(), y, matrix.n, padded(matrix.n), T, A, arena.experts,
        sums.stride(0), SPLIT=len(sums), BIAS=bias is not None, TOKENS=tokens, A2=width,
        HALVES=_halves(y),
    )  # fmt: skip
    return y
