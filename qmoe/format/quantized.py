"""The one alphabet of dimension letters, and the tensors that travel between the parts of qmoe.

E experts, T tokens, A experts per token (top-k), N output features, K input features,
G groups along K, H hidden size, I intermediate size, V vocabulary, W int32 words of a packed row.
A dense linear is a stack with E = 1.
"""

import hashlib
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int8
from torch import Tensor

from qmoe.config import Scheme


@dataclass(frozen=True)
class Quantized:
    """A quantized stack of matrices: weight = (q - zero) * scale, group by group along K.

    With a rotation R in the scheme it stands for ((q - zero) * scale) R (qmoe/format/hadamard.py).
    q and zero hold signed integers in [-2^(bits-1), 2^(bits-1)-1]; zero is None if symmetric.
    """

    q: Int8[Tensor, "E N K"]
    scale: Float[Tensor, "E N G"]
    zero: Int8[Tensor, "E N G"] | None
    scheme: Scheme

    def to(self, device: torch.device) -> "Quantized":
        zero = None if self.zero is None else self.zero.to(device)
        return Quantized(self.q.to(device), self.scale.to(device), zero, self.scheme)


def digest(quantized: Quantized) -> str:
    """SHA-256 of the integers, scales and zero points: equal if and only if the weights are."""
    sha = hashlib.sha256(str(quantized.scheme).encode())
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
