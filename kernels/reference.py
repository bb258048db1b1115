"""What the kernels compute, slow and obvious, on plain weights."""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor


def moe_reference(
    x: Float[Tensor, "T H"],
    expert_ids: Int[Tensor, "T A"],
    gates: Float[Tensor, "T A"],
    first: Float[Tensor, "E N H"],
    second: Float[Tensor, "E H2 I"],
    activation: Callable[[Tensor], Tensor],
) -> Float[Tensor, "T H2"]:
    """The definition of `moe_forward`, one token and one expert at a time."""
    out = torch.zeros(x.shape[0], second.shape[1], dtype=x.dtype)
    for t in range(x.shape[0]):
        for a in range(expert_ids.shape[1]):
            e = int(expert_ids[t, a])
            if e < first.shape[0]:
                out[t] += gates[t, a] * (second[e] @ activation(first[e] @ x[t]))
    return out
