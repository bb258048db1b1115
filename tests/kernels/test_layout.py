"""The byte-plane layout and the arena: golden bytes, round trips, and where everything lies."""

from itertools import product

import pytest
import torch
from helpers import DEVICE

from qmoe.config import Scheme
from qmoe.format.grid import dequantize
from qmoe.format.quantized import Quantized
from qmoe.kernels.arena import ALIGN, SCALES, WEIGHTS, ZEROS, build_arena, expand
from qmoe.kernels.layout import (
    ORDERS,
    block_order,
    count_planes,
    matrix_bytes,
    pack,
    pair_rows,
    unpack,
)
from qmoe.solvers.rtn import rtn

SIZES = [(1, 1), (17, 77), (128, 256), (130, 300), (64, 2880), (257, 513), (3, 255)]
# Written out by hand: the matrix is 0 but for some integers at (row, column); every byte of a plane
# is that plane's background but for some at (tile of 128 rows, plane, row in the tile, byte).
GOLDEN = {
    "2 bits": (
        2, (2, 160),
        {(0, 0): 1, (0, 65): -2, (1, 129): -1},
        [0b10_10_10_10, 0b00_00_00_10],
        {(0, 0, 0, 0): 0b10_10_10_11, (0, 0, 0, 1): 0b10_00_10_10, (0, 1, 1, 1): 0b01},
    ),
    "3 bits": (
        3, (2, 160),
        {(0, 0): 3, (0, 34): -4, (1, 97): 2, (1, 128): -3},
        [0b11111, 0, 0],
        {
            (0, 1, 0, 0): 0b11, (0, 0, 0, 2): 0b11101, (0, 1, 1, 1): 0b10_00_00_00,
            (0, 0, 1, 0): 0b01111, (0, 2, 1, 0): 0b01,
        },
    ),
    "4 bits": (
        4, (2, 288),
        {(0, 0): 7, (0, 33): -8, (1, 64): 3, (1, 255): -1, (0, 256): 1},
        [0x88, 0x88, 0x88, 0x88, 0x08],
        {
            (0, 0, 0, 0): 0x8F, (0, 0, 0, 1): 0x08, (0, 1, 1, 0): 0x8B, (0, 3, 1, 31): 0x78,
            (0, 4, 0, 0): 0x09,
        },
    ),
    "8 bits": (
        8, (130, 33),
        {(0, 0): 127, (0, 32): -128, (127, 5): -1, (129, 31): 2},
        [0x80, 0x80],
        {(0, 0, 0, 0): 0xFF, (0, 1, 0, 0): 0, (0, 0, 127, 5): 0x7F, (1, 0, 1, 31): 0x82},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_bytes(name):
    bits, (n, k), integers, background, bytes_ = GOLDEN[name]
    q = torch.zeros(n, k, dtype=torch.int8)
    for at, value in integers.items():
        q[at] = value
    tiles = -(-n // 128)
    planes = torch.tensor(background, dtype=torch.uint8)
    expected = planes[None, :, None, None].repeat(tiles, 1, 128, 32)
    for at, value in bytes_.items():
        expected[at] = value
    assert torch.equal(pack(q, bits, "plain"), expected.flatten())
    assert torch.equal(unpack(expected.flatten(), bits, n, k, "plain"), q)


@pytest.mark.parametrize("bits, order, size", list(product((2, 3, 4, 8), ORDERS, SIZES)))
def test_round_trip(bits, order, size):
    q = torch.randint(-(1 << (bits - 1)), 1 << (bits - 1), size, dtype=torch.int8)
    stored = pack(q, bits, order)
    assert len(stored) == matrix_bytes(*size, bits)
    assert torch.equal(unpack(stored, bits, *size, order), q)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_whole_tiles_take_exactly_their_bits(bits):
    assert matrix_bytes(256, 768, bits) == 256 * 768 * bits // 8
    # Ten columns more are one more sub-tile; for three bits its top bits have a plane too.
    assert count_planes(768 + 10, bits) == 3 * bits + (2 if bits == 3 else 1)


def test_orders_are_what_they_say():
    plain, mma, wgmma = (block_order(order).view(16, 32) for order in ORDERS)
    assert torch.equal(plain.flatten(), torch.arange(512))
    for row, h, t, j, c in product(range(16), range(2), range(4), range(2), range(2)):
        assert mma[row, 16 * h + 4 * t + 2 * j + c] == row * 32 + 8 * t + 4 * j + 2 * h + c
    place = wgmma.flatten()
    for g, t, i, h, r, c in product(range(8), range(4), *[range(2)] * 4):
        row, column = 8 * r + g, 16 * i + 8 * h + 2 * t + c
        assert place[64 * g + 16 * t + 8 * i + 4 * h + 2 * r + c] == row * 32 + column
    for order in ORDERS:
        assert torch.equal(block_order(order).sort().values, torch.arange(512))


@pytest.mark.parametrize("half", [1, 7, 8, 77, 96])
def test_gate_and_up_alternate_by_eights(half):
    rows = pair_rows(2 * half)
    assert len(rows) == 16 * -(-half // 8)
    for at, row in enumerate(rows.tolist()):
        index = at // 16 * 8 + at % 8
        expected = index if at % 16 < 8 else half + index
        assert row == (expected if index < half else -1)
    assert torch.equal(rows[rows >= 0].sort().values, torch.arange(2 * half))


def stack(n, k, bits, group=32, symmetric=True, dtype=torch.float16):
    """Experts [n, k] of the widths `bits`."""
    return [
        rtn(torch.randn(1, n, k), Scheme(b, group, symmetric), dtype)
        for b in ((bits,) * 3 if isinstance(bits, int) else bits)
    ]


def check_expand(stacks, paired, order, dtype=torch.float16):
    arena = build_arena(stacks, dtype, order, DEVICE, paired)
    for j, matrices in enumerate(stacks):
        for e, quantized in enumerate(matrices):
            assert torch.equal(expand(arena, j, e), dequantize(quantized)[0])
    return arena


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("bits", [2, 3, 4, 8, (2, 3, 4, 8)], ids=str)
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("group", [32, 64, 128, -1])
def test_the_arena_holds_the_same_weights(bits, group, symmetric, order):
    k = {32: 288, 64: 320, 128: 384, -1: 301}[group]
    stacks = [stack(20, k, bits, group, symmetric), stack(150, k, bits, group, symmetric)]
    arena = check_expand(stacks, False, order)
    assert [m.bits for m in arena.matrices] == [bits if isinstance(bits, int) else 0] * 2
    assert arena.matrices[0].group == max(group, 0) and arena.matrices[0].zero != symmetric


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
def test_paired_rows_with_an_odd_intermediate_size(symmetric, dtype):
    first = stack(2 * 77, 64, (3, 8, 4), 32, symmetric, dtype)
    second = stack(40, 77, (2, 8, 8), -1, symmetric, dtype)
    arena = check_expand([first, second], True, "mma", dtype)
    assert arena.matrices[0].rows == 160 and not arena.matrices[1].paired


def test_a_width_may_differ_between_the_matrices_of_an_expert():
    check_expand([stack(16, 64, (2, 8)), stack(64, 32, (4, 4))], False, "plain")


def test_symmetric_and_asymmetric_experts_share_an_arena():
    for bits in (3, 8):
        mixed = stack(16, 64, (bits,)) + stack(16, 64, (bits,), symmetric=False)
        arena = check_expand([mixed], False, "plain")
        assert arena.matrices[0].zero


@pytest.mark.parametrize("group", [32, -1])
def test_zero_points_of_8_bits_are_mirrored_below_the_middle(group):
    weight = torch.randn(1, 24, 64)
    weight[0, :8] = weight[0, :8].abs()
    weight[0, 8:16] = -weight[0, 8:16].abs()
    quantized = rtn(weight, Scheme(8, group, False), torch.float16)
    assert quantized.zero.min() == -128 and quantized.zero.max() == 127
    arena = check_expand([[quantized]], False, "plain")
    first = int(arena.table[0, 0, ZEROS]) * ALIGN
    groups = arena.matrices[0].groups
    zeros = arena.buffer[first : first + groups * 128].view(groups, 128)
    assert zeros[:, :24].max() < 128


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("bits", [4, (2, 3, 8)], ids=str)
def test_an_expert_is_one_aligned_range_and_shares_no_byte(bits, symmetric):
    stacks = [stack(2 * 20, 96, bits, 32, symmetric), stack(96, 20, bits, -1, symmetric)]
    arena = build_arena(stacks, torch.float16, "mma", DEVICE, True)
    ranges = arena.ranges()
    assert [start for start, _ in ranges] == [sum(s for _, s in ranges[:e]) for e in range(3)]
    assert sum(length for _, length in ranges) == len(arena.buffer)
    assert all(start % ALIGN == 0 and length % ALIGN == 0 for start, length in ranges)
    owner = torch.full((len(arena.buffer),), -1)
    for e, (j, matrix) in product(range(3), enumerate(arena.matrices)):
        width = int(arena.table[j, e, 0])
        values = matrix.groups * matrix.scale_stride
        parts = {WEIGHTS: matrix.weight_bytes(width), SCALES: 2 * values}
        parts |= {} if symmetric else {ZEROS: values}
        for column, length in parts.items():
            first = int(arena.table[j, e, column]) * ALIGN
            assert (owner[first : first + length] == -1).all()
            owner[first : first + length] = e
            assert ranges[e][0] <= first and first + length <= sum(ranges[e])


@pytest.mark.parametrize(
    "other, message",
    [
        (lambda: stack(16, 128, (4,)), r"\(16, 64\), \(16, 128\)"),
        (lambda: stack(24, 64, (4,)), r"\(16, 64\), \(24, 64\)"),
        (lambda: stack(16, 64, (4,), 64), r"\[1, 2\] groups"),
    ],
    ids=["columns", "rows", "groups"],
)
def test_experts_that_disagree_are_refused(other, message):
    with pytest.raises(ValueError, match=f"one shape and one group size.*{message}"):
        build_arena([stack(16, 64, (4,)) + other()], torch.float16, "plain", DEVICE, False)


def test_groups_that_the_kernels_do_not_take_are_refused():
    odd = Quantized(
        torch.zeros(1, 4, 64, dtype=torch.int8), torch.ones(1, 4, 4), None, Scheme(4, 32)
    )
    with pytest.raises(ValueError, match="4 groups along K = 64: .* 32, 64 or 128"):
        build_arena([[odd]], torch.float16, "plain", DEVICE, False)
