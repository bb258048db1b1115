"""The grouped GEMM over EXL3's codes: out[row] = Q[expert of row] x[row], rates per expert.

Inputs come rotated and outputs go out unrotated: the scales and rotations around the codes are
kernels of their own (turn.py), since a rotation mixes 128 outputs of all of K. As in gemm.py,
weights are the left operand, decoded in registers and multiplied there; rows come from the ids or
from a schedule; nothing in the loop is masked, because K is filled up to blocks of 128.
"""

import triton
import triton.language as tl

from qmoe.kernels.device.gemm import _own_rows
from qmoe.kernels.device.trellis import starts_of, tiles

COLUMNS = tl.constexpr(64)  # inputs that the loop takes at once


@triton.jit
def _in_order(x, BM: tl.constexpr, ORDER: tl.constexpr):
    """x [64, BM] as it lies in memory (turn.py) to the order of K that decoded tiles have."""
    if ORDER == "mma":
        x = x.reshape(2, 4, 2, 2, 2, BM).trans(0, 3, 1, 2, 4, 5).reshape(64, BM)
    return x


@triton.jit
def _along_k(
    x, behind, codes, table, tile_n, split, N, K, RATE: tl.constexpr, CODEBOOK: tl.constexpr,
    SPLIT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PTX: tl.constexpr, ORDER: tl.constexpr,
    PAIR: tl.constexpr,
):  # fmt: skip
    """acc [BN, BM] over one of SPLIT shares of K, and that of the rows behind (`pair_of`)."""
    KT: tl.constexpr = COLUMNS // 16
    each = tl.cdiv(K // COLUMNS, SPLIT)
    first = tl.minimum(split * each, K // COLUMNS)
    last = tl.minimum(first + each, K // COLUMNS)
    step: tl.constexpr = KT * 4 * RATE  # words of tiles that share their outputs
    codes += (first * (N // 16) + tile_n * (BN // 16)) * step
    x += first * COLUMNS
    behind += first * COLUMNS
    starts = starts_of(table, RATE)
    acc = tl.zeros((BN, BM), dtype=tl.float32)
    more = acc
    for _ in range(first, last):
        w = tiles(codes, starts, BN // 16, KT, RATE, CODEBOOK, x.dtype.element_ty, PTX, ORDER)
        b = tl.load(x, eviction_policy="evict_last")
        b = _in_order(b, BM, ORDER)
        acc = tl.dot(w, b, acc, input_precision="ieee")
        if PAIR:
            b = _in_order(tl.load(behind, eviction_policy="evict_last"), BM, ORDER)
            more = tl.dot(w, b, more, input_precision="ieee")
            behind += COLUMNS
        codes += N // 16 * step
        x += COLUMNS
    return acc, more


@triton.constexpr_function
def pair_of(BM, ORDER):
    """Whether a tile's rows are multiplied in two halves by the same decoded weights. From 64 rows
    on the compiler gives mma.sync's warps a share of the rows each, and every share decodes all
    weights again."""
    return ORDER == "mma" and BM >= 64


@triton.jit
def _inputs(x_ptr, rows, part, P, K):
    """Pointers to the first inputs [64, rows] of a part's rows; those past the end read row 0."""
    read = (part * P + tl.where(rows < P, rows, 0)).to(tl.int64)
    return x_ptr + read[None, :] * K + tl.arange(0, COLUMNS)[:, None]


@triton.jit
def _store(acc, out, rows, column, P, stride):
    at = out + rows.to(tl.int64)[None, :] * stride + column[:, None]
    tl.store(at, acc.to(out.dtype.element_ty), mask=(rows < P)[None, :])


@triton.jit(do_not_specialize=["P"])
def coded_gemm(
    x_ptr,
    arena_ptr,
    table_ptr,
    starts_ptr,
    out_ptr,
    ids_ptr,
    order_ptr,
    tiles_ptr,
    N,
    K,
    P,
    E,
    split_stride,
    BM: tl.constexpr,
    BN: tl.constexpr,
    RATES: tl.constexpr,
    CODEBOOK: tl.constexpr,
    P2: tl.constexpr,
    SPLIT: tl.constexpr,
    PTX: tl.constexpr,
    ORDER: tl.constexpr,
):
    """out (SPLIT, P, parts * N): partial sums for every assignment row of P.

    x (parts, P, K), of each part's own scales; arena and table (parts, E, 4): coded/arena.py;
    ids, order, tiles and P2: as in gemm.py. Rates are in half bits; bit r of RATES is set if
    matrices of rate r are among them. N, K: filled up to multiples of 128.
    """
    PAIR: tl.constexpr = pair_of(BM, ORDER)
    HALF: tl.constexpr = BM // 2 if PAIR else BM
    tile_m = tl.program_id(0)
    tile_n = tl.program_id(1) % (N // BN)
    part = tl.program_id(1) // (N // BN)
    split = tl.program_id(2)
    m = tl.arange(0, BM)
    if P2 > 0:
        expert = tl.load(ids_ptr + tile_m).to(tl.int32)
        if (expert < 0) | (expert >= E):
            return
        if P2 == 1:
            rows = tl.where(m == 0, tile_m, P)
        else:
            rank, rows = _own_rows(ids_ptr, P, tile_m, expert, BM, P2)
            if rank % BM != 0:
                return
    elif P2 == 0:
        if tile_m >= tl.load(tiles_ptr):
            return
        expert = tl.load(tiles_ptr + 1 + tile_m)
        rows = tl.load(order_ptr + tile_m * BM + m)
    else:
        expert = 0
        rows = tile_m * BM + m
    entry = table_ptr + (part * E + expert) * 4
    rate = tl.load(entry)
    codes = (arena_ptr + tl.load(entry + 1).to(tl.int64) * 128).to(tl.pointer_type(tl.int32))
    behind = rows
    if PAIR:
        rows, behind = rows.reshape(2, BM // 2).trans(1, 0).split()
    x = _inputs(x_ptr, rows, part, P, K)
    x2 = _inputs(x_ptr, behind, part, P, K)
    acc = tl.zeros((BN, HALF), dtype=tl.float32)
    more = acc
    for RATE in tl.static_range(2, 17):
        if RATES == 1 << RATE:
            acc, more = _along_k(
                x, x2, codes, starts_ptr, tile_n, split, N, K,
                RATE, CODEBOOK, SPLIT, HALF, BN, PTX, ORDER, PAIR,
            )  # fmt: skip
        elif RATES >> RATE & 1:
            if rate == RATE:
                acc, more = _along_k(
                    x, x2, codes, starts_ptr, tile_n, split, N, K,
                    RATE, CODEBOOK, SPLIT, HALF, BN, PTX, ORDER, PAIR,
                )  # fmt: skip
    column = tl.program_id(1) * BN + tl.arange(0, BN)
    width = tl.num_programs(1) * BN
    out = out_ptr + split.to(tl.int64) * split_stride
    _store(acc, out, rows, column, P, width)
    if PAIR:
        _store(more, out, behind, column, P, width)
