"""The grouped GEMM over byte planes: out[row] = W[expert of row] @ x[row], for 2, 3, 4 and 8 bits.

Weights are the left operand of every dot: they go from shared memory to registers, are unpacked
there and multiplied there, and are never written back. Tokens are on the right, so BM counts in
eights. Scales multiply the accumulator once per group, in float32; with BM of 128 and more a second
accumulator does not fit the registers and they multiply the weights, rounded once more.

One program computes BN outputs of up to BM rows (assignments: a token and one of its experts) that
share an expert. Which rows those are comes from a schedule (route.py), or at decode from the expert
ids themselves (`_own_rows`), which saves that launch.

Nothing in the main loop is masked. Rows past the end read row 0 and are not stored; N is padded in
the arena; the last part of K that fills no 256-wide tile is peeled off (`TAIL` sub-tiles of 32).
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from qmoe.kernels.device.activation import gated
from qmoe.kernels.device.unpack import unpack

# Bytes that a program of 128 outputs asks for ahead: with hundreds of programs at once, less than
# the second-level cache holds.
PREFETCHED = tl.constexpr(48 << 10)


@triton.jit
def _load_plane(planes, BN: tl.constexpr, ORDER: tl.constexpr):
    """A byte plane [BN, 32]. wgmma's order is undone here: it only renames registers."""
    plane = tl.load(planes, eviction_policy="evict_first")
    if ORDER == "wgmma":
        plane = plane.reshape(BN // 16, 8, 4, 2, 2, 2, 2)
        plane = plane.trans(0, 5, 1, 3, 4, 2, 6).reshape(BN, 32)
    return plane


@triton.jit
def _tokens_in_order(x, BM: tl.constexpr, ORDER: tl.constexpr):
    """x [32, BM] in the K order of mma weights: a thread reads the eight values that it needs of a
    token with one 16-byte load, into registers that lie as mma.sync takes them."""
    if ORDER == "mma":
        x = x.reshape(4, 2, 2, 2, BM).trans(2, 0, 1, 3, 4).reshape(32, BM)
    return x


@triton.jit
def _tile(
    acc,
    planes,
    x,
    scales,
    zeros,
    k_left,
    scale_stride,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    SUBTILES: tl.constexpr,
    WHOLE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    ZERO: tl.constexpr,
    PTX: tl.constexpr,
    ORDER: tl.constexpr,
):
    """acc [BN, BM] plus one K tile of SUBTILES times 32; unless WHOLE, only k_left count."""
    DT: tl.constexpr = x.dtype.element_ty
    PLANE: tl.constexpr = 128 * 32
    FIELDS: tl.constexpr = 4 if BITS == 3 else 8 // BITS
    PER_GROUP: tl.constexpr = SUBTILES if GROUP == 0 else GROUP // 32
    SCALED: tl.constexpr = BM >= 128
    high = 0
    zero = 0
    if BITS == 3:
        high = _load_plane(planes, BN, ORDER)
        planes += PLANE
    if ZERO and GROUP == 0:
        zero = tl.load(zeros)[:, None]
    scale = 0
    if not SCALED:
        part = tl.zeros((BN, BM), dtype=tl.float32)
    for i in tl.static_range(SUBTILES):
        if i % FIELDS == 0:
            plane = _load_plane(planes + (i // FIELDS) * PLANE, BN, ORDER)
        if ZERO and GROUP != 0 and i % PER_GROUP == 0:
            zero = tl.load(zeros + (i // PER_GROUP) * scale_stride)[:, None]
        w = unpack(plane, high, zero, BITS, i % (8 if BITS == 3 else FIELDS), DT, ZERO, PTX)
        if WHOLE:
            b = tl.load(x + i * 32, eviction_policy="evict_last")
        else:
            inside = i * 32 + tl.arange(0, 32)[:, None] < k_left
            b = tl.load(x + i * 32, mask=inside, other=0.0)
        b = _tokens_in_order(b, BM, ORDER)
        if GROUP == 0:
            acc = tl.dot(w, b, acc, input_precision="ieee")
        elif SCALED:
            if i % PER_GROUP == 0:
                scale = tl.load(scales + (i // PER_GROUP) * scale_stride)[:, None]
            acc = tl.dot(w * scale, b, acc, input_precision="ieee")
        else:
            part = tl.dot(w, b, part, input_precision="ieee")
            if (i + 1) % PER_GROUP == 0 or i + 1 == SUBTILES:
                scale = tl.load(scales + (i // PER_GROUP) * scale_stride)
                acc += part * scale[:, None].to(tl.float32)
                part = tl.zeros((BN, BM), dtype=tl.float32)
    return acc


@triton.jit
def _along_k(
    x,
    weights,
    scales,
    zeros,
    inside,
    tile_row,
    split,
    K,
    scale_stride,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    TAIL: tl.constexpr,
    SPLIT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    ZERO: tl.constexpr,
    PTX: tl.constexpr,
    ORDER: tl.constexpr,
):
    """acc [BN, BM] over one of SPLIT shares of the whole K tiles; the last one takes the tail."""
    PLANE: tl.constexpr = 128 * 32
    PER_GROUP: tl.constexpr = 8 if GROUP == 0 else GROUP // 32
    STEP: tl.constexpr = step_subtiles(BITS, BM)
    KT = K // 256
    each = tl.cdiv(KT, SPLIT)
    first = tl.minimum(split * each, KT)
    last = tl.minimum(first + each, KT)
    row_planes = KT * BITS + tail_planes(BITS, TAIL)
    planes = weights + (tile_row.to(tl.int64) * row_planes + first * BITS) * PLANE + inside
    if BN > 128:  # the second tile of 128 rows, where there is one
        further = tl.minimum(tl.arange(0, BN) // 128, scale_stride // 128 - 1 - tile_row)
        planes += (further * row_planes * PLANE)[:, None]
    x += first * 256
    acc = tl.zeros((BN, BM), dtype=tl.float32)
    for step in range(first * (8 // STEP), last * (8 // STEP)):
        group = 0 if GROUP == 0 else step * STEP // PER_GROUP
        acc = _tile(
            acc, planes, x, scales + group * scale_stride, zeros + group * scale_stride,
            256, scale_stride, BITS, GROUP, STEP, True, BM, BN, ZERO, PTX, ORDER,
        )  # fmt: skip
        planes += BITS * STEP // 8 * PLANE
        x += STEP * 32
    if TAIL > 0:
        if split == SPLIT - 1:
            group = 0 if GROUP == 0 else last * (8 // PER_GROUP)
            acc = _tile(
                acc, planes, x, scales + group * scale_stride, zeros + group * scale_stride,
                K - last * 256, scale_stride, BITS, GROUP, TAIL, False, BM, BN, ZERO, PTX, ORDER,
            )  # fmt: skip
    if GROUP == 0:
        acc *= tl.load(scales)[:, None].to(tl.float32)
    return acc


@triton.jit
def _own_rows(ids, P, index, expert, BM: tl.constexpr, P2: tl.constexpr):
    """The rows of `expert` that the program of assignment `index` computes: (rank, rows [BM]).

    Assignments of one expert are numbered; the one whose rank is a multiple of BM computes its own
    and the BM - 1 that follow, the others nothing. So no expert is read twice for BM rows, and no
    sort is needed. Missing rows are P.
    """
    at = tl.arange(0, P2)
    same = tl.load(ids + at, mask=at < P, other=-1).to(tl.int32) == expert
    ranks = tl.cumsum(same.to(tl.int32), 0) - 1
    rank = tl.sum(tl.where(at == index, ranks, 0), 0)
    wanted = rank + tl.arange(0, BM)
    hit = same[None, :] & (ranks[None, :] == wanted[:, None])
    found = tl.sum(tl.where(hit, at[None, :] + 1, 0), 1)
    return rank, tl.where(found > 0, found - 1, P)


@triton.jit
def _prefetch(
    weights, bits, tile_n, split, K, BN: tl.constexpr, TAIL: tl.constexpr, SPLIT: tl.constexpr
):
    """Ask the second-level cache for the first weights that this program will read, with one
    instruction of its first thread (from sm90 on). Programs that share a tile of 128 rows ask for a
    part each."""
    KT = K // 256
    each = tl.cdiv(KT, SPLIT)
    first = tl.minimum(split * each, KT)
    tail = tl.where(bits == 3, 1 + (TAIL + 3) // 4, (TAIL * bits + 7) // 8) * (TAIL > 0)
    wanted = tl.minimum(tl.minimum(first + each, KT) * bits - first * bits, PREFETCHED // 4096)
    share: tl.constexpr = (BN if BN < 128 else 128) * 32
    start = (tile_n * BN // 128).to(tl.int64) * (KT * bits + tail) + first * bits
    at = weights + start * 4096 + (tile_n * BN % 128) // BN * (wanted * share)
    tl.inline_asm_elementwise(
        "{ .reg .pred p; .reg .b32 t; mov.u32 t, %tid.x; setp.eq.u32 p, t, 0; "
        "@p cp.async.bulk.prefetch.L2.global [$1], $2; mov.b32 $0, 0; }",
        "=r,l,r",
        [at.to(tl.int64), wanted * share],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


# P changes from call to call: it must not mean another compilation.
@triton.jit(do_not_specialize=["P"])
def grouped_gemm(
    x_ptr,
    arena_ptr,
    table_ptr,
    bias_ptr,
    gates_ptr,
    out_ptr,
    ids_ptr,
    order_ptr,
    tiles_ptr,
    N,
    K,
    P,
    per_token,
    x_stride,
    out_stride,
    scale_stride,
    split_stride,
    E,
    alpha,
    limit,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    TAIL: tl.constexpr,
    ZERO: tl.constexpr,
    ACT: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BIAS: tl.constexpr,
    WEIGHTED: tl.constexpr,
    P2: tl.constexpr,
    SPLIT: tl.constexpr,
    PTX: tl.constexpr,
    ORDER: tl.constexpr,
    EARLY: tl.constexpr,
):
    """out[row, n] for every assignment row of P.

    x (rows / per_token, K); arena and table: layout.py; bias (E, N); gates (P); out (P, N), with
    SPLIT > 1 (SPLIT, P, N) partial sums; ids (P): expert of each row, >= E for none. P2 says where
    rows come from: 1, every assignment is a tile of its own (one token); more, the ids (P2 >= P of
    them); 0, order and tiles (route.py); negative, there is one matrix and every row is its.
    EARLY: the kernel may be started before the one in front of it is done, and waits for that.
    ACT other than "none": N counts gate and up, interleaved by eights; out has N / 2 columns.
    """
    DT: tl.constexpr = x_ptr.dtype.element_ty
    # What a second product reads before it waits was written before the first one started.
    KNOWN: tl.constexpr = WEIGHTED or P2 < 0
    if EARLY and not KNOWN:
        gdc_wait()
        gdc_launch_dependents()
    # Tiles that share an expert are neighbours: their weights come from DRAM once, then from L2.
    tile_m = tl.program_id(0)
    tile_n = tl.program_id(1)
    split = tl.program_id(2)
    m = tl.arange(0, BM)
    if P2 > 0:
        expert = tl.load(ids_ptr + tile_m).to(tl.int32)
        if expert >= E:
            return
    elif P2 == 0:
        if tile_m >= tl.load(tiles_ptr):
            return
        expert = tl.load(tiles_ptr + 1 + tile_m)
    else:
        expert = 0
    entry = table_ptr + expert * 4
    bits = tl.load(entry)
    weights = arena_ptr + tl.load(entry + 1).to(tl.int64) * 128
    if EARLY and BM <= 32:
        _prefetch(weights, bits, tile_n, split, K, BN, TAIL, SPLIT)
    if EARLY and KNOWN:
        gdc_wait()
        gdc_launch_dependents()
    if P2 > 0:
        if P2 == 1:
            rows = tl.where(m == 0, tile_m, P)
        else:
            rank, rows = _own_rows(ids_ptr, P, tile_m, expert, BM, P2)
            if rank % BM != 0:
                return
    elif P2 == 0:
        rows = tl.load(order_ptr + tile_m * BM + m)
    else:
        rows = tile_m * BM + m
    valid = rows < P
    read = tl.where(valid, rows, 0) // per_token

    n = tl.arange(0, BN)
    k = tl.arange(0, 32)
    x = x_ptr + read.to(tl.int64)[None, :] * x_stride + k[:, None]
    scales = (arena_ptr + tl.load(entry + 2).to(tl.int64) * 128).to(tl.pointer_type(DT))
    zeros = arena_ptr + tl.load(entry + 3).to(tl.int64) * 128
    own = tile_n * BN + n
    if BN > 128:
        own = tl.minimum(own, scale_stride - 1)
    scales += own
    zeros += own
    # BN = 64 reads half of a 128-row tile.
    tile_row = (tile_n * BN) // 128
    inside = ((tile_n * BN) % 128 + n % 128)[:, None] * 32 + k[None, :]
    if BITS > 0:
        acc = _along_k(
            x, weights, scales, zeros, inside, tile_row, split, K, scale_stride,
            BITS, GROUP, TAIL, SPLIT, BM, BN, ZERO, PTX, ORDER,
        )  # fmt: skip
    elif bits == 4:
        acc = _along_k(
            x, weights, scales, zeros, inside, tile_row, split, K, scale_stride,
            4, GROUP, TAIL, SPLIT, BM, BN, ZERO, PTX, ORDER,
        )  # fmt: skip
    elif bits == 3:
        acc = _along_k(
            x, weights, scales, zeros, inside, tile_row, split, K, scale_stride,
            3, GROUP, TAIL, SPLIT, BM, BN, ZERO, PTX, ORDER,
        )  # fmt: skip
    elif bits == 2:
        acc = _along_k(
            x, weights, scales, zeros, inside, tile_row, split, K, scale_stride,
            2, GROUP, TAIL, SPLIT, BM, BN, ZERO, PTX, ORDER,
        )  # fmt: skip
    else:
        acc = _along_k(
            x, weights, scales, zeros, inside, tile_row, split, K, scale_stride,
            8, GROUP, TAIL, SPLIT, BM, BN, ZERO, PTX, ORDER,
        )  # fmt: skip

    column = column_of(tile_n * BN + n, N, INTERLEAVED)
    if BIAS:
        if split == 0:
            bias = tl.load(bias_ptr + expert * N + column, mask=column < N, other=0.0)
            acc += bias[:, None].to(tl.float32)
    out_rows = rows.to(tl.int64)
    if ACT != "none":
        pairs = acc.reshape(BN // 16, 2, 8, BM).trans(0, 2, 3, 1)
        gate, up = tl.split(pairs)
        mid = gated(gate, up, alpha, limit, ACT).reshape(BN // 2, BM)
        column = tile_n * (BN // 2) + tl.arange(0, BN // 2)
        at = out_ptr + out_rows[None, :] * out_stride + column[:, None]
        tl.store(at, mid.to(DT), mask=valid[None, :] & (column[:, None] < N // 2))
    else:
        if WEIGHTED:
            acc *= tl.load(gates_ptr + rows, mask=valid, other=0.0)[None, :].to(tl.float32)
        at = out_ptr + split.to(tl.int64) * split_stride
        at += out_rows[None, :] * out_stride + column[:, None]
        inside_n = (column[:, None] < N) & (column[:, None] >= 0)
        tl.store(at, acc.to(out_ptr.dtype.element_ty), mask=valid[None, :] & inside_n)


@triton.constexpr_function
def step_subtiles(bits, BM):
    """Sub-tiles of 32 that the loop takes at once: a whole K tile. With many tokens as few as whole
    planes allow, so that what waits in shared memory is several steps and not one large one."""
    if BM < 128 or bits == 3:
        return 8
    return 4 if bits == 2 else 2


@triton.constexpr_function
def tail_planes(bits, subtiles):
    """Byte planes of a K tile with this many sub-tiles of 32 (8 of them: a whole tile)."""
    if subtiles == 0:
        return 0
    if bits == 3:
        return 1 + -(-subtiles // 4)
    return -(-subtiles * bits // 8)


@triton.jit
def column_of(row, N, INTERLEAVED: tl.constexpr):
    """The output column of an arena row; interleaved: gate and up rows alternate by eights."""
    if INTERLEAVED:
        index = (row // 16) * 8 + row % 8
        column = tl.where(row % 16 < 8, index, N // 2 + index)
        return tl.where(index < N // 2, column, N)
    else:
        return row
