"""Bytes of pack-quantized rows back to integers, vectorized over whole matrices.

The same bits as packing.unpack_rows reads, from the little-endian byte view of the int32 words;
that one is the reference, this one is made for use inside a forward pass.
"""

import torch
from jaxtyping import Int8, UInt8
from torch import Tensor


def unpack_bytes(
    packed: UInt8[Tensor, "*stack N B"], bits: int, in_features: int
) -> Int8[Tensor, "*stack N K"]:
    """Signed integers of every row; padding at the end of a row is dropped."""
    if bits == 8:
        values = packed
    elif bits == 3:
        # Eight values in three bytes: join them in one word and shift it.
        triples = -(-in_features // 8)
        packed = torch.nn.functional.pad(packed, (0, max(0, 3 * triples - packed.shape[-1])))
        b = packed[..., : 3 * triples].unflatten(-1, (-1, 3)).to(torch.int32)
        word = b[..., 0] | b[..., 1] << 8 | b[..., 2] << 16
        shifts = torch.arange(0, 24, 3, device=packed.device, dtype=torch.int32)
        values = (word[..., None] >> shifts & 7).to(torch.uint8).flatten(-2)
    else:
        fields = [(packed >> shift) & ((1 << bits) - 1) for shift in range(0, 8, bits)]
        values = torch.stack(fields, dim=-1).flatten(-2)
    # Taking 2^(bits-1) off modulo 256 turns the stored offset into two's complement.
    return (values[..., :in_features] - (1 << (bits - 1))).view(torch.int8)
