"""Scales that llama.cpp's K types hold."""

from dataclasses import replace

import pytest
import torch

from qmoe.config import Scheme
from qmoe.export.block_types import BLOCK_TYPES
from qmoe.export.grid import grid_of
from qmoe.format.gguf_scales import gguf_scales, widest_bits
from qmoe.format.quantized import Quantized


def reference(values: torch.Tensor, most: int) -> bool:
    """Whether one number times 0 to `most` gives all of them: tried with every multiple that the
    largest may be."""
    largest = values.max()
    for multiple in range(1, most + 1):
        unit = largest.double() / multiple
        multiples = values.double() / unit
        if torch.equal(multiples.round(), multiples):
            return True
    return False


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize(("bits", "zeros"), [(2, True), (2, False), (3, False)])
def test_super_blocks_have_a_unit(bits: int, zeros: bool, group: int, dtype: torch.dtype) -> None:
    count, most = 256 // group, {2: 15, 3: 31}[bits]
    scale = (torch.randn(5, 3 * count).exp() * 0.01).to(dtype).float()
    zero = torch.randint(-2, 2, scale.shape).float() if zeros else torch.zeros_like(scale)
    made = gguf_scales(scale, zero, bits, group, dtype)
    assert torch.equal(made.to(dtype).float(), made)
    minima = made * (zero + (1 << (bits - 1)))
    for whole, low in zip(
        made.unflatten(1, (-1, count)).flatten(0, 1),
        minima.unflatten(1, (-1, count)).flatten(0, 1),
        strict=True,
    ):
        assert reference(whole, most)
        assert bits == 3 or low.max() == 0 or reference(low, most)


def test_near_what_was_wanted() -> None:
    """The largest scale of a super-block is off by a few hundredths at most."""
    scale = (torch.rand(64, 8) + 0.5) * 0.01
    for bits, off in ((2, 0.15), (3, 0.06)):
        made = gguf_scales(scale, torch.zeros_like(scale), bits, 32, torch.bfloat16)
        assert float(((made - scale).abs() / scale).mean()) < off


def test_equal_scales_stay() -> None:
    scale = torch.full((2, 16), 0.0123).bfloat16().float()
    for bits in (2, 3):
        made = gguf_scales(scale, torch.zeros_like(scale), bits, 32, torch.bfloat16)
        assert float(((made - scale) / scale).abs().max()) < 0.02


@pytest.mark.parametrize("bits", [4, 8])
def test_other_types_keep_their_scales_within_float16(bits: int) -> None:
    scale = torch.tensor([[1e-30, 0.0123, 3e38, 1e-6]]).bfloat16().float()
    made = gguf_scales(scale, torch.zeros_like(scale), bits, 32, torch.bfloat16)
    assert torch.equal(made.half().float(), made)
    assert torch.equal(made.bfloat16().float(), made)
    assert made[0, 1] == scale[0, 1]


def test_no_super_blocks_in_odd_rows() -> None:
    scale = (torch.rand(3, 9) + 0.5).bfloat16().float()
    assert torch.equal(gguf_scales(scale, torch.zeros_like(scale), 2, 32, torch.bfloat16), scale)
    whole = torch.rand(3, 1).bfloat16().float() + 0.5
    assert torch.equal(gguf_scales(whole, torch.zeros_like(whole), 2, 512, torch.bfloat16), whole)


@pytest.mark.parametrize(
    ("scheme", "inputs", "bits"),
    [
        (Scheme(2, 32), 256, 2),
        (Scheme(2, 32), 128, 4),
        (Scheme(3, 32), 1408, 4),
        (Scheme(3, 32), 768, 3),
        (Scheme(2, 32, symmetric=False), 384, 3),
        (Scheme(3, 32, symmetric=False), 384, 3),
        (Scheme(4, 32), 128, 4),
        (Scheme(8, 32), 128, 8),
    ],
)
def test_more_bits_cost_no_byte(scheme: Scheme, inputs: int, bits: int) -> None:
    """The smallest block type of these bits is no larger than that of the scheme's own, and that of
    one bit more is."""
    assert widest_bits(scheme, inputs) == bits

    def size(bits: int) -> float:
        shape = (1, 4, inputs)
        q = torch.randint(-(1 << (bits - 1)), 1 << (bits - 1), shape, dtype=torch.int8)
        scale = torch.full((1, 4, inputs // 32), 0.125, dtype=torch.bfloat16)
        zero = None if scheme.symmetric else torch.full(scale.shape, -1, dtype=torch.int8)
        grid = grid_of(Quantized(q, scale, zero, replace(scheme, bits=bits)), 0)
        return next(kind.bits for kind in BLOCK_TYPES if kind.holds(grid))

    assert size(bits) <= size(scheme.bits)
    assert bits == 8 or size(bits + 1 if bits < 4 else 8) > size(scheme.bits)
