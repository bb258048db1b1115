"""What lies between an expert's two products, as the kernels know it, and how to recognize it."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

# What the kernels compute; device/activation.py has the same, which needs Triton.
FUSED = ("silu", "gelu", "gelu_tanh", "clamped_swiglu")


@dataclass(frozen=True)
class Activation:
    """name: one of FUSED, or "none": the product is returned as it is. alpha and limit belong to
    clamped_swiglu. Called, it is the same function in torch: product [*, 2I] to [*, I]."""

    name: str = "none"
    alpha: float = 1.702
    limit: float = 7.0

    def __post_init__(self) -> None:
        if self.name != "none" and self.name not in FUSED:
            raise ValueError(f"activation {self.name!r}: the fused ones are {FUSED}")

    def __call__(self, product: Tensor) -> Tensor:
        if self.name == "none":
            return product
        gate, up = product.chunk(2, dim=-1)
        if self.name == "silu":
            return F.silu(gate) * up
        if self.name in ("gelu", "gelu_tanh"):
            return F.gelu(gate, approximate="tanh" if self.name == "gelu_tanh" else "none") * up
        gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return gate * torch.sigmoid(self.alpha * gate) * (up + 1)


NONE = Activation()


def recognize(
    function: Callable[[Tensor], Tensor], width: int, alpha: float = 1.702, limit: float = 7.0
) -> Activation | None:
    """The fused activation that `function` [*, width] -> [*, width / 2] computes, or None.

    Decided by what it gives on values of all sizes, not by what it is called: a family's own gate
    (clamped, offset, scaled) is either exactly one of ours or runs unfused.
    """
    probe, half = torch.linspace(-12, 12, 97), width // 2
    pairs = torch.stack((probe.repeat(97), probe.repeat_interleave(97)))
    pairs = F.pad(pairs, (0, -pairs.shape[1] % half))
    rows = pairs.view(2, -1, half).transpose(0, 1).reshape(-1, width)  # gates, then ups
    got = function(rows)
    for name in FUSED:
        candidate = Activation(name, alpha, limit)
        if got.shape == (len(rows), half) and torch.allclose(
            got, candidate(rows), rtol=1e-5, atol=1e-6
        ):
            return candidate
    return None
