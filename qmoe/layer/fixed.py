"""A quantized weight whose integers stay while its scales move."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int8
from torch import Tensor

from qmoe.format.hadamard import rotate
from qmoe.format.quantized import Quantized
from qmoe.layer.latent import scales_as_stored


class FixedIntegers(torch.autograd.Function):
    """(q - zero) * scale, group by group, differentiable in the scales. Only integers are kept for
    the way back, where those of many experts wait."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        ctx.save_for_backward(q, zero)
        ctx.groups = scale.shape[1]
        weight: Tensor = (_steps(q, zero, scale.shape[1]) * scale[..., None]).flatten(1)
        return weight

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[None, Tensor, None]:
        q, zero = ctx.saved_tensors
        slope = slopes[0].unflatten(1, (ctx.groups, -1))
        return None, (slope * _steps(q, zero, ctx.groups)).sum(-1), None


def _steps(q: Tensor, zero: Tensor | None, groups: int) -> Tensor:
    steps: Tensor = q.float().unflatten(1, (groups, -1))
    return steps if zero is None else steps - zero.float()[..., None]


@dataclass(frozen=True)
class FixedMatrix:
    """One matrix of a stack: integers and zero points as they are stored, scales that move.
    rotation: the block of the scheme's Hadamard rotation, 0 for none."""

    q: Int8[Tensor, "N K"]
    scale: Float[Tensor, "N G"]
    zero: Int8[Tensor, "N G"] | None
    rotation: int

    def weight(self) -> Float[Tensor, "N K"]:
        """The float32 matrix, differentiable in the scales."""
        made: Tensor = FixedIntegers.apply(self.q, self.scale, self.zero)  # type: ignore[no-untyped-call]
        return rotate(made, self.rotation)


def scales_of(stack: Quantized, factors: Float[Tensor, "E N G"]) -> Float[Tensor, "E N G"]:
    """A stack's scales times `factors`, in float32 and with the values that will be stored; the
    gradient passes straight through the rounding."""
    scale = stack.scale.float()
    zero = torch.zeros_like(scale) if stack.zero is None else stack.zero.float()
    exact, k = scale * factors, stack.q.shape[-1]
    return scales_as_stored(exact, zero, k, stack.scheme, stack.scale.dtype)


def fixed_matrices(
    stack: Quantized, factors: Float[Tensor, "E N G"], device: torch.device
) -> list[FixedMatrix]:
    """The matrices of a stack on a device, with its scales times `factors`."""
    scales = scales_of(stack, factors).to(device)
    zeros = [None] * len(stack.q) if stack.zero is None else stack.zero.to(device).unbind()
    each = zip(stack.q.to(device).unbind(), scales.unbind(), zeros, strict=True)
    return [FixedMatrix(q, scale, zero, stack.scheme.rotation) for q, scale, zero in each]
