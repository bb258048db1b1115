"""Block types hold what they say, as the `gguf` package reads them."""

import gguf
import numpy as np
import pytest
import torch

from qmoe.config import Scheme
from qmoe.errors import AuditError
from qmoe.export.block_types import BLOCK_TYPES
from qmoe.export.grid import Grid, grid_of, refitted
from qmoe.export.planned import checked
from qmoe.format.gguf_scales import gguf_scales
from qmoe.format.grid import dequantize, limits
from qmoe.format.quantized import Quantized

BY_NAME = {kind.name: kind for kind in BLOCK_TYPES}


def random_stack(
    bits: int, group: int, symmetric: bool, K: int = 512, dtype: torch.dtype = torch.bfloat16
) -> Quantized:
    """Every integer and every zero point there is, and scales of all sizes."""
    low, high = limits(bits)
    q = torch.randint(low, high + 1, (1, 24, K), dtype=torch.int8)
    G = 1 if group == -1 else K // group
    scale = (torch.randn(1, 24, G).exp() * 0.01).to(dtype)
    zero = None if symmetric else torch.randint(low, high + 1, (1, 24, G), dtype=torch.int8)
    return Quantized(q, scale, zero, Scheme(bits, group, symmetric))


def settled(stack: Quantized) -> Quantized:
    """The same with scales that K types hold."""
    zero = torch.zeros_like(stack.scale) if stack.zero is None else stack.zero
    group = stack.q.shape[2] // stack.scale.shape[2]
    scale = gguf_scales(stack.scale.float(), zero.float(), stack.scheme.bits, group, torch.bfloat16)
    return Quantized(stack.q, scale.to(torch.bfloat16), stack.zero, stack.scheme)


def smallest(grid: Grid) -> str | None:
    return next((kind.name for kind in BLOCK_TYPES if kind.holds(grid)), None)


@pytest.mark.parametrize("group", [32, 64, 128, -1])
@pytest.mark.parametrize(
    ("bits", "symmetric", "k_type", "expected"),
    [
        (2, True, True, "Q2_K"), (2, False, True, "Q2_K"), (2, True, False, "Q4_0"),
        (2, False, False, "Q4_0"), (3, True, True, "Q3_K"), (3, True, False, "Q4_0"),
        (3, False, True, "Q4_0"), (4, True, False, "Q4_0"), (4, False, False, "Q4_1"),
        (8, True, False, "Q8_0"),
    ],
)  # fmt: skip
def test_smallest_type(bits: int, symmetric: bool, k_type: bool, expected: str, group: int) -> None:
    """The type that is chosen is the one that docs/gguf.md says, and decodes to equal weights."""
    stack = random_stack(bits, group, symmetric)
    if k_type:
        stack = settled(stack)
    if group == -1:  # one scale per row has a common unit with itself
        expected = {2: "Q2_K", 3: "Q3_K" if symmetric else "Q4_0"}.get(bits, expected)
        expected = "Q4_K" if (bits, symmetric) == (4, False) else expected
    grid = grid_of(stack, 0)
    np.testing.assert_array_equal(grid.weight(), dequantize(stack)[0].numpy())
    assert smallest(grid) == expected
    made = checked(grid, BY_NAME[expected], "w")
    decoded = gguf.quants.dequantize(made, gguf.GGMLQuantizationType[expected])
    np.testing.assert_array_equal(decoded, dequantize(stack)[0].numpy())
    assert made.nbytes * 8 == BY_NAME[expected].bits * grid.step.size


@pytest.mark.parametrize("kind", BLOCK_TYPES, ids=lambda kind: kind.name)
def test_every_type_that_holds_decodes(kind: object) -> None:
    """Not only the smallest: whatever type says that it holds a grid has its weights."""
    held = 0
    for bits in (2, 3, 4, 8):
        for symmetric in (True, False):
            for group in (32, 128, -1):
                for stack in (random_stack(bits, group, symmetric),):
                    for grid in (grid_of(stack, 0), grid_of(settled(stack), 0)):
                        if kind.holds(grid):
                            checked(grid, kind, "w")
                            held += 1
    assert held


def test_q4_0_by_hand() -> None:
    """The first 16 weights are the low halves of the bytes, the others the high ones."""
    q = (torch.arange(32) % 16 - 8).to(torch.int8)[None, None]
    stack = Quantized(q, torch.tensor([[[0.5]]]), None, Scheme(4, 32))
    made = BY_NAME["Q4_0"].encode(grid_of(stack, 0))
    half = list(np.array([0.5], np.float16).tobytes())
    assert made.tolist() == [half + [i | i << 4 for i in range(16)]]


def test_zero_points_run_backwards() -> None:
    """scale * 11 has more digits than float16; from the other end it is scale * 4."""
    scale = torch.tensor([[[1 + 127 / 128]]], dtype=torch.bfloat16)
    q = torch.arange(-8, 8, dtype=torch.int8).repeat(2)[None, None]
    stack = Quantized(q, scale, torch.tensor([[[3]]], dtype=torch.int8), Scheme(4, 32, False))
    grid = grid_of(stack, 0)
    assert float(np.float16(float(scale) * 11)) != float(scale) * 11
    assert smallest(grid) == "Q4_1"
    assert checked(grid, BY_NAME["Q4_1"], "w").view(np.float16)[0, 0] < 0


def test_zero_points_with_scales_of_eleven_digits() -> None:
    """Float16 has no room for scale * zero point; steps up to 15 fit Q5_0."""
    stack = random_stack(4, 32, symmetric=False, dtype=torch.float16)
    assert smallest(grid_of(stack, 0)) == "Q5_0"


def test_eight_bits_with_zero_points_have_no_type() -> None:
    assert smallest(grid_of(random_stack(8, 32, symmetric=False), 0)) is None


def test_odd_widths() -> None:
    """Rows that are no multiple of 256 have no super-blocks; of 32, no blocks."""
    assert smallest(grid_of(settled(random_stack(2, 32, True, K=288)), 0)) == "Q4_0"
    assert smallest(grid_of(random_stack(4, -1, True, K=96), 0)) == "Q4_0"
    assert smallest(grid_of(random_stack(4, -1, True, K=48), 0)) is None


def test_empty_groups_fit_any_type() -> None:
    """A group of nothing but zeros has the smallest scale that its dtype has, which float16 has
    not; it stands for zeros with any scale."""
    stack = settled(random_stack(2, 32, symmetric=False))
    stack.q[0, :, :32] = stack.zero[0, :, :1]
    stack.scale[0, :, 0] = torch.finfo(torch.bfloat16).tiny
    grid, moved, off = refitted(grid_of(stack, 0))
    assert (moved, off) == (0, 0.0)
    assert smallest(grid) == "Q2_K"
    checked(grid, BY_NAME["Q2_K"], "w")


def test_scales_outside_float16() -> None:
    """Steps stay, the scale becomes the nearest number of float16, and that is counted."""
    stack = random_stack(4, 32, symmetric=True)
    stack.scale[0, 0, 0], stack.scale[0, 1, 1] = 1.04e-6, 1e-12
    grid, moved, off = refitted(grid_of(stack, 0))
    assert moved == 2
    assert off == 1.0  # nothing is near 1e-12
    assert grid.scale[0, 0] == np.float32(np.float16(stack.scale[0, 0, 0].float()))
    assert smallest(grid) == "Q4_0"
    stack.scale[0, 0, 0] = 1e6
    assert refitted(grid_of(stack, 0))[2] == np.inf


def test_a_wrong_byte_is_found() -> None:
    """The check of what is written can fail."""
    grid = grid_of(random_stack(4, 32, symmetric=True), 0)
    kind = BY_NAME["Q4_0"]
    broken = type(kind)(kind.name, kind.bits, kind.holds, lambda grid: kind.encode(grid) ^ 16)
    with pytest.raises(AuditError, match="decodes to other weights"):
        checked(grid, broken, "w")
