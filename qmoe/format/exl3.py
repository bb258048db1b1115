"""EXL3's trellis codes (exllamav3, MIT): tiles of 16 x 16 weights, each a ring of 256 * rate bits.

The value at a position of a tile follows from the 16 bits of its ring that end there, by one of
three codebooks. A rate is 1 to 8 bits a weight, in halves. A tile is stored as 32-bit words whose
highest bit comes first, each word as two int16. Rows of a tile are inputs, columns outputs; the
order of positions is that in which a GPU's matrix unit holds them.

Left out: the scales and rotations around the codes (trellis.py), and the search for codes
(kernels/cpu/encode.py).
"""

from functools import cache
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int, Int16
from torch import Tensor

Codebook = Literal["mul1", "mcg", "3inst"]
CODEBOOKS: tuple[Codebook, ...] = get_args(Codebook)
MULTIPLIERS = {"mul1": 0x83DCD12D, "mcg": 0xCBAC1FED}  # stored beside the codes that they decode
SIDE, LENGTH, WINDOW, STATES = 16, 256, 16, 1 << 16
RATES = tuple(half / 2 for half in range(2, 17))


@cache
def codebook_values(codebook: Codebook) -> Float[Tensor, " 65536"]:
    """The value of every state, float32 (exact: the codebooks compute in float16)."""
    state = torch.arange(STATES, dtype=torch.int64)
    if codebook == "mul1":
        word = state * MULTIPLIERS["mul1"] & 0xFFFFFFFF
        total = sum((word >> 8 * i & 255 for i in range(4)), torch.zeros_like(word))
        # A fused multiply-add of float16: exact in float64, rounded once.
        factor, bias = _float16(0x1EEE), _float16(0xC931)
        return ((1024 + total).double() * factor + bias).to(torch.float16).float()
    word = state * MULTIPLIERS["mcg"] if codebook == "mcg" else state * 89226354 + 64248484
    word = (word & 0x8FFF8FFF) ^ 0x3B603B60
    low, high = (word >> shift & 0xFFFF for shift in (0, 16))
    return (_halves(low) + _halves(high)).float()


def _halves(bits: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    return torch.where(bits < 1 << 15, bits, bits - (1 << 16)).to(torch.int16).view(torch.float16)


def _float16(bits: int) -> float:
    return float(_halves(torch.tensor([bits]))[0])


@cache
def tile_order() -> Int[Tensor, " 256"]:
    """Of every position of the ring, the place 16 * row + column in its tile."""
    position = torch.arange(LENGTH)
    lane, place = position // 8, position % 8
    row = 2 * (lane % 4) + torch.tensor([0, 1, 8, 9])[place % 4]
    return SIDE * row + lane // 4 + 8 * (place // 4)


def ends(rate: float) -> Int[Tensor, " 256"]:
    """Of every position, how many bits of the ring lie before the end of its window."""
    return (torch.arange(1, LENGTH + 1) * int(2 * rate)) // 2


def states_of(trellis: Int16[Tensor, "*any W"]) -> Int[Tensor, "*any 256"]:
    """The 16 bits that end at every position of stored tiles of 16 * rate numbers."""
    half = trellis.long() & 0xFFFF
    word = half[..., 0::2] | half[..., 1::2] << 16
    bits = (word[..., None] >> torch.arange(31, -1, -1) & 1).flatten(-2)
    end, count = ends(trellis.shape[-1] / SIDE), bits.shape[-1]
    state = torch.zeros(*bits.shape[:-1], LENGTH, dtype=torch.long)
    for i in range(WINDOW):
        state = state << 1 | bits[..., (end - WINDOW + i) % count]
    return state


def tiles_of(states: Int[Tensor, "*any 256"], rate: float) -> Int16[Tensor, "*any W"]:
    """The stored tiles of states, of which each continues the one before: the inverse of
    `states_of`. Only the bits that are new at a position are read."""
    end = ends(rate)
    fresh = end - torch.cat([torch.zeros(1, dtype=torch.long), end[:-1]])
    bit = torch.arange(int(end[-1]))
    position = torch.searchsorted(end, bit, right=True)
    behind = end[position] - 1 - bit  # bits of the symbol that follow this one
    assert bool((behind < fresh[position]).all())
    bits = (states.long()[..., position] >> behind & 1).unflatten(-1, (-1, 32))
    word = (bits << torch.arange(31, -1, -1)).sum(-1)
    half = torch.stack([word & 0xFFFF, word >> 16], dim=-1).flatten(-2)
    return torch.where(half < 1 << 15, half, half - (1 << 16)).to(torch.int16)


def to_tiles(matrix: Float[Tensor, "*any K N"]) -> Float[Tensor, "*any k n 256"]:
    """A matrix [K, N], multiples of 16, as tiles whose values lie in the order of the ring."""
    tiles = matrix.unflatten(-2, (-1, SIDE)).unflatten(-1, (-1, SIDE)).transpose(-3, -2)
    ordered: Tensor = tiles.flatten(-2)[..., tile_order()]
    return ordered


def from_tiles(tiles: Float[Tensor, "*any k n 256"]) -> Float[Tensor, "*any K N"]:
    """The inverse of `to_tiles`."""
    place = torch.empty(LENGTH, dtype=torch.long)
    place[tile_order()] = torch.arange(LENGTH)
    matrix = tiles[..., place].unflatten(-1, (SIDE, SIDE)).transpose(-3, -2)
    whole: Tensor = matrix.flatten(-4, -3).flatten(-2)
    return whole


def decode(trellis: Int16[Tensor, "*any k n W"], codebook: Codebook) -> Float[Tensor, "*any K N"]:
    """The matrices [K, N] that stored tiles stand for, float32, without scales and rotations."""
    return from_tiles(codebook_values(codebook)[states_of(trellis)])
