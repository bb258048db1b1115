"""Byte planes back to floating-point matrices, for batches where a dense product is faster."""

import triton
import triton.language as tl

from qmoe.kernels.device.gemm import column_of


@triton.jit
def dequantize(
    arena_ptr,
    table_ptr,
    out_ptr,
    first_expert,
    N,
    K,
    scale_stride,
    GROUP: tl.constexpr,
    TAIL: tl.constexpr,
    ZERO: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ORDER: tl.constexpr,
):
    """out (experts, N, K) of experts first_expert...; one program per 128 rows x 32 columns."""
    DT: tl.constexpr = out_ptr.dtype.element_ty
    tile_n = tl.program_id(0)
    sub = tl.program_id(1)
    expert = tl.program_id(2)
    entry = table_ptr + (first_expert + expert) * 4
    bits = tl.load(entry)
    place = tl.arange(0, 32)
    n, k = _element(tl.arange(0, 128), place, ORDER)
    n += tile_n * 128
    k += sub * 32
    tile_k = sub // 8
    i = sub % 8
    KT = K // 256
    tail = tl.where(bits == 3, 1 + (TAIL + 3) // 4, (TAIL * bits + 7) // 8) * (TAIL > 0)
    planes = arena_ptr + tl.load(entry + 1).to(tl.int64) * 128
    planes += (tile_n.to(tl.int64) * (KT * bits + tail) + tile_k * bits) * 4096
    planes += tl.arange(0, 128)[:, None] * 32 + place[None, :]
    if bits == 3:
        low = tl.load(planes + (1 + i // 4) * 4096).to(tl.int32) >> (2 * (i % 4)) & 3
        q = low | (tl.load(planes).to(tl.int32) >> i & 1) << 2
    else:
        fields = 8 // bits
        word = tl.load(planes + (i // fields) * 4096).to(tl.int32)
        q = word >> (bits * (i % fields)) & ((1 << bits) - 1)
    group = 0
    if GROUP > 0:
        group = sub // (GROUP // 32)
    scales = (arena_ptr + tl.load(entry + 2).to(tl.int64) * 128).to(tl.pointer_type(DT))
    scale = tl.load(scales + group * scale_stride + n)
    zero = tl.zeros([128, 32], tl.int32) + (1 << (bits - 1))
    if ZERO:
        zeros = arena_ptr + tl.load(entry + 3).to(tl.int64) * 128
        zero = tl.load(zeros + group * scale_stride + n).to(tl.int32)
    w = (q - zero).to(tl.float32) * scale.to(tl.float32)
    row = column_of(n, N, INTERLEAVED)
    at = out_ptr + expert.to(tl.int64) * N * K + row.to(tl.int64) * K + k
    tl.store(at, w.to(DT), mask=(row < N) & (k < K))


@triton.jit
def _element(n, place, ORDER: tl.constexpr):
    """(row, column) [128, 32] of what is stored at each place of a tile (layout.block_order)."""
    p = (n % 16)[:, None] * 32 + place[None, :]
    row = (n // 16 * 16)[:, None]
    if ORDER == "wgmma":
        row += p // 2 % 2 * 8 + p // 64
        return row, p // 8 % 2 * 16 + p // 4 % 2 * 8 + p // 16 % 4 * 2 + p % 2
    elif ORDER == "mma":
        return row + p // 32, p // 4 % 4 * 8 + p // 2 % 2 * 4 + p // 16 % 2 * 2 + p % 2
    else:
        return row + p // 32, p % 32
