"""The grid of one quantized matrix as whole numbers, which is what block types are asked to hold.

A weight is step * scale with a whole step: step = q - zero. A block type holds a matrix if it has
the same steps, and if its scales (float16, or float16 times small whole numbers) are the same
numbers. Everything here is NumPy, because the `gguf` package is.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qmoe.format.grid import FAR
from qmoe.format.quantized import Quantized

Array = NDArray[Any]
SUPER = 256  # inputs of a super-block of llama.cpp's K types


@dataclass(frozen=True)
class Grid:
    """step [N, K] int16: q - zero. scale [N, G] float32; 0 where all steps of a group are 0, which
    then stand for 0 with any scale. zero [N, G] int16, counted from the smallest stored integer.
    low, high [N, G]: smallest and largest step of each group."""

    step: NDArray[np.int16]
    scale: NDArray[np.float32]
    zero: NDArray[np.int16]
    low: NDArray[np.int16]
    high: NDArray[np.int16]
    bits: int

    @property
    def group(self) -> int:
        """Inputs that share a scale."""
        return int(self.step.shape[1] // self.scale.shape[1])

    def weight(self) -> NDArray[np.float32]:
        """The float32 weights [N, K] that the grid stands for."""
        weight: NDArray[np.float32] = self.step.astype(np.float32) * self.per(self.scale, 1)
        return weight

    def per(self, values: Array, inputs: int) -> Array:
        """Values of groups [N, G] as values of every `inputs` inputs, which groups consist of."""
        return np.repeat(values, self.group // inputs, axis=1)


def grid_of(quantized: Quantized, e: int) -> Grid:
    """The grid of matrix `e` of a stack that is not rotated."""
    bits = quantized.scheme.bits
    scale = quantized.scale[e].float().numpy()
    q = quantized.q[e].numpy().astype(np.int16)
    zero = np.zeros(scale.shape, np.int16)
    if quantized.zero is not None:
        zero = quantized.zero[e].numpy().astype(np.int16)
    step = (q.reshape(*scale.shape, -1) - zero[..., None]).astype(np.int16)
    low, high = step.min(-1), step.max(-1)
    scale = np.where((low == 0) & (high == 0), np.float32(0), scale)
    whole = (zero + (1 << (bits - 1))).astype(np.int16)
    return Grid(step.reshape(q.shape), scale, whole, low, high, bits)


def in_half(scale: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Where numbers are float16 numbers."""
    with np.errstate(over="ignore"):
        return np.asarray(scale.astype(np.float16).astype(np.float32) == scale)


def refitted(grid: Grid) -> tuple[Grid, int, float]:
    """The grid with every scale that float16 has not moved to the nearest one that it has, how many
    were moved, and by how much at most, as a share of the scale; infinity if one is too large. The
    steps stay what they are."""
    with np.errstate(over="ignore"):
        near = grid.scale.astype(np.float16).astype(np.float32)
    off = np.abs(near - grid.scale) / np.where(grid.scale > 0, grid.scale, 1)
    return replace(grid, scale=near), int((off > 0).sum()), float(off.max(initial=0))


def near_enough(off: float) -> bool:
    """Whether a scale may be off by this share, as where one is loaded in another dtype."""
    return off <= FAR


def common_unit(
    whole: NDArray[np.int64], exponent: NDArray[np.int32], most: int
) -> tuple[NDArray[np.int64], NDArray[np.float64]] | None:
    """A float16 number [N, S] of which all numbers whole * 2^exponent [N, S, P] are multiples, 0 to
    `most`, and the multiples [N, S, P]; None if one of the S has no such number."""
    some = whole != 0
    least = np.where(some, exponent, np.iinfo(np.int32).max).min(-1, keepdims=True)
    shift = np.where(some, exponent - least, 0)
    if (shift > 24).any():  # larger than any multiple of a number with 24 digits
        return None
    shifted = whole << shift
    divisor = np.gcd.reduce(shifted, axis=-1)
    multiples = shifted // np.maximum(divisor, 1)[..., None]
    largest = np.ldexp(divisor.astype(np.float64), np.where(some.any(-1), least[..., 0], 0))
    unit, factor = np.zeros_like(largest), np.zeros(largest.shape, np.int64)
    for part in range(1, most + 1):  # one with too many digits may have a part with fewer
        small = (largest / part).astype(np.float16).astype(np.float64)
        fits = (factor == 0) & (small * part == largest) & (multiples.max(-1) * part <= most)
        unit, factor = np.where(fits, small, unit), np.where(fits, part, factor)
    return (multiples * factor[..., None], unit) if (factor > 0).all() else None


def as_whole(scale: NDArray[np.float32]) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """float32 numbers as whole * 2^exponent, exactly."""
    mantissa, exponent = np.frexp(scale)
    return (mantissa.astype(np.float64) * (1 << 24)).astype(np.int64), exponent - 24
