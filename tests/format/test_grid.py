"""The numbers of the format: our grid against compressed-tensors', golden words, round trips."""

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.utils import calculate_qparams

from qmoe.config import Scheme
from qmoe.format.grid import dequantize, grid_of, limits
from qmoe.format.packing import pack_rows, pack_zeros, packed_words, unpack_rows, unpack_zeros
from qmoe.kernels.unpack import unpack_bytes
from qmoe.solvers.rtn import rtn

SCHEMES = [Scheme(b, g, s) for b in (2, 3, 4, 8) for g in (32, -1) for s in (True, False)]


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_grid_is_that_of_compressed_tensors(scheme):
    weight = torch.randn(3, 10, 64)
    weight[0, 0] = weight[0, 0].abs()  # a range that does not hold zero must be widened to it
    scale, zero = grid_of(weight, scheme, torch.float32)
    groups = weight.unflatten(-1, (scheme.groups(64), -1))
    args = QuantizationArgs(num_bits=scheme.bits, symmetric=scheme.symmetric)
    theirs, their_zero = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
    torch.testing.assert_close(scale, theirs)
    assert torch.equal(zero, their_zero.float())


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounding_error_is_at_most_half_a_step(scheme, dtype):
    weight = torch.randn(2, 8, 64)
    quantized = rtn(weight, scheme, dtype)
    step = quantized.scale.float().repeat_interleave(64 // quantized.scale.shape[-1], -1)
    # The end of the range may be clipped by up to the rounding of the scale itself.
    slack = 0.5 + 2**scheme.bits * torch.finfo(dtype).eps
    assert ((dequantize(quantized) - weight).abs() <= slack * step).all()
    assert quantized.scale.dtype == dtype
    low, high = limits(scheme.bits)
    assert quantized.q.min() >= low and quantized.q.max() <= high


def test_a_group_of_zeros_stays_zero():
    quantized = rtn(torch.zeros(1, 2, 32), Scheme(4, 32, False), torch.bfloat16)
    assert (dequantize(quantized) == 0).all() and (quantized.scale > 0).all()


def test_golden_words():
    q = torch.arange(-8, 8, dtype=torch.int8).view(1, 1, 16)
    # Nibble i of the little-endian words holds value i plus 8.
    assert pack_rows(q, 4).tolist() == [[[0x76543210, 0xFEDCBA98 - 2**32]]]
    q = torch.tensor([-4, -3, -2, -1, 0, 1, 2, 3, -4, -3, -2], dtype=torch.int8).view(1, 1, 11)
    bits = sum(v << 3 * i for i, v in enumerate([0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2]))
    low, high = bits & 0xFFFFFFFF, bits >> 32  # value 10 straddles the two words
    assert pack_rows(q, 3).tolist() == [[[low - 2**32 if low >> 31 else low, high]]]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("n, k", [(1, 32), (5, 96), (16, 128), (7, 50)])  # 50: rows end mid-word
def test_rows_and_zero_points_come_back(bits, n, k):
    low, high = limits(bits)
    q = torch.randint(low, high + 1, (3, n, k), dtype=torch.int8)
    packed = pack_rows(q, bits)
    assert packed.shape == (3, n, packed_words(k, bits)) and packed.dtype == torch.int32
    assert torch.equal(unpack_rows(packed, bits, k), q)
    zero = torch.randint(low, high + 1, (3, n, 4), dtype=torch.int8)
    words = pack_zeros(zero, bits)
    assert words.shape == (3, packed_words(n, bits), 4)
    assert torch.equal(unpack_zeros(words, bits, n), zero)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_unpacking_bytes_equals_unpacking_words(bits):
    low, high = limits(bits)
    q = torch.randint(low, high + 1, (2, 5, 96), dtype=torch.int8)
    packed = pack_rows(q, bits).view(torch.uint8)
    assert torch.equal(unpack_bytes(packed, bits, 96), q)
