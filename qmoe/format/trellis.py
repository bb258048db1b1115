"""A stack of matrices in EXL3's codes, with the scales and rotations around them.

A matrix [N, K] is stored transposed, as W' = diag(suh) R Q R diag(svh): Q [K, N] are the codes'
values (exl3.py), R is a Hadamard matrix in blocks of 128 on both sides (hadamard.py), suh and svh
are signs and scales of inputs and outputs in float16. Both sizes are filled up with zeros to
multiples of 128.
"""

import hashlib
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Float16, Int16
from torch import Tensor

from qmoe.config import Scheme
from qmoe.format.exl3 import SIDE, Codebook, decode
from qmoe.format.hadamard import rotate
from qmoe.format.quantized import Quantized, checksum

BLOCK = 128  # of the rotations, and what sizes are filled up to


@dataclass(frozen=True)
class Codes:
    """Matrices [E, N, K] of one rate and codebook. n, k: their sizes without the filling."""

    trellis: Int16[Tensor, "E k n W"]
    suh: Float16[Tensor, "E Kp"]
    svh: Float16[Tensor, "E Np"]
    codebook: Codebook
    n: int
    k: int

    @property
    def rate(self) -> float:
        """Bits a weight, without the scales."""
        return self.trellis.shape[-1] / SIDE

    def dequantize(self) -> Float[Tensor, "E N K"]:
        """The matrices in float32, one at a time: decoding takes several times their bytes."""
        made = torch.empty(len(self.trellis), self.n, self.k)
        for e, trellis in enumerate(self.trellis):
            turned = rotate(rotate(decode(trellis, self.codebook).T, BLOCK).T, BLOCK)
            whole = self.suh[e].float()[:, None] * turned * self.svh[e].float()
            made[e] = whole[: self.k, : self.n].T
        return made

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.trellis, self.suh, self.svh


@dataclass(frozen=True)
class Trellis:
    """A stack [E, N, K] whose rows come from one or several matrices per expert (gate, then up),
    each stored on its own. scheme: what was asked for."""

    parts: tuple[Codes, ...]
    scheme: Scheme

    @property
    def scale(self) -> Tensor:
        """The scales of outputs: what a record shows the dtype of."""
        return self.parts[0].svh

    def to(self, device: torch.device) -> "Trellis":
        """Itself: codes stay in the machine's own memory, and so does what is decoded."""
        return self

    def unpack(self) -> "Trellis":
        """Itself: it is the form in which it is compared."""
        return self


Stack = Quantized | Trellis


def padded(size: int) -> int:
    """A size filled up to a multiple of 128."""
    return -(-size // BLOCK) * BLOCK


def trellis_digest(stack: Trellis) -> str:
    """SHA-256 of codes and scales: equal if and only if the weights are."""
    sha = hashlib.sha256()
    for part in stack.parts:
        sha.update(f"{part.codebook} {part.n} {part.k}".encode())
        for tensor in part.tensors():
            sha.update(f"{tuple(tensor.shape)} {checksum(tensor)}".encode())
    return sha.hexdigest()


def join_trellis(stacks: list[Trellis]) -> Trellis:
    """Stacks of some experts each as one of all of them."""
    parts = []
    for same in zip(*(stack.parts for stack in stacks), strict=True):
        trellis, suh, svh = map(torch.cat, zip(*(part.tensors() for part in same), strict=True))
        parts.append(replace(same[0], trellis=trellis, suh=suh, svh=svh))
    return Trellis(tuple(parts), stacks[0].scheme)
