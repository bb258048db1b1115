"""The one alphabet of dimension letters, and the tensors that travel between the parts of qmoe.

E experts, T tokens, A experts per token (top-k), N output features, K input features,
G groups along K, H hidden size, I intermediate size, V vocabulary, W int32 words of a packed row.
A dense linear is a stack with E = 1.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int8
from torch import Tensor

from qmoe.config import Scheme


@dataclass(frozen=True)
class Quantized:
    """A quantized stack of matrices: weight = (q - zero) * scale, group by group along K.

    With a rotation R in the scheme it stands for ((q - zero) * scale) R (qmoe/format/hadamard.py).
    q and zero hold signed integers in [-2^(bits-1), 2^(bits-1)-1]; zero is None if symmetric.
    widths: bits of each matrix where they differ, empty where all have the scheme's; the scheme
    then has the widest (`common`). All else of the scheme holds for every matrix.
    """

    q: Int8[Tensor, "E N K"]
    scale: Float[Tensor, "E N G"]
    zero: Int8[Tensor, "E N G"] | None
    scheme: Scheme
    widths: tuple[int, ...] = ()

    def to(self, device: torch.device) -> "Quantized":
        zero = None if self.zero is None else self.zero.to(device)
        return replace(self, q=self.q.to(device), scale=self.scale.to(device), zero=zero)

    def scheme_of(self, e: int) -> Scheme:
        """Of matrix e."""
        return replace(self.scheme, bits=self.widths[e]) if self.widths else self.scheme

    def matrices(self) -> list["Quantized"]:
        """Each matrix as a stack of its own."""
        zeros = [None] * len(self.q) if self.zero is None else list(self.zero[:, None])
        return [
            Quantized(self.q[e : e + 1], self.scale[e : e + 1], zero, self.scheme_of(e))
            for e, zero in enumerate(zeros)
        ]


def common(scheme: Scheme, widths: Sequence[int]) -> tuple[Scheme, tuple[int, ...]]:
    """The scheme of a stack whose matrices have these widths, and the widths if they differ."""
    differ = len(set(widths)) > 1
    bits = max(widths, default=scheme.bits)
    return replace(scheme, bits=bits), tuple(widths) if differ else ()


def digest(quantized: Quantized) -> str:
    """SHA-256 of the integers, scales and zero points: equal if and only if the weights are."""
    sha = hashlib.sha256(str(quantized.scheme).encode())
    if quantized.widths:
        sha.update(str(quantized.widths).encode())
    # Scales in float32: exact, and the same however they are read.
    for tensor in (quantized.q, quantized.scale.float(), quantized.zero):
        if tensor is not None:
            sha.update(str(tuple(tensor.shape)).encode())
            sha.update(_raw(tensor))
    return sha.hexdigest()


def checksum(tensor: Tensor) -> str:
    """SHA-256 of the bytes of a tensor."""
    return hashlib.sha256(_raw(tensor)).hexdigest()


def _raw(tensor: Tensor) -> memoryview:
    raw: memoryview = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
    return raw
