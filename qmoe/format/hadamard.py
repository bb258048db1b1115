"""Hadamard rotation of what a matrix reads, in blocks: (x R)(W R)' = x W', as R R' = 1.

Rotated weights have no outliers, so a grid's few points serve all of them (QuIP#, Tseng et al.,
2024, arXiv 2402.04396, section 3; QuaRot, Ashkboos et al., 2024, arXiv 2404.00456). Stored is W R;
at run time inputs are rotated, once for a layer's experts and once for every routed token before
its second matrix. R is symmetric, so it is also its own inverse. A block is a power of two; sizes
that are none take several.
"""

from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor

LARGEST = 256  # features that are mixed; larger blocks cost more at run time and gain little


def block_for(sizes: list[int]) -> int:
    """The largest block that divides all these input dimensions."""
    return min(LARGEST, *(size & -size for size in sizes))


def rotate(x: Float[Tensor, "*any K"], block: int) -> Float[Tensor, "*any K"]:
    """x R along the last dimension, in the dtype of x; x itself for block 0."""
    if not block:
        return x
    # Scaled first: in 16 bits the matrix then holds nothing but 1 and -1.
    parts = (x * block**-0.5).unflatten(-1, (-1, block))
    rotated: Tensor = (parts @ _signs(block, x.dtype, x.device)).flatten(-2)
    return rotated


@cache
def _signs(block: int, dtype: torch.dtype, device: torch.device) -> Float[Tensor, "K K"]:
    """Sylvester's Hadamard matrix of 1 and -1."""
    made = torch.ones(1, 1)
    while len(made) < block:
        made = torch.cat([torch.cat([made, made], 1), torch.cat([made, -made], 1)])
    return made.to(device, dtype)


def rotate_moments(H: Float[Tensor, "*any K K"], block: int) -> Float[Tensor, "*any K K"]:
    """R' H R: the second moments of rotated inputs."""
    return rotate(rotate(H, block).mT, block).mT
