"""The byte-plane layout: packed weights as the Triton kernels read them.

A matrix [N, K] is cut into tiles of 128 rows and 256 columns, a tile into 8 sub-tiles of 32
columns, and the fields of a byte come from different sub-tiles: byte b of a plane holds column b of
several sub-tiles, so unpacking needs no interleaving. In memory:

    [rows / 128] [byte planes along K] [128 rows] [32 bytes]

    bits  planes of a tile                          what byte b of a plane holds
    2     2                                         column b of sub-tiles 4p, 4p+1, 4p+2, 4p+3
    3     1 of top bits, then 2 of low pairs        top bits of 8 sub-tiles; low pairs of 4
    4     4                                         sub-tiles 2p (low nibble), 2p+1 (high nibble)
    8     8                                         sub-tile p

So every width takes exactly its bits. The last tile of a K that is no multiple of 256 keeps only
the planes its sub-tiles need. Values are unsigned: q + 2^(bits-1).

Within 16 rows x 32 columns the order is the one the target's matrix unit wants in its registers
(`Order`): a shuffle of bytes, chosen when a model is loaded. The checkpoint knows nothing of it.
"""

import torch
from jaxtyping import Int8, UInt8
from torch import Tensor

from qmoe.kernels.device.gemm import tail_planes
from qmoe.kernels.device.target import Order

ORDERS: tuple[Order, ...] = ("plain", "mma", "wgmma")
ROWS, COLUMNS, SUB = 128, 256, 32
PLANE = ROWS * SUB


def padded_rows(n: int) -> int:
    """N rounded up to whole tiles."""
    return -(-n // ROWS) * ROWS


def tail_subtiles(k: int) -> int:
    """Sub-tiles of the last, partial K tile; 0 if K is a multiple of 256."""
    return -(-(k % COLUMNS) // SUB)


def count_planes(k: int, bits: int) -> int:
    """Byte planes of 128 rows along all of K."""
    planes: int = k // COLUMNS * bits + tail_planes(bits, tail_subtiles(k))
    return planes


def matrix_bytes(n: int, k: int, bits: int) -> int:
    """Bytes of one matrix in the arena, padding included, scales not."""
    return padded_rows(n) // ROWS * count_planes(k, bits) * PLANE


def block_order(order: Order) -> Tensor:
    """[512]: which element (row * 32 + column) of a block of 16 rows is stored at each place.

    mma: rows stay; place 16h + 4t + 2j + c holds column 8t + 4j + 2h + c, so that a thread's eight
    columns are neighbours in the tokens' tile. wgmma: place 64g + 16t + 8i + 4h + 2r + c holds row
    8r + g, column 16i + 8h + 2t + c, so that the sixteen bytes of a thread are neighbours, and each
    four of them make two of its registers.
    """
    elements = torch.arange(16 * SUB)
    if order == "wgmma":
        r, g, i, h, t, c = (2, 8, 2, 2, 4, 2)
        return elements.view(r, g, i, h, t, c).permute(1, 4, 2, 3, 0, 5).flatten()
    if order == "mma":
        t, j, h, c = (4, 2, 2, 2)
        return elements.view(16, t, j, h, c).permute(0, 3, 1, 2, 4).flatten()
    return elements


def pair_rows(n: int) -> Tensor:
    """Arena rows of a gate-and-up matrix [N, K]: the row each holds, -1 for padding.

    Gate and up alternate by eights, so that both halves of an output lie in one thread and the
    activation runs where the product was computed.
    """
    half = n // 2
    blocks = torch.arange(-(-half // 8) * 8).view(-1, 8)
    blocks = torch.where(blocks < half, blocks, -1)
    return torch.cat((blocks, torch.where(blocks < 0, -1, blocks + half)), dim=1).flatten()


def pack(q: Int8[Tensor, "N K"], bits: int, order: Order) -> UInt8[Tensor, " B"]:
    """One matrix of signed integers as the arena holds it; rows and columns are padded with 0."""
    n, k = q.shape
    rows, subtiles = padded_rows(n), k // COLUMNS * 8 + tail_subtiles(k)
    stored = torch.full((rows, subtiles * SUB), 1 << (bits - 1), dtype=torch.uint8, device=q.device)
    stored[:n, :k] = (q.to(torch.int16) + (1 << (bits - 1))).to(torch.uint8)
    stored = stored.view(rows // ROWS, ROWS, subtiles, SUB).transpose(1, 2)
    blocks = stored.reshape(rows // ROWS, subtiles, ROWS // 16, 16 * SUB)
    stored = blocks[..., block_order(order).to(q.device)].unflatten(-1, (16, SUB)).flatten(2, 3)
    tiles = stored.split(8, dim=1)
    packed: Tensor = torch.cat([_planes(tile, bits) for tile in tiles], dim=1).flatten()
    return packed


def unpack(
    stored: UInt8[Tensor, " B"], bits: int, n: int, k: int, order: Order
) -> Int8[Tensor, "N K"]:
    """The inverse of `pack`."""
    rows = padded_rows(n)
    planes = stored.view(rows // ROWS, count_planes(k, bits), ROWS, SUB)
    subtiles = [8] * (k // COLUMNS) + ([tail_subtiles(k)] if tail_subtiles(k) else [])
    parts = planes.split([tail_planes(bits, s) for s in subtiles], dim=1)
    values = torch.cat([_fields(p, bits, s) for p, s in zip(parts, subtiles, strict=True)], dim=1)
    blocks = values.reshape(*values.shape[:2], ROWS // 16, 16 * SUB)
    back = torch.empty_like(blocks)
    back[..., block_order(order).to(stored.device)] = blocks
    back = back.view(values.shape)
    q = back.transpose(1, 2).reshape(rows, -1)[:n, :k].to(torch.int16) - (1 << (bits - 1))
    signed: Tensor = q.to(torch.int8)
    return signed


def _planes(tile: Tensor, bits: int) -> Tensor:
    """Sub-tiles [*, S, 128, 32] of unsigned integers to byte planes [*, planes, 128, 32]."""
    if bits == 3:
        top = _join(tile >> 2, 1)
        return torch.cat((top, _join(tile & 3, 2)), dim=1)
    return _join(tile, bits)


def _join(tile: Tensor, bits: int) -> Tensor:
    """8 / bits sub-tiles to a plane, the first in the lowest bits."""
    fields = 8 // bits
    short = -tile.shape[1] % fields
    if short:
        tile = torch.cat((tile, torch.zeros_like(tile[:, :1]).expand(-1, short, -1, -1)), dim=1)
    grouped = tile.unflatten(1, (-1, fields))
    plane: Tensor = grouped[:, :, 0].clone()
    for f in range(1, fields):
        plane |= grouped[:, :, f] << (bits * f)
    return plane


def _fields(planes: Tensor, bits: int, subtiles: int) -> Tensor:
    """The inverse of `_planes`."""
    if bits == 3:
        return _split(planes[:, :1], 1, subtiles) << 2 | _split(planes[:, 1:], 2, subtiles)
    return _split(planes, bits, subtiles)


def _split(planes: Tensor, bits: int, subtiles: int) -> Tensor:
    shifts = torch.arange(0, 8, bits, device=planes.device, dtype=torch.uint8)
    fields = planes[:, :, None] >> shifts[:, None, None] & ((1 << bits) - 1)
    return fields.flatten(1, 2)[:, :subtiles]
