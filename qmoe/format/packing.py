"""Stored integers <-> int32 words of compressed-tensors' pack-quantized format.

    weight_packed      [N, ceil(K * bits / 32)]   rows packed along K, no padding between values
    weight_zero_point  [ceil(N * bits / 32), G]   packed along N (only if asymmetric)

Value i of a row starts at bit i * bits of the row's little-endian bit string and is stored with
an offset of 2^(bits-1). compressed-tensors packs them. Reading does without it, because vLLM 0.32
demands compressed-tensors 0.17, which cannot unpack 3 bits: its words hold ten values and two
unused bits.
"""

from dataclasses import dataclass, replace
from itertools import groupby
from math import gcd

import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from jaxtyping import Float, Int8, Int32, UInt8
from torch import Tensor

from qmoe.config import Scheme
from qmoe.format.quantized import Quantized

UNPACKED = 8  # experts unpacked at once: unpacking takes several times what it gives


@dataclass(frozen=True)
class StoredWords:
    """A Quantized stack whose integers are a checkpoint's words; k: columns of its matrices. If
    their widths differ, the rows of the narrower ones end in words that mean nothing."""

    words: Int32[Tensor, "E N W"]
    k: int
    scale: Float[Tensor, "E N G"]
    zero: Int8[Tensor, "E N G"] | None
    scheme: Scheme
    widths: tuple[int, ...] = ()

    def unpack(self) -> Quantized:
        q = torch.cat([
            unpack_rows(part, run.scheme.bits, self.k)
            for run in self.runs()
            for part in run.words.split(UNPACKED)
        ])  # fmt: skip
        return Quantized(q, self.scale, self.zero, self.scheme, self.widths)

    def runs(self) -> list["StoredWords"]:
        """Neighbouring matrices of one width, as stacks of one scheme."""
        if not self.widths:
            return [self]
        found, start = [], 0
        for bits, same in groupby(self.widths):
            some = slice(start, start + len(list(same)))
            words = self.words[some, :, : packed_words(self.k, bits)]
            zero = None if self.zero is None else self.zero[some]
            scheme = replace(self.scheme, bits=bits)
            found.append(StoredWords(words, self.k, self.scale[some], zero, scheme))
            start = some.stop
        return found


def pack_rows(q: Int8[Tensor, "E N K"], bits: int) -> Int32[Tensor, "E N W"]:
    """Pack along K."""
    packed: Tensor = pack_to_int32(q, bits)
    return packed


def unpack_rows(
    words: Int32[Tensor, "E N W"], bits: int, in_features: int
) -> Int8[Tensor, "E N K"]:
    """Inverse of pack_rows."""
    step = gcd(bits, 8)  # bits that are moved at once; they lie in one byte
    fields = _split(words.contiguous().view(torch.uint8), step)
    unsigned = _joined(fields[..., : in_features * bits // step], bits // step, step)
    return (unsigned - (1 << (bits - 1))).view(torch.int8)


def _split(values: UInt8[Tensor, "*any V"], step: int) -> UInt8[Tensor, "*any F"]:
    """Bytes in fields of `step` bits, the lowest field first."""
    if step == 8:
        return values
    shifts = torch.arange(0, 8, step, dtype=torch.uint8, device=values.device)
    return (values[..., None] >> shifts & ((1 << step) - 1)).flatten(-2)


def _joined(fields: UInt8[Tensor, "*any F"], count: int, step: int) -> UInt8[Tensor, "*any V"]:
    """Each `count` fields of `step` bits as one value."""
    if count == 1:
        return fields
    first, *others = fields.unflatten(-1, (-1, count)).unbind(-1)
    joined: Tensor = first.clone()
    for i, field in enumerate(others, start=1):
        joined |= field << (i * step)
    return joined


def pack_zeros(zero: Int8[Tensor, "E N G"], bits: int) -> Int32[Tensor, "E Wn G"]:
    """Pack zero points along N."""
    packed: Tensor = pack_to_int32(zero, bits, packed_dim=0)
    return packed


def unpack_zeros(
    words: Int32[Tensor, "E Wn G"], bits: int, out_features: int
) -> Int8[Tensor, "E N G"]:
    """Inverse of pack_zeros."""
    # Not `contiguous`, which leaves the strides of a single word as they are.
    rows = words.mT.clone(memory_format=torch.contiguous_format)
    return unpack_rows(rows, bits, out_features).mT.contiguous()


def packed_words(values: int, bits: int) -> int:
    """int32 words that hold `values` densely packed integers."""
    return -(-values * bits // 32)
