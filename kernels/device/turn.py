"""What lies around EXL3's codes: scales, and rotations by Hadamard matrices in blocks of 128.

A matrix is diag(suh) R Q R diag(svh), so its product is three steps: inputs are scaled and rotated
(`turn_in`), multiplied with Q (coded.py), and what comes out is rotated and scaled (`turn_out`).
Between the two products of an expert both happen at once, with the activation (`turn_between`); the
last step weighs and sums as well (`turn_and_sum`). Every expert has scales of its own, so rows are
assignments. A rotation multiplies with 1 and -1, in two halves of bfloat16 that together have 16
bits of a float32 (HALVES), or in float32.
"""

import triton
import triton.language as tl

from qmoe.kernels.device.activation import gated

BLOCK = tl.constexpr(128)
ROOT = tl.constexpr(128**-0.5)


@triton.jit
def _sums_and_differences(v, ROWS: tl.constexpr, HALF: tl.constexpr):
    """Of rows [ROWS, 2 HALF] the sum and the difference of their halves, as rows [2 ROWS, HALF]."""
    first, second = v.reshape(ROWS, 2, HALF).trans(0, 2, 1).split()
    both = tl.join(first + second, first - second)
    return both.trans(0, 2, 1).reshape(2 * ROWS, HALF)


@triton.jit
def _turned(v, ROWS: tl.constexpr, HALVES: tl.constexpr):
    """v R: v [ROWS, 128] in float32, R Sylvester's matrix over the square root of 128. Two of its
    seven levels are sums and differences, the other five a product with the matrix of 32: that of
    128 would fill the registers of some GPUs."""
    v = _sums_and_differences(v * ROOT, ROWS, 64)
    v = _sums_and_differences(v, 2 * ROWS, 32)
    i = tl.arange(0, 32)
    parity = i[:, None] & i[None, :]
    parity ^= parity >> 4
    parity ^= parity >> 2
    parity ^= parity >> 1
    signs = 1 - 2 * (parity & 1)
    if HALVES:
        signs = signs.to(tl.bfloat16)
        high = v.to(tl.bfloat16)
        low = (v - high.to(tl.float32)).to(tl.bfloat16)
        turned = tl.dot(high, signs, tl.dot(low, signs))
    else:
        turned = tl.dot(v, signs.to(tl.float32), input_precision="ieee")
    return turned.reshape(ROWS, BLOCK)


@triton.jit
def _scales(arena_ptr, table_ptr, entry, WHICH: tl.constexpr):
    """Where the float16 scales of table entries lie: suh for WHICH = 2, svh for 3."""
    at = tl.load(table_ptr + entry * 4 + WHICH).to(tl.int64) * 128
    return (arena_ptr + at).to(tl.pointer_type(tl.float16))


@triton.jit
def _rows(ids_ptr, first, P, E, ROWS: tl.constexpr, ONE: tl.constexpr):
    """Assignments first.., which of them have an expert, and that one, 0 for none. ONE: there is
    one matrix and no ids."""
    rows = first + tl.arange(0, ROWS)
    valid = rows < P
    if ONE:
        return rows, valid, tl.zeros([ROWS], tl.int32)
    else:
        expert = tl.load(ids_ptr + rows, mask=valid, other=E).to(tl.int32)
        valid = valid & (expert >= 0) & (expert < E)
        return rows, valid, tl.where(valid, expert, 0)


@triton.jit
def _memory_order(c, ORDER: tl.constexpr):
    """Where column c lies among the 128 of its block: for mma.sync a thread's values of two tiles
    are neighbours (coded.py, `_in_order`)."""
    if ORDER == "mma":
        half, q, j1 = c // 16 % 2, c // 2 % 4, c // 8 % 2
        return c // 32 * 32 + 8 * q + 4 * j1 + 2 * half + c % 2
    else:
        return c


@triton.jit
def _outputs(
    sums_ptr, arena_ptr, table_ptr, bias_ptr, rows, valid, expert, part, block, parts, n, N, E,
    split_stride, ROWS: tl.constexpr, SPLIT: tl.constexpr, BIAS: tl.constexpr,
    HALVES: tl.constexpr,
):  # fmt: skip
    """The outputs [rows, 128] of a block of a part: shares added, rotated, scaled, plus bias."""
    c = block * BLOCK + tl.arange(0, BLOCK)
    at = sums_ptr + rows.to(tl.int64)[:, None] * (parts * N) + (part * N + c)[None, :]
    total = tl.load(at, mask=valid[:, None], other=0.0).to(tl.float32)
    for s in tl.static_range(1, SPLIT):
        share = tl.load(at + s * split_stride.to(tl.int64), mask=valid[:, None], other=0.0)
        total += share.to(tl.float32)
    entry = part * E + expert
    svh = _scales(arena_ptr, table_ptr, entry, 3)[:, None] + c[None, :]
    y = _turned(total, ROWS, HALVES) * tl.load(svh).to(tl.float32)
    if BIAS:
        b = bias_ptr + expert.to(tl.int64)[:, None] * (parts * n) + (part * n + c)[None, :]
        y += tl.load(b, mask=(c < n)[None, :], other=0.0).to(tl.float32)
    return y


@triton.jit
def _store_inputs(
    v, out_ptr, arena_ptr, table_ptr, entry, row, valid, block, K, ROWS: tl.constexpr,
    ORDER: tl.constexpr, HALVES: tl.constexpr,
):  # fmt: skip
    """Scale and rotate v [rows, 128], and store it as row `row` of out [*, K]."""
    c = tl.arange(0, BLOCK)
    suh = _scales(arena_ptr, table_ptr, entry, 2)[:, None] + (block * BLOCK + c)[None, :]
    v = _turned(v * tl.load(suh).to(tl.float32), ROWS, HALVES)
    at = out_ptr + row.to(tl.int64)[:, None] * K
    at += (block * BLOCK + _memory_order(c, ORDER))[None, :]
    tl.store(at, v.to(out_ptr.dtype.element_ty), mask=valid[:, None])


@triton.jit(do_not_specialize=["P"])
def turn_in(
    x_ptr, arena_ptr, table_ptr, ids_ptr, out_ptr, k, K, P, E, per_token, x_stride,
    ROWS: tl.constexpr, ONE: tl.constexpr, ORDER: tl.constexpr, HALVES: tl.constexpr,
):  # fmt: skip
    """out (parts, P, K) from x (P / per_token, k), by the scales of each part; a program per rows,
    block and part. Rows without an expert are left out."""
    block, part = tl.program_id(1), tl.program_id(2)
    rows, valid, expert = _rows(ids_ptr, tl.program_id(0) * ROWS, P, E, ROWS, ONE)
    c = block * BLOCK + tl.arange(0, BLOCK)
    at = x_ptr + (rows // per_token).to(tl.int64)[:, None] * x_stride + c[None, :]
    v = tl.load(at, mask=valid[:, None] & (c < k)[None, :], other=0.0).to(tl.float32)
    _store_inputs(
        v, out_ptr, arena_ptr, table_ptr, part * E + expert, part * P + rows, valid, block, K,
        ROWS, ORDER, HALVES,
    )  # fmt: skip


@triton.jit(do_not_specialize=["P", "split_stride"])
def turn_out(
    sums_ptr, arena_ptr, table_ptr, bias_ptr, ids_ptr, out_ptr, n, N, P, E, split_stride,
    SPLIT: tl.constexpr, BIAS: tl.constexpr, ROWS: tl.constexpr, ONE: tl.constexpr,
    HALVES: tl.constexpr,
):  # fmt: skip
    """out (P, parts * n) from sums (SPLIT, P, parts * N); a program per rows, block and part."""
    block, part, parts = tl.program_id(1), tl.program_id(2), tl.num_programs(2)
    rows, valid, expert = _rows(ids_ptr, tl.program_id(0) * ROWS, P, E, ROWS, ONE)
    y = _outputs(
        sums_ptr, arena_ptr, table_ptr, bias_ptr, rows, valid, expert, part, block, parts, n, N, E,
        split_stride, ROWS, SPLIT, BIAS, HALVES,
    )  # fmt: skip
    c = block * BLOCK + tl.arange(0, BLOCK)
    at = out_ptr + rows.to(tl.int64)[:, None] * (parts * n) + (part * n + c)[None, :]
    tl.store(at, y.to(out_ptr.dtype.element_ty), mask=valid[:, None] & (c < n)[None, :])


@triton.jit(do_not_specialize=["P", "split_stride"])
def turn_between(
    sums_ptr, arena_ptr, table_ptr, bias_ptr, ids_ptr, out_ptr, n, N, P, E, split_stride, alpha,
    limit, ACT: tl.constexpr, SPLIT: tl.constexpr, BIAS: tl.constexpr, ROWS: tl.constexpr,
    ORDER: tl.constexpr, HALVES: tl.constexpr,
):  # fmt: skip
    """out (P, N), rotated inputs of the third matrix of the table, from sums (SPLIT, P, 2 N) of the
    first two, gate and up; a program per rows and block."""
    block = tl.program_id(1)
    rows, valid, expert = _rows(ids_ptr, tl.program_id(0) * ROWS, P, E, ROWS, False)
    gate = _outputs(
        sums_ptr, arena_ptr, table_ptr, bias_ptr, rows, valid, expert, 0, block, 2, n, N, E,
        split_stride, ROWS, SPLIT, BIAS, HALVES,
    )  # fmt: skip
    up = _outputs(
        sums_ptr, arena_ptr, table_ptr, bias_ptr, rows, valid, expert, 1, block, 2, n, N, E,
        split_stride, ROWS, SPLIT, BIAS, HALVES,
    )  # fmt: skip
    c = block * BLOCK + tl.arange(0, BLOCK)
    mid = tl.where(valid[:, None] & (c < n)[None, :], gated(gate, up, alpha, limit, ACT), 0.0)
    _store_inputs(
        mid, out_ptr, arena_ptr, table_ptr, 2 * E + expert, rows, valid, block, N, ROWS,
        ORDER, HALVES,
    )  # fmt: skip


@triton.jit(do_not_specialize=["split_stride"])
def turn_and_sum(
    sums_ptr, arena_ptr, table_ptr, bias_ptr, ids_ptr, gates_ptr, y_ptr, n, N, T, A, E,
    split_stride, SPLIT: tl.constexpr, BIAS: tl.constexpr, TOKENS: tl.constexpr, A2: tl.constexpr,
    HALVES: tl.constexpr,
):  # fmt: skip
    """y (T, n): of every token the weighted sum of its assignments' outputs, from sums (SPLIT,
    T * A, N), in one order. A2: a power of two, A or more; a program per TOKENS and block."""
    block = tl.program_id(1)
    at = tl.arange(0, TOKENS * A2)
    token, a = tl.program_id(0) * TOKENS + at // A2, at % A2
    rows = token * A + a
    valid = (token < T) & (a < A)
    expert = tl.load(ids_ptr + rows, mask=valid, other=E).to(tl.int32)
    valid = valid & (expert >= 0) & (expert < E)
    expert = tl.where(valid, expert, 0)
    each = _outputs(
        sums_ptr, arena_ptr, table_ptr, bias_ptr, rows, valid, expert, 0, block, 1, n, N, E,
        split_stride, TOKENS * A2, SPLIT, BIAS, HALVES,
    )  # fmt: skip
    gate = tl.load(gates_ptr + rows, mask=valid, other=0.0).to(tl.float32)
    each = tl.where(valid[:, None], each * gate[:, None], 0.0)
    y = tl.sum(each.reshape(TOKENS, A2, BLOCK), 1)
    t = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    c = block * BLOCK + tl.arange(0, BLOCK)
    out = y_ptr + t.to(tl.int64)[:, None] * n + c[None, :]
    tl.store(out, y.to(y_ptr.dtype.element_ty), mask=(t < T)[:, None] & (c < n)[None, :])
