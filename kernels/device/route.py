"""From expert ids to a schedule of tiles, and from expert outputs to tokens.

An assignment is one entry of ids [T, A], flattened: row = token * A + slot. The schedule lists
assignments expert by expert, each expert's run padded to whole tiles of BM rows:

    order (tiles * BM)  assignment of each row of each tile; P where the tile is padded
    tiles (1 + tiles)   number of tiles in use, then the expert of each
    ends  (E)           end of each expert's run in `order`, padding included

Ids >= E ("no expert") appear nowhere. All sizes are bounded by T, A and E alone, so nothing is
read back by the host and buffers can be allocated before: a CUDA graph can hold it.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from qmoe.kernels.device.activation import gated


@triton.jit(do_not_specialize=["P"])
def count_assignments(ids_ptr, counts_ptr, P, E, BLOCK: tl.constexpr, E2: tl.constexpr):
    """counts (blocks, E2): how many of each block's assignments go to each expert; bin E: none."""
    block = tl.program_id(0)
    ids = _load_ids(ids_ptr, block, P, E, BLOCK)
    tl.store(counts_ptr + block * E2 + tl.arange(0, E2), tl.histogram(ids, E2))


@triton.jit(do_not_specialize=["P", "blocks"])
def place_assignments(
    ids_ptr,
    counts_ptr,
    order_ptr,
    tiles_ptr,
    ends_ptr,
    P,
    E,
    blocks,
    BM: tl.constexpr,
    BLOCK: tl.constexpr,
    E2: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    INVERSE: tl.constexpr,
):
    """Every block puts its assignments where they belong; the last one also writes the table.

    INVERSE, with BM = 1: instead of the table, `tiles` (P) gets each assignment's place in `order`.
    """
    block = tl.program_id(0)
    ids = _load_ids(ids_ptr, block, P, E, BLOCK)
    e = tl.arange(0, E2)
    own = tl.histogram(ids, E2)
    before = tl.zeros([E2], tl.int32)
    total = own
    if not ONE_BLOCK:
        total = tl.zeros([E2], tl.int32)
        for first in range(0, blocks, 16):
            b = first + tl.arange(0, 16)[:, None]
            count = tl.load(counts_ptr + b * E2 + e[None, :], mask=b < blocks, other=0)
            total += tl.sum(count, 0)
            before += tl.sum(tl.where(b < block, count, 0), 0)
    padded = tl.where(e < E, (total + BM - 1) // BM * BM, 0)
    start = tl.cumsum(padded, 0) - padded

    # Sorted by (expert, position): equal experts keep their order, and a run's place follows.
    at = tl.arange(0, BLOCK)
    keys = tl.sort(ids * BLOCK + at)
    expert = keys // BLOCK
    place = tl.gather(start + before - (tl.cumsum(own, 0) - own), expert, 0) + at
    row = block * BLOCK + keys % BLOCK
    tl.store(order_ptr + place, row, mask=expert < E)
    if INVERSE:
        tl.store(tiles_ptr + row, place, mask=expert < E)

    if block == blocks - 1:
        tl.store(ends_ptr + e, start + padded, mask=e < E)
        if not INVERSE:
            tl.store(tiles_ptr, tl.sum(padded, 0) // BM)
            for i in range(0, tl.max(padded, 0) // BM):
                tl.store(tiles_ptr + 1 + start // BM + i, e, mask=i * BM < padded)
            for i in range(0, BM):
                slot = start + total + i
                tl.store(
                    order_ptr + slot, tl.full([E2], 0, tl.int32) + P, mask=slot < start + padded
                )


@triton.jit
def _load_ids(ids_ptr, block, P, E, BLOCK: tl.constexpr):
    at = block * BLOCK + tl.arange(0, BLOCK)
    ids = tl.load(ids_ptr + at, mask=at < P, other=E).to(tl.int32)
    return tl.minimum(ids, E)


@triton.jit(do_not_specialize=["split_stride"])
def sum_contributions(
    parts_ptr,
    ids_ptr,
    inverse_ptr,
    gates_ptr,
    y_ptr,
    N,
    A,
    E,
    split_stride,
    parts_stride,
    y_stride,
    SPLIT: tl.constexpr,
    BLOCK: tl.constexpr,
    A2: tl.constexpr,
    ALL: tl.constexpr,
    SORTED: tl.constexpr,
    EARLY: tl.constexpr,
):
    """y[t] = the sum over slots and splits of parts (SPLIT, T * A, N), in one order, in float32.

    Always the same order, so always the same bits. Slots without an expert were never written;
    ALL: there are none, and no ids. SORTED: row r of an assignment is parts[inverse[r]], and is
    multiplied by gates[r] here. A2: a power of two, A or more.
    """
    token = tl.program_id(0)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    a = tl.arange(0, A2)
    row = token * A + a
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    present = a < A
    if not ALL:
        present = present & (tl.load(ids_ptr + row, mask=present, other=E).to(tl.int32) < E)
    place = row
    if SORTED:
        place = tl.load(inverse_ptr + row, mask=present, other=0)
        gate = tl.load(gates_ptr + row, mask=present, other=0.0).to(tl.float32)
    at = parts_ptr + place.to(tl.int64)[:, None] * parts_stride + n[None, :]
    inside = present[:, None] & (n < N)[None, :]
    each = tl.zeros([A2, BLOCK], tl.float32)
    for s in tl.static_range(SPLIT):
        each += tl.load(at + s * split_stride, mask=inside, other=0.0).to(tl.float32)
    if SORTED:
        each *= gate[:, None]
    y = y_ptr + token.to(tl.int64) * y_stride + n
    tl.store(y, tl.sum(each, 0).to(y_ptr.dtype.element_ty), mask=n < N)


@triton.jit
def gate_rows(
    product_ptr,
    out_ptr,
    I,  # noqa: E741
    alpha,
    limit,
    ACT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out (rows, I) = activation(gate) * up of product (rows, 2 I), gate first."""
    row = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    product = product_ptr + row * 2 * I + n
    gate = tl.load(product, mask=n < I, other=0.0).to(tl.float32)
    up = tl.load(product + I, mask=n < I, other=0.0).to(tl.float32)
    mid = gated(gate, up, alpha, limit, ACT)
    tl.store(out_ptr + row * I + n, mid.to(out_ptr.dtype.element_ty), mask=n < I)
