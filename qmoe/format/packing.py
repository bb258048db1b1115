"""Stored integers <-> int32 words of compressed-tensors' pack-quantized format.

    weight_packed      [N, ceil(K * bits / 32)]   rows packed along K, no padding between values
    weight_zero_point  [ceil(N * bits / 32), G]   packed along N (only if asymmetric)

Value i of a row starts at bit i * bits of the row's little-endian bit string and is stored with
an offset of 2^(bits-1). The bit arithmetic is compressed-tensors' own.
"""

from dataclasses import dataclass, replace
from itertools import groupby

import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from jaxtyping import Float, Int8, Int32
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
    e, n, _ = words.shape
    flat = words.reshape(e * n, -1)
    q: Tensor = unpack_from_int32(flat, bits, torch.Size((e * n, in_features)))
    return q.view(e, n, in_features)


def pack_zeros(zero: Int8[Tensor, "E N G"], bits: int) -> Int32[Tensor, "E Wn G"]:
    """Pack zero points along N."""
    packed: Tensor = pack_to_int32(zero, bits, packed_dim=0)
    return packed


def unpack_zeros(
    words: Int32[Tensor, "E Wn G"], bits: int, out_features: int
) -> Int8[Tensor, "E N G"]:
    """Inverse of pack_zeros."""
    # The transposed copy is made here because compressed-tensors' own fails on a single word.
    rows = words.mT.clone(memory_format=torch.contiguous_format)
    return unpack_rows(rows, bits, out_features).mT.contiguous()


def packed_words(values: int, bits: int) -> int:
    """int32 words that hold `values` densely packed integers."""
    return -(-values * bits // 32)
