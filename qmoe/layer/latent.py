"""A quantized weight while it is tuned: latent integers that are rounded, with a gradient that
passes straight through, and scales."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from qmoe.config import Scheme
from qmoe.format.grid import limits, settled, stored_scale
from qmoe.format.hadamard import rotate
from qmoe.format.quantized import Quantized
from qmoe.model import experts

INSIDE = 0.45  # how far from its integer a latent value may start


@runtime_checkable
class MakesWeight(Protocol):
    """A quantized matrix whose weight [N, K] is made when it is asked for."""

    def weight(self) -> Tensor: ...


def scales_as_stored(
    exact: Float[Tensor, "*any G"],
    zero: Float[Tensor, "*any G"],
    in_features: int,
    scheme: Scheme,
    dtype: torch.dtype,
) -> Float[Tensor, "*any G"]:
    """Scales as they will be stored in `dtype`; the gradient passes straight through."""
    stored = stored_scale(exact.detach(), dtype)
    stored = settled(stored, zero, in_features, scheme, dtype)
    return exact + (stored - exact).detach()


class FakeQuantize(torch.autograd.Function):
    """Latent values [N, K] rounded to a grid; the gradient passes straight through inside it."""

    @staticmethod
    def forward(ctx: Any, latent: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
        qmin, qmax = limits(bits)
        ctx.save_for_backward(latent, scale, zero)
        ctx.range = qmin, qmax
        steps = (latent.round().clamp(qmin, qmax)).unflatten(1, (scale.shape[1], -1))
        weight: Tensor = ((steps - zero[..., None]) * scale[..., None]).flatten(1)
        return weight

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        latent, scale, zero = ctx.saved_tensors
        qmin, qmax = ctx.range
        slope = slopes[0].unflatten(1, (scale.shape[1], -1))
        steps = latent.round().clamp(qmin, qmax).unflatten(1, (scale.shape[1], -1))
        inside = (latent > qmin - 0.5) & (latent < qmax + 0.5)
        to_latent = (slope * scale[..., None]).flatten(1) * inside
        return to_latent, (slope * (steps - zero[..., None])).sum(-1), None, None


class Matrix:
    """One quantized matrix while it is tuned: its latent integers and the change of its scales.

    A latent value starts inside its integer's interval, on the side where the original weight is,
    so that those that were a close call change first."""

    def __init__(self, stack: Quantized, original: Tensor, e: int, device: torch.device):
        self.stack, self.bits = stack, stack.scheme_of(e).bits
        self.scale = stack.scale[e].float().to(device)
        no = torch.zeros_like(self.scale)
        zero = no if stack.zero is None else stack.zero[e].float().to(device)
        self.zero = zero
        rotated = rotate(original[e].float().to(device), stack.scheme.rotation)
        groups = rotated.unflatten(1, (self.scale.shape[1], -1))
        aim = (groups / self.scale[..., None] + zero[..., None]).flatten(1)
        q = stack.q[e].float().to(device)
        self.latent: Tensor = (q + (aim - q).clamp(-INSIDE, INSIDE)).requires_grad_()
        self.ratio: Tensor = torch.ones_like(self.scale).requires_grad_()

    @property
    def ratios(self) -> list[Tensor]:
        return [self.ratio]

    def scales(self) -> Tensor:
        """As they will be stored; the gradient passes straight through."""
        exact, stack = self.scale * self.ratio, self.stack
        k, dtype = self.latent.shape[1], stack.scale.dtype
        return scales_as_stored(exact, self.zero, k, stack.scheme, dtype)

    def weight(self) -> Tensor:
        scheme = self.stack.scheme
        made: Tensor = FakeQuantize.apply(self.latent, self.scales(), self.zero, self.bits)  # type: ignore[no-untyped-call]
        return rotate(made, scheme.rotation)

    def integers(self) -> Tensor:
        return self.latent.detach().round().clamp(*limits(self.bits)).to(torch.int8)


def tuned_integers(old: Quantized, group: Sequence[Matrix]) -> Quantized:
    """The stack with the integers and scales of these matrices."""
    scale = torch.stack([m.scales().detach().cpu() for m in group]).to(old.scale.dtype)
    return replace(old, q=torch.stack([m.integers().cpu() for m in group]), scale=scale)


class LatentExperts:
    """Stands for a weight stack in an experts module: gives matrix e, made when it is asked for."""

    def __init__(self, module: Any, name: str, matrices: Sequence[MakesWeight]):
        self.module, self.name, self.matrices = module, name, matrices

    def __getitem__(self, e: int) -> Tensor:
        return experts.as_stored(self.module, self.name, self.matrices[e].weight())


@contextmanager
def latent_experts(
    modules: dict[str, Any], matrices: Mapping[str, Sequence[MakesWeight]]
) -> Iterator[None]:
    """These experts modules, by name, make their matrices one by one. matrices: by parameter."""
    with ExitStack() as stack:
        for name, module in modules.items():
            for weight in experts.expert_weights(module):
                latent = LatentExperts(module, weight, matrices[f"{name}.{weight}"])
                stack.enter_context(replaced(module, weight, latent))
        yield


@contextmanager
def replaced(module: nn.Module, name: str, value: Any) -> Iterator[None]:
    """A module with something else in the place of a parameter."""
    parameter = module._parameters.pop(name)
    module.__dict__[name] = value
    try:
        yield
    finally:
        del module.__dict__[name]
        module._parameters[name] = parameter
