"""The C kernels against integer arithmetic, and every instruction set against the scalar one."""

import numpy as np
import pytest
import torch

from qmoe.config import Scheme
from qmoe.format.quantized import Quantized
from qmoe.kernels.cpu import library, ops
from qmoe.kernels.cpu.layout import pack
from qmoe.kernels.reference import random_matrices

lib = library.library()
pytestmark = pytest.mark.skipif(lib is None, reason="installed without a C compiler")


def number(name: str) -> int:
    return -1 if lib is None else int(lib.qmoe_find_tier(name.encode()))


TIERS = [name for name in library.NAMES if number(name) >= 0]
CPU = torch.device("cpu")


def product(monkeypatch, tier, x, packed, e=0, exact=False):
    monkeypatch.setattr(ops, "tier", lambda: number(tier))
    stack = ops.stack_struct(packed.buffer, packed.table, packed.shape.numbers())
    return ops.linear_now(x, e, stack, exact)


def steps(k: int, piece: int) -> list[slice]:
    """The columns that share a scale of activations."""
    return [
        slice(start, min(start + 32, piece_end))
        for piece_end in range(piece, k + 1, piece)
        for start in range(piece_end - piece, piece_end, 32)
    ]


def reference(x, quantized):
    """Activations rounded to 127 steps per 32 columns, sums in int64, the rest in float64."""
    q, groups = quantized.q[0].numpy().astype(np.int64), quantized.scale.shape[-1]
    scale = quantized.scale[0].double().numpy()
    zero = np.zeros(scale.shape, np.int64)
    if quantized.zero is not None:
        zero = quantized.zero[0].numpy().astype(np.int64)
    values, y = x.float().numpy(), np.zeros((len(x), len(q)))
    length = q.shape[1] // groups
    for part in steps(q.shape[1], length):
        g = part.start // length
        most = np.abs(values[:, part]).max(1, keepdims=True)
        inverse = np.divide(np.float32(127), most, out=np.zeros_like(most), where=most > 0)
        codes = np.rint(values[:, part] * inverse).astype(np.int64)
        sums = codes @ (q[:, part] - zero[:, g : g + 1]).T
        y += (most / np.float32(127)).astype(np.float64) * sums * scale[:, g]
    return torch.from_numpy(y)


SIZES = [
    # rows, N, K, group
    (1, 1, 32, 32),
    (1, 17, 96, 32),
    (5, 96, 160, 32),
    (3, 48, 352, -1),  # a channel of 11 steps
    (65, 33, 704, 64),  # two tiles of rows
    (2, 20, 40, -1),  # a step of 32 and one of 8
    (7, 64, 256, 128),
    (1, 16, 4096, 128),
]


@pytest.mark.parametrize("rows, n, k, group", SIZES)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_equals_integer_arithmetic(monkeypatch, rows, n, k, group, bits, symmetric):
    (quantized,) = random_matrices(1, n, k, bits, group, torch.float32, CPU, symmetric)
    x, packed = torch.randn(rows, k), pack([quantized], torch.float32)
    wanted = reference(x, quantized)
    each = [product(monkeypatch, tier, x, packed) for tier in TIERS]
    # Float sums of at most 128 terms: a few units of the last place of their size.
    torch.testing.assert_close(each[0].double(), wanted, rtol=2e-6, atol=2e-6)
    assert all(torch.equal(each[0], other) for other in each[1:])


@pytest.mark.parametrize("rows, n, k, group", SIZES)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_exact_products_equal_float64(monkeypatch, rows, n, k, group, bits, symmetric):
    from qmoe.format.grid import dequantize

    (quantized,) = random_matrices(1, n, k, bits, group, torch.bfloat16, CPU, symmetric)
    x, packed = torch.randn(rows, k), pack([quantized], torch.bfloat16)
    each = [product(monkeypatch, tier, x, packed, exact=True) for tier in TIERS]
    wanted = x.double() @ dequantize(quantized)[0].double().T
    torch.testing.assert_close(each[0].double(), wanted, rtol=2e-6, atol=4e-6)
    assert all(torch.equal(each[0], other) for other in each[1:])


def extreme(bits: int, k: int, codes: str, zero: str | None, rows: int = 20) -> Quantized:
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    q = torch.full((1, rows, k), low if codes == "low" else high, dtype=torch.int8)
    if codes == "turns":
        q[..., ::2] = low
    points = None
    if zero is not None:
        points = torch.full((1, rows, k // 32), low if zero == "low" else high, dtype=torch.int8)
    return Quantized(q, torch.ones(1, rows, k // 32), points, Scheme(bits, 32, zero is None))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("codes", ["low", "high", "turns"])
@pytest.mark.parametrize("zero", [None, "low", "high"])
def test_extremes_never_saturate(monkeypatch, bits, codes, zero):
    for k in (64, 320, 4096):
        quantized = extreme(bits, k, codes, zero)
        packed = pack([quantized], torch.float32)
        turns = torch.ones(k)
        turns[::2] = -1
        hot = torch.randn(k)
        hot[32:64] = 3000  # a whole group
        x = 127 * torch.stack((torch.ones(k), -torch.ones(k), turns, -turns, hot))
        wanted = reference(x, quantized)
        for tier in TIERS:
            got = product(monkeypatch, tier, x, packed).double()
            # The first four have scale 1 and integer sums below 2^24 in each step: exact in float32
            # up to sums of 2^24 in all.
            torch.testing.assert_close(got, wanted, rtol=2e-6, atol=1e-3)
            if wanted[:4].abs().max() < 2**24:
                assert torch.equal(got[:4], wanted[:4])


def test_widths_and_groups_mix_within_a_stack(monkeypatch):
    each = [
        random_matrices(1, 40, 256, bits, group, torch.bfloat16, CPU, symmetric)[0]
        for bits, group, symmetric in [
            (2, 32, True),
            (3, -1, False),
            (4, 128, True),
            (8, 64, False),
        ]
    ]
    packed, x = pack(each, torch.bfloat16), torch.randn(9, 256)
    for tier in TIERS:
        for e, quantized in enumerate(each):
            got = product(monkeypatch, tier, x, packed, e).double()
            torch.testing.assert_close(got, reference(x, quantized), rtol=2e-6, atol=2e-6)


def test_subnormal_scales_are_kept(monkeypatch):
    (quantized,) = random_matrices(1, 16, 64, 4, 32, torch.float16, CPU)
    quantized.scale.fill_(1e-7)
    packed, x = pack([quantized], torch.float16), torch.randn(3, 64)
    for tier in TIERS:
        for flush in (False, True):
            torch.set_flush_denormal(flush)
            try:
                got = product(monkeypatch, tier, x, packed)
            finally:
                torch.set_flush_denormal(False)
            assert got.abs().max() > 1e-7
            torch.testing.assert_close(got.double(), reference(x, quantized), rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_reaches_its_row_alone(monkeypatch, bad):
    (quantized,) = random_matrices(1, 16, 64, 4, 32, torch.float32, CPU)
    packed, x = pack([quantized], torch.float32), torch.randn(3, 64)
    x[1, 40] = bad
    for tier in TIERS:
        got = product(monkeypatch, tier, x, packed)
        assert got[1].isnan().all() and got[[0, 2]].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_types_are_converted_as_torch_does(monkeypatch, dtype):
    """Every number of 16 bits, through a matrix of one column that is 1."""
    q = torch.zeros(1, 1, 32, dtype=torch.int8)
    q[..., 0] = 1
    packed = pack([Quantized(q, torch.ones(1, 1, 1), None, Scheme(8, -1))], torch.float32)
    every = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype)
    x = torch.zeros(65536, 32, dtype=dtype)
    x[:, 0] = every
    for tier in TIERS:
        got = product(monkeypatch, tier, x, packed, exact=True)[:, 0]
        assert torch.equal(torch.nan_to_num(got, 7), torch.nan_to_num(every, 7))
    # Back from float32, rounded to the nearest even: subnormal numbers and overflow among them.
    third = pack([Quantized(q, torch.ones(1, 1, 1) / 3, None, Scheme(8, -1))], torch.float32)
    large = pack([Quantized(q * 5, torch.ones(1, 1, 1), None, Scheme(8, -1))], torch.float32)
    cases = [(third, every.float() * (torch.ones(1) / 3)), (large, every.float() * 5)]
    for tier in TIERS:
        for packed, values in cases:
            got = product(monkeypatch, tier, x, packed, exact=True)[:, 0]
            assert torch.equal(torch.nan_to_num(got, 7), torch.nan_to_num(values.to(dtype), 7))


def test_a_planted_error_of_one_per_cent_is_found(monkeypatch):
    """The tolerance of these tests comes from arithmetic: one scale of one group that is off by
    1 % fails it."""
    (quantized,) = random_matrices(1, 64, 256, 4, 32, torch.float32, CPU)
    x = torch.randn(4, 256)
    wanted = reference(x, quantized)
    quantized.scale[0, 20, 3] *= 1.01
    got = product(monkeypatch, TIERS[0], x, pack([quantized], torch.float32)).double()
    with pytest.raises(AssertionError):
        torch.testing.assert_close(got, wanted, rtol=2e-6, atol=2e-6)
