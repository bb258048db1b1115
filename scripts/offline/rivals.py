"""Two other ways to write a 4-bit inner loop in Triton, restated to be counted by the same counter.

No masks in either loop. Both have the tokens on the left, so the unpacked weights go
through shared memory on their way to the matrix unit.
"""

import triton
import triton.language as tl


@triton.jit
def byte_per_nibble(
    x_ptr, w_ptr, s_ptr, out_ptr, order_ptr, tiles_ptr, K, P, per_token,
    x_stride, w_stride, s_stride, out_stride, w_expert_stride, s_expert_stride,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """As vLLM's fused_moe_kernel_gptq_awq does: each byte loaded once per nibble, float32 scales
    per element. w (E, N, K / 2), s (E, N, K / GROUP); order and tiles as in device/route.py. It is
    timed as well (scripts/bench_kernels.py), so rows and experts are looked up; there are no masks
    in the loop."""
    tile = tl.program_id(0)
    if tile >= tl.load(tiles_ptr):
        return
    expert = tl.load(tiles_ptr + 1 + tile).to(tl.int64)
    rows = tl.load(order_ptr + tile * BM + tl.arange(0, BM))
    read = tl.where(rows < P, rows, 0) // per_token
    n, k = tl.program_id(1) * BN + tl.arange(0, BN), tl.arange(0, BK)
    x = x_ptr + read[:, None].to(tl.int64) * x_stride + k[None, :]
    w = w_ptr + expert * w_expert_stride + n[None, :] * w_stride + (k // 2)[:, None]
    scales = s_ptr + expert * s_expert_stride + n[None, :] * s_stride
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for i in range(0, tl.cdiv(K, BK)):
        q = (tl.load(w) >> ((k % 2) * 4)[:, None]) & 0xF
        group = (k[:, None] + i * BK) // GROUP
        scale = tl.load(scales + group).to(tl.float32)
        weight = ((q.to(tl.float32) - 8) * scale).to(x_ptr.dtype.element_ty)
        acc = tl.dot(tl.load(x), weight, acc)
        x += BK
        w += BK // 2
    at = out_ptr + rows[:, None].to(tl.int64) * out_stride + n[None, :]
    tl.store(at, acc.to(out_ptr.dtype.element_ty), mask=rows[:, None] < P)


@triton.jit
def interleaved(
    x_ptr, w_ptr, s_ptr, out_ptr, K, x_stride, w_stride, s_stride, out_stride,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """As vLLM's triton_w4a16 does: eight columns to a word, spread by three interleaves. w int32
    (K, N / 8), s (K / GROUP, N); BK is at most GROUP."""
    m, n, k = tl.arange(0, BM), tl.program_id(0) * BN + tl.arange(0, BN), tl.arange(0, BK)
    words = tl.program_id(0) * (BN // 8) + tl.arange(0, BN // 8)
    x = x_ptr + m[:, None] * x_stride + k[None, :]
    w = w_ptr + k[:, None] * w_stride + words[None, :]
    shift = (n % 8) * 4
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for tile in range(0, tl.cdiv(K, BK)):
        word = tl.load(w)
        word = tl.interleave(word, word)
        word = tl.interleave(word, word)
        q = (tl.interleave(word, word) >> shift[None, :]) & 0xF
        scale = tl.load(s_ptr + (tile * BK // GROUP) * s_stride + n)
        weight = (q - 8).to(x_ptr.dtype.element_ty) * scale[None, :]
        acc = tl.dot(tl.load(x), weight, acc)
        x += BK
        w += BK * w_stride
    tl.store(out_ptr + m[:, None] * out_stride + n[None, :], acc.to(out_ptr.dtype.element_ty))
