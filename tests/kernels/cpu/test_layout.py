"""The CPU layout: what is packed comes back, and takes no more than it must."""

import pytest
import torch

from qmoe.format.grid import dequantize
from qmoe.kernels.cpu.layout import BITS, BLOCK, code_bytes, pack, unpack
from qmoe.kernels.cpu.stack import CpuStack
from qmoe.kernels.reference import random_matrices

CPU = torch.device("cpu")


@pytest.mark.parametrize("bits", [2, 3, 4, 8, (2, 3, 4, 8)])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("n, k, group", [(96, 128, 32), (34, 64, 64), (2, 352, -1), (20, 40, -1)])
@pytest.mark.parametrize("paired", [False, True])
def test_there_and_back(bits, symmetric, n, k, group, paired):
    matrices = random_matrices(5, n, k, bits, group, torch.bfloat16, CPU, symmetric)
    packed = pack(matrices, torch.bfloat16, paired)
    for e, matrix in enumerate(matrices):
        back = unpack(packed, e)
        assert torch.equal(back.q, matrix.q) and torch.equal(back.scale, matrix.scale)
        assert back.scheme.bits == matrix.scheme.bits
        assert symmetric or torch.equal(back.zero, matrix.zero)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_codes_take_exactly_their_bits(bits):
    packed = pack(random_matrices(3, 64, 256, bits, 32, torch.bfloat16, CPU), torch.bfloat16)
    assert code_bytes(packed) == 3 * 64 * 256 * bits // 8
    assert packed.buffer.nbytes == code_bytes(packed) + 3 * 64 * 8 * 2
    assert (packed.table[:, BLOCK] % 64 == 0).all() and (packed.table[:, BITS] == bits).all()


def test_a_stack_expands_to_its_weights():
    first = random_matrices(3, 34, 64, 3, 32, torch.float32, CPU, False)
    stack = CpuStack([first], torch.float32)
    for e, matrix in enumerate(first):
        assert torch.equal(stack.expand(e), dequantize(matrix)[0])
    assert stack.nbytes() > stack.packed_bytes() == 3 * 48 * 64 * 3 // 8
    assert str(stack) == "CpuStack([3, 34, 64], exact)"
