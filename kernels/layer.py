"""Whole layers on an arena: the routed experts, and a linear. Triton underneath.

At most three launches for small batches (first product with its activation, second product, sum)
and five for large ones (two more for the schedule), nothing read back by the host. Batches with
hundreds of rows per expert expand the weights, a chunk of experts at a time, and use torch's
grouped product: there a fused kernel unpacks the same weights for every tile of rows.
"""

from functools import lru_cache

import torch
from jaxtyping import Float, Int
from torch import Tensor

from qmoe.kernels import launch
from qmoe.kernels.activation import NONE, Activation
from qmoe.kernels.arena import Arena, Matrix
from qmoe.kernels.grouped import (
    Epilogue,
    Schedule,
    activate,
    every_row,
    expanded,
    product,
    schedule,
    sort,
    sum_parts,
)
from qmoe.kernels.launch import Table, Tile

# Expanded weights at once, in bytes.
DENSE_CHUNK = 256 << 20
# Contributions are kept in float32 until they are summed, in larger batches in the model's dtype.
FLOAT32_ASSIGNMENTS = 4096
# What Triton's interpreter runs: for tests, and for nothing else.
INTERPRETER = Table(
    "interpreter", "mma", False, 0, "", 256,
    {w: {bm: Tile(bm, 128, 4, 1) for bm in (8, 16, 32, 64)} 
     for w in ("light", "heavy", "fine", "fine_heavy")},
)  # fmt: skip


@lru_cache
def device_table(device: torch.device) -> tuple[Table, int]:
    """A device's table and its number of multiprocessors (1 for the interpreter)."""
    if device.type == "cpu":
        return INTERPRETER, 1
    properties = torch.cuda.get_device_properties(device)
    arch = getattr(properties, "gcnArchName", "").split(":")[0]
    if not arch.startswith("gfx"):
        arch = f"sm{properties.major}{properties.minor}"
    return launch.table_for(properties.name, arch), properties.multi_processor_count


def routed_experts(
    x: Float[Tensor, "T H"],
    ids: Int[Tensor, "T A"],
    gates: Float[Tensor, "T A"],
    arena: Arena,
    activation: Activation,
    first_bias: Float[Tensor, "E N"] | None = None,
    second_bias: Float[Tensor, "E H2"] | None = None,
) -> Float[Tensor, "T H2"]:
    """y[t] = sum over a of gates[t, a] * (W2[e] @ activation(W1[e] @ x[t] + b1[e]) + b2[e]).

    e = ids[t, a]; ids >= E are skipped. x in the arena's dtype. The same inputs give the same bits.
    """
    T, A = ids.shape
    if T == 0:
        return x.new_empty(0, arena.matrices[-1].n)
    table, multiprocessors = device_table(x.device)
    if launch.use_dense(table, T * A, arena.experts) and _grouped_takes(arena):
        return _by_expanding(x, ids, gates, arena, activation, first_bias, second_bias)
    tiles = _tiles(arena, T * A)
    plan = schedule(ids, arena.experts, tiles[0].BM, table.inline_rows)
    mid = _first(x, plan, arena, tiles[0], activation, first_bias)
    return _second(mid, plan, gates, arena, tiles[1], second_bias)


def first_product(
    x: Float[Tensor, "T H"], ids: Int[Tensor, "T A"], arena: Arena, bias: Tensor | None = None
) -> Float[Tensor, "P N"]:
    """The first matrix of each assignment's expert, for activations that are not fused; rows
    without an expert hold whatever was in memory."""
    if len(x) == 0:
        return x.new_empty(0, arena.matrices[0].n)
    plan, tiles = _plan(ids, arena)
    return _first(x, plan, arena, tiles[0], NONE, bias)


def second_product(
    mid: Float[Tensor, "P I"],
    ids: Int[Tensor, "T A"],
    gates: Float[Tensor, "T A"],
    arena: Arena,
    bias: Tensor | None = None,
) -> Float[Tensor, "T H2"]:
    """The second matrix, weighed by the gates and summed per token."""
    if len(ids) == 0:
        return mid.new_empty(0, arena.matrices[1].n)
    plan, tiles = _plan(ids, arena)
    return _second(mid, plan, gates, arena, tiles[1], bias)


def _plan(ids: Tensor, arena: Arena) -> tuple[Schedule, list[Tile]]:
    table, _ = device_table(ids.device)
    tiles = _tiles(arena, ids.numel())
    return schedule(ids, arena.experts, tiles[0].BM, table.inline_rows), tiles


def _tiles(arena: Arena, assignments: int) -> list[Tile]:
    """The tile of each product; narrow ones if the first product, which is not split along K, would
    leave multiprocessors idle."""
    table, multiprocessors = device_table(arena.buffer.device)
    matrices = [(m.bits, m.group) for m in arena.matrices]
    tiles = launch.choose_tiles(table, matrices, assignments, arena.experts)
    wanted = multiprocessors * table.waves
    if launch.few_programs(tiles[0], assignments, arena.experts, arena.matrices[0].n, wanted):
        classes = [launch.tile_class(*m) for m in matrices]
        return [table.narrow.get(c, tile) for c, tile in zip(classes, tiles, strict=True)]
    return tiles


def _first(
    x: Tensor,
    plan: Schedule,
    arena: Arena,
    tile: Tile,
    activation: Activation,
    bias: Tensor | None,
) -> Tensor:
    matrix = arena.matrices[0]
    width = matrix.n if activation.name == "none" else matrix.n // 2
    out = x.new_empty(1, plan.rows, width)
    table, _ = device_table(x.device)
    product(x.contiguous(), plan, arena, 0, tile, table, out, Epilogue(activation, bias=bias))
    return out[0]


def _second(
    mid: Tensor, plan: Schedule, gates: Tensor, arena: Arena, tile: Tile, bias: Tensor | None
) -> Tensor:
    table, multiprocessors = device_table(mid.device)
    matrix, P = arena.matrices[1], plan.rows
    split = launch.choose_split(
        tile, P, arena.experts, matrix.n, matrix.k, multiprocessors * table.waves
    )
    small = P <= FLOAT32_ASSIGNMENTS or split > 1
    dtype = torch.float32 if small else mid.dtype
    parts = torch.empty(split, P, matrix.n, dtype=dtype, device=mid.device)
    after = Epilogue(gates=gates.reshape(-1).contiguous(), bias=bias)
    product(mid.contiguous(), plan, arena, 1, tile, table, parts, after)
    y = mid.new_empty(len(gates), matrix.n)
    sum_parts(parts, plan.ids, y, arena.experts, table)
    return y


def linear(x: Float[Tensor, "M K"], arena: Arena, bias: Tensor | None = None) -> Tensor:
    """x times the transpose of the arena's only matrix [N, K], plus bias [N]."""
    matrix = arena.matrices[0]
    M = len(x)
    y = x.new_empty(M, matrix.n)
    if M == 0:
        return y
    table, multiprocessors = device_table(x.device)
    if table.linear_rows <= M:
        weight = expanded(arena, 0, 0, 1)[0]
        return torch.nn.functional.linear(x, weight, bias)
    tile = launch.choose_tile(table, matrix.bits, matrix.group, M, 1)
    blocks = -(-M // tile.BM)
    split = launch.choose_split(
        tile, blocks, blocks, matrix.n, matrix.k, multiprocessors * table.waves
    )
    x = x.contiguous()
    after = Epilogue(bias=None if bias is None else bias[None])
    if split == 1:
        product(x, every_row(x, tile.BM), arena, 0, tile, table, y[None], after)
        return y
    parts = torch.empty(split, M, matrix.n, dtype=torch.float32, device=x.device)
    product(x, every_row(x, tile.BM), arena, 0, tile, table, parts, after)
    sum_parts(parts, None, y, 1, table)
    return y


def _by_expanding(
    x: Tensor,
    ids: Tensor,
    gates: Tensor,
    arena: Arena,
    activation: Activation,
    first_bias: Tensor | None,
    second_bias: Tensor | None,
) -> Tensor:
    """The same for large batches, in chunks of experts. Reads the experts' row counts back."""
    T, A = ids.shape
    E, (first, second) = arena.experts, arena.matrices
    flat = ids.reshape(-1).contiguous()
    order, inverse, device_ends = sort(flat, E)
    ends = [0, *device_ends.tolist()]
    parts = x.new_empty(1, T * A, second.n)
    chunk = _experts_per_chunk(first, second, x.element_size())
    for low in range(0, E, chunk):
        high = min(low + chunk, E)
        start, stop = ends[low], ends[high]
        if start == stop:
            continue
        rows = order[start:stop].long()
        offsets = device_ends[low:high] - start
        counts = torch.tensor([ends[e + 1] - ends[e] for e in range(low, high)], device=x.device)
        mid = _grouped(x[rows // A], expanded(arena, 0, low, high), offsets)
        if first_bias is not None:
            mid = mid + first_bias[low:high].repeat_interleave(counts, 0)
        out = _grouped(activate(mid, activation), expanded(arena, 1, low, high), offsets)
        if second_bias is not None:
            out = out + second_bias[low:high].repeat_interleave(counts, 0)
        parts[0, start:stop] = out
    y = x.new_empty(T, second.n)
    table, _ = device_table(x.device)
    sum_parts(parts, flat, y, E, table, (inverse, gates.reshape(-1).contiguous()))
    return y


def _grouped_takes(arena: Arena) -> bool:
    """torch's grouped product wants rows of whole 16 bytes."""
    return all(m.k * arena.dtype.itemsize % 16 == 0 for m in arena.matrices)


def _grouped(x: Tensor, weight: Float[Tensor, "E N K"], offsets: Tensor) -> Tensor:
    return torch.nn.functional.grouped_mm(x, weight.transpose(1, 2), offs=offsets)


def _experts_per_chunk(first: Matrix, second: Matrix, itemsize: int) -> int:
    largest = max(first.n * first.k, second.n * second.k) * itemsize
    return max(1, DENSE_CHUNK // largest)
