"""llama.cpp's block types that can hold a grid exactly: whether they do, and their bytes.

The layouts are those of ggml/src/ggml-common.h and of `gguf.quants`, by which everything written is
decoded again. Blocks are 32 inputs, super-blocks of the K types 256. The codebook types (IQ*,
MXFP4, NVFP4) are left out: their points are not evenly spaced, so they hold no grid of 2^bits
steps. So is TQ2_0 (2.06 bits): it has one scale for 256 inputs, and CUDA has no kernel for it.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qmoe.export.grid import SUPER, Array, Grid, as_whole, common_unit, in_half

Bytes = Array  # of uint8; the types of NumPy do not follow shifts


@dataclass(frozen=True)
class BlockType:
    """name: as in `gguf.GGMLQuantizationType`. bits: stored bits per weight. holds: whether the
    type has exactly the grid's weights. encode: these weights as bytes [N, K * bits / 8]."""

    name: str
    bits: float
    holds: Callable[[Grid], bool]
    encode: Callable[[Grid], Bytes]


def _within(grid: Grid, low: int, high: int) -> bool:
    return bool((grid.low >= low).all() and (grid.high <= high).all())


def _simple(grid: Grid, low: int, high: int) -> bool:
    fits = grid.group % 32 == 0 and _within(grid, low, high)
    return bool(fits and in_half(grid.scale).all())


def _half(values: Array) -> Bytes:
    """Numbers [*] as the bytes [*, 2] of their float16."""
    return np.ascontiguousarray(values.astype(np.float16))[..., None].view(np.uint8)


def _blocks(steps: Array, size: int = 32) -> Bytes:
    """Steps [N, K] as [N, K / size, size] in bytes."""
    return steps.astype(np.uint8).reshape(len(steps), -1, size)


def _rows(*parts: Bytes) -> Bytes:
    """Parts [N, B, *] of every block, one behind the other, as rows of bytes."""
    joined = np.concatenate(parts, axis=-1)
    return joined.reshape(len(joined), -1)


def _nibbles(steps: Bytes) -> Bytes:
    """[*, 32] values below 16: the first half in the low bits, the second in the high ones."""
    packed: Bytes = steps[..., :16] | steps[..., 16:] << 4
    return packed


def _q4_0(grid: Grid) -> Bytes:
    d = _half(grid.per(grid.scale, 32))
    return _rows(d, _nibbles(_blocks(grid.step + 8)))


def _q5_0(grid: Grid) -> Bytes:
    d, steps = _half(grid.per(grid.scale, 32)), _blocks(grid.step + 16)
    high = np.packbits(steps >> 4, axis=-1, bitorder="little")
    return _rows(d, high, _nibbles(steps & 15))


def _q8_0(grid: Grid) -> Bytes:
    d = _half(grid.per(grid.scale, 32))
    return _rows(d, grid.step.astype(np.int8).view(np.uint8).reshape(*d.shape[:2], 32))


def _minima(grid: Grid) -> tuple[Array, Array, Array]:
    """Scales d, minima m and whether the steps run backwards, of Q4_1's weight d * u + m with u in
    0..15. Backwards from the other end, m is a multiple of the scale by the smaller number: of 7 at
    most, so that with the 8 binary digits of a bfloat16 it is always a float16."""
    back = grid.zero > 7
    m = np.where(back, 15 - grid.zero, -grid.zero) * grid.scale
    return np.where(back, -grid.scale, grid.scale), m.astype(np.float32), back


def _holds_q4_1(grid: Grid) -> bool:
    fits = grid.group % 32 == 0 and grid.bits <= 4
    return bool(fits and in_half(grid.scale).all() and in_half(_minima(grid)[1]).all())


def _q4_1(grid: Grid) -> Bytes:
    d, m, back = _minima(grid)
    u = grid.step + grid.per(grid.zero, 1)
    u = np.where(grid.per(back, 1), 15 - u, u)
    return _rows(_half(grid.per(d, 32)), _half(grid.per(m, 32)), _nibbles(_blocks(u)))


@dataclass(frozen=True)
class _Super:
    """Of every super-block: the scales' unit d [N, S] and multiples [N, S, P], and the same of
    minima, zero * scale. P parts of 256 / P inputs."""

    d: NDArray[np.float64]
    scales: NDArray[np.uint8]
    dmin: NDArray[np.float64]
    minima: NDArray[np.uint8]


def _super(grid: Grid, parts: int, most: int) -> _Super | None:
    """None where rows are not made of super-blocks, or one has no unit. most: of a multiple."""
    size = SUPER // parts
    if grid.step.shape[1] % SUPER or grid.group % size:
        return None
    shape = (len(grid.scale), -1, parts)
    scale = grid.per(grid.scale, size).reshape(shape)
    whole, exponent = as_whole(scale)
    scales = common_unit(whole, exponent, most)
    minima = common_unit(whole * grid.per(grid.zero, size).reshape(shape), exponent, most)
    if scales is None or minima is None:
        return None
    return _Super(scales[1], scales[0].astype(np.uint8), minima[1], minima[0].astype(np.uint8))


def _holds_q2_k(grid: Grid) -> bool:
    return grid.bits == 2 and _super(grid, 16, 15) is not None


def _q2_k(grid: Grid) -> Bytes:
    made = _super(grid, 16, 15)
    assert made is not None
    q = _blocks(grid.step + grid.per(grid.zero, 1), SUPER)
    quarters = q.reshape(*q.shape[:2], 2, 4, 32)
    packed = (quarters << np.array([0, 2, 4, 6], np.uint8)[:, None]).sum(-2, dtype=np.uint8)
    packed = packed.reshape(*q.shape[:2], 64)
    return _rows(made.scales | made.minima << 4, packed, _half(made.d), _half(made.dmin))


def _q3_k_scales(grid: Grid) -> tuple[NDArray[np.int64], NDArray[np.float64]] | None:
    """Q3_K has no minima, and multiples of -32 to 31, of which those above 0 are taken."""
    if grid.step.shape[1] % SUPER or not _within(grid, -4, 3):
        return None
    scale = grid.per(grid.scale, 16).reshape(len(grid.scale), -1, 16)
    return common_unit(*as_whole(scale), 31)


def _q3_k(grid: Grid) -> Bytes:
    made = _q3_k_scales(grid)
    assert made is not None
    q = _blocks(grid.step + 4, SUPER)
    shape = q.shape[:2]
    bits = (q >> 2).reshape(*shape, 8, 32) << np.arange(8, dtype=np.uint8)[:, None]
    quarters = (q & 3).reshape(*shape, 2, 4, 32) << np.array([0, 2, 4, 6], np.uint8)[:, None]
    scales = (made[0] + 32).astype(np.uint8)
    low = (scales[..., :8] & 15) | (scales[..., 8:] & 15) << 4
    top = (scales >> 4).reshape(*shape, 4, 4) << np.array([0, 2, 4, 6], np.uint8)[:, None]
    return _rows(
        bits.sum(-2, dtype=np.uint8),
        quarters.sum(-2, dtype=np.uint8).reshape(*shape, 64),
        low,
        top.sum(-2, dtype=np.uint8),
        _half(made[1]),
    )


def _holds_q4_k(grid: Grid) -> bool:
    return grid.bits <= 4 and _super(grid, 8, 63) is not None


def _q4_k(grid: Grid) -> Bytes:
    made = _super(grid, 8, 63)
    assert made is not None
    q = _blocks(grid.step + grid.per(grid.zero, 1), SUPER)
    halves = q.reshape(*q.shape[:2], 4, 2, 32)
    packed = halves[..., 0, :] | halves[..., 1, :] << 4
    s, m = made.scales, made.minima
    first = s[..., :4] | (s[..., 4:] >> 4) << 6
    second = m[..., :4] | (m[..., 4:] >> 4) << 6
    third = (s[..., 4:] & 15) | (m[..., 4:] & 15) << 4
    packed = packed.reshape(*q.shape[:2], 128)
    return _rows(_half(made.d), _half(made.dmin), first, second, third, packed)


# The smallest first; of equal size the one that more of llama.cpp's kernels are made for.
BLOCK_TYPES = (
    BlockType("Q2_K", 2.625, _holds_q2_k, _q2_k),
    BlockType("Q3_K", 3.4375, lambda grid: _q3_k_scales(grid) is not None, _q3_k),
    BlockType("Q4_0", 4.5, lambda grid: _simple(grid, -8, 7), _q4_0),
    BlockType("Q4_K", 4.5, _holds_q4_k, _q4_k),
    BlockType("Q4_1", 5.0, _holds_q4_1, _q4_1),
    BlockType("Q5_0", 5.5, lambda grid: _simple(grid, -16, 15), _q5_0),
    BlockType("Q8_0", 8.5, lambda grid: _simple(grid, -128, 127), _q8_0),
)
