"""What integers and codes have in common: a quantized stack back as numbers, and its digest."""

import torch
from jaxtyping import Float
from torch import Tensor

from qmoe.format import grid, quantized
from qmoe.format.trellis import Stack, Trellis, trellis_digest


def dequantize(stack: Stack) -> Float[Tensor, "E N K"]:
    """The matrices in float32."""
    if isinstance(stack, Trellis):
        return torch.cat([part.dequantize() for part in stack.parts], dim=1)
    return grid.dequantize(stack)


def digest(stack: Stack) -> str:
    """SHA-256 of what is stored: equal if and only if the weights are."""
    return trellis_digest(stack) if isinstance(stack, Trellis) else quantized.digest(stack)
