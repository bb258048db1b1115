"""A matrix in EXL3's codes while its layer is tuned: the codes stay, its scales move."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from qmoe.format.exl3 import decode
from qmoe.format.hadamard import rotate
from qmoe.format.trellis import BLOCK, Codes, Trellis
from qmoe.layer.trainable import as_stored


class CodedPart:
    """Matrix e of codes. ratios: of its scales of inputs and outputs, leaves that start at one."""

    def __init__(self, codes: Codes, e: int, device: torch.device):
        self.n, self.k = codes.n, codes.k
        values = decode(codes.trellis[e], codes.codebook).T
        turned = rotate(rotate(values, BLOCK).T, BLOCK).T
        self.values = turned[: self.n, : self.k].contiguous().to(device)
        self.before = [scale[e].float().to(device) for scale in (codes.suh, codes.svh)]
        self.ratios = [torch.ones_like(scale).requires_grad_() for scale in self.before]

    def scales(self) -> list[Tensor]:
        """Of inputs and outputs as they will be stored; the gradient passes straight through."""
        pairs = zip(self.before, self.ratios, strict=True)
        return [as_stored(scale * ratio, torch.float16) for scale, ratio in pairs]

    def weight(self) -> Float[Tensor, "N K"]:
        suh, svh = self.scales()
        return self.values * suh[: self.k] * svh[: self.n, None]


class CodedMatrix:
    """Matrix e of a stack, whose rows come from one or several matrices."""

    latent: None = None  # nothing is rounded again

    def __init__(self, stack: Trellis, e: int, device: torch.device):
        self.parts = [CodedPart(codes, e, device) for codes in stack.parts]

    @property
    def ratios(self) -> list[Tensor]:
        return [ratio for part in self.parts for ratio in part.ratios]

    def weight(self) -> Float[Tensor, "N K"]:
        return torch.cat([part.weight() for part in self.parts])


def tuned_codes(old: Trellis, group: Sequence[CodedMatrix]) -> Trellis:
    """The stack with the scales of these matrices."""
    parts = []
    for i, codes in enumerate(old.parts):
        scales = [[s.detach().cpu() for s in matrix.parts[i].scales()] for matrix in group]
        suh, svh = (torch.stack(column).half() for column in zip(*scales, strict=True))
        parts.append(replace(codes, suh=suh, svh=svh))
    return Trellis(tuple(parts), old.scheme)
