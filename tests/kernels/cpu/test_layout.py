"""The CPU layout: what is packed comes back, and takes no more than it must."""

import pytest
import torch

from qmoe.format.grid import dequantize
from qmoe.format.packing import StoredWords, pack_rows
from qmoe.kernels.cpu.layout import BITS, BLOCK, CODES, DATA, ZEROS, code_bytes, pack, unpack
from qmoe.kernels.cpu.library import library
from qmoe.kernels.cpu.stack import CpuStack
from qmoe.kernels.reference import random_matrices

pytestmark = pytest.mark.skipif(library() is None, reason="installed without a C compiler")
CPU = torch.device("cpu")


def reference(matrix, shape, row):
    """The blocks of one matrix [1, N, K] in torch, as csrc/qmoe_cpu.h describes them."""
    half, bits = 1 << (row[BITS] - 1), row[BITS]
    codes = (matrix.q[0].to(torch.int16) + half).to(torch.uint8)
    pieces = in_blocks(codes, shape).unflatten(-1, (-1, shape.piece))
    pieces = torch.nn.functional.pad(pieces, (0, -shape.piece % 32))
    vectors = pieces.reshape(-1, 16, shape.steps, 8, 4).permute(0, 2, 3, 1, 4).flatten(3)
    blocks = torch.zeros(len(vectors), row[BLOCK], dtype=torch.uint8)
    blocks[:, row[CODES] :] = join(vectors, bits).flatten(1)
    scale = columns_of(in_blocks(matrix.scale[0].to(shape.dtype), shape)).view(torch.uint8)
    blocks[:, : scale.shape[1]] = scale
    if matrix.zero is not None:
        zero = (matrix.zero[0].to(torch.int16) + half).to(torch.uint8)
        zero = columns_of(in_blocks(zero, shape))
        blocks[:, row[ZEROS] :][:, : zero.shape[1]] = zero
    return blocks.flatten()


def in_blocks(rows, shape):
    """[N, *] to [blocks * 16, *]: rows padded, gate and up blocks taking turns if paired."""
    parts = rows.unflatten(0, (shape.parts, -1))
    parts = torch.nn.functional.pad(parts, (0, 0, 0, -parts.shape[1] % 16))
    return parts.unflatten(1, (-1, 16)).transpose(0, 1).flatten(0, 2)


def columns_of(rows):
    """[blocks * 16, G] to [blocks, G * 16]."""
    return rows.unflatten(0, (-1, 16)).transpose(1, 2).flatten(1).contiguous()


def join(vectors, bits):
    """Eight vectors of codes [*, 8, 64] in `bits` vectors."""
    low = 2 if bits == 3 else bits
    shifts = torch.arange(0, 8, low, dtype=torch.uint8)[:, None]
    fields = (vectors & ((1 << low) - 1)).unflatten(2, (-1, 8 // low))
    joined = (fields << shifts).sum(3, dtype=torch.uint8)
    if bits != 3:
        return joined
    places = torch.arange(8, dtype=torch.uint8)[:, None]
    top = (vectors >> 2 << places).sum(2, keepdim=True, dtype=torch.uint8)
    return torch.cat((joined, top), dim=2)


def as_words(matrix):
    """The same matrix as a checkpoint has it."""
    words = pack_rows(matrix.q, matrix.scheme.bits)
    return StoredWords(words, matrix.q.shape[2], matrix.scale, matrix.zero, matrix.scheme)


SIZES = [
    # N, K, group
    (96, 128, 32),
    (34, 64, 64),
    (2, 352, -1),
    (20, 40, -1),  # a step of 32 and one of 8
    (38, 9, -1),
]


@pytest.mark.parametrize("bits", [2, 3, 4, 8, (2, 3, 4, 8)])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("n, k, group", SIZES)
@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_bytes_are_those_of_the_definition(bits, symmetric, n, k, group, paired, dtype):
    matrices = random_matrices(5, n, k, bits, group, torch.bfloat16, CPU, symmetric)
    packed = pack(matrices, dtype, paired)
    for matrix, row in zip(matrices, packed.table.tolist(), strict=True):
        wanted = reference(matrix, packed.shape, row)
        assert torch.equal(packed.buffer[row[DATA] :][: len(wanted)], wanted)
    of_words = pack([as_words(m) for m in matrices], dtype, paired)
    assert torch.equal(of_words.buffer, packed.buffer)
    assert torch.equal(of_words.table, packed.table)


def test_what_does_not_fit_together_is_refused():
    one, other = (random_matrices(1, n, 64, 4, 32, torch.float32, CPU)[0] for n in (16, 32))
    words = as_words(one)
    short = StoredWords(words.words[..., 1:], 64, words.scale, None, words.scheme)
    for stacks in ([one, other], [short]):
        with pytest.raises(ValueError, match="expected matrices"):
            pack(stacks, torch.float32)


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
