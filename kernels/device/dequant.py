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
    n = tile_n * 128 + tl.arange(0, 128)
    k = sub * 32 + place
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
    zero = tl.zeros([128], tl.int32) + (1 << (bits - 1))
    if ZERO:
        zeros = arena_ptr + tl.load(entry + 3).to(tl.int64) * 128
        zero = tl.load(zeros + group * scale_stride + n).to(tl.int32)
    w = (_in_order(q, ORDER) - zero[:, None]).to(tl.float32) * scale[:, None].to(tl.float32)
    row = column_of(n, N, INTERLEAVED)[:, None]
    at = out_ptr + expert.to(tl.int64) * N * K + row.to(tl.int64) * K + k[None, :]
    tl.store(at, w.to(DT), mask=(row < N) & (k < K)[None, :])


@triton.jit
def _in_order(q, ORDER: tl.constexpr):
    """A tile [128, 32] as it is stored (layout.block_order) to rows and columns as they are: what
    is written then lies side by side."""
    if ORDER == "wgmma":
        q = q.reshape(8, 8, 4, 2, 2, 2, 2).trans(0, 5, 1, 3, 4, 2, 6).reshape(128, 32)
    elif ORDER == "mma":
        q = q.reshape(128, 2, 4, 2, 2).trans(0, 2, 3, 1, 4).reshape(128, 32)
    return q
