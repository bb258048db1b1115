"""The routed experts of one layer, computed on packed weights. CPU, or any device in torch ops.

token (T*A)   flattened assignments sorted by expert: the token each one belongs to
counts (E)    assignments per expert; ids >= E are sentinels ("no expert") and are skipped
"""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

Biases = tuple[Tensor | None, Tensor | None]


@runtime_checkable
class Stack(Protocol):
    """Matrices [E, N, K] that can be multiplied with, in whatever form they are kept."""

    shape: tuple[Any, ...]

    def matmul(self, x: Tensor, e: int) -> Tensor:
        """x [M, K] times the transpose of matrix e: [M, N]."""
        ...


def moe_forward(
    x: Float[Tensor, "T H"],
    expert_ids: Int[Tensor, "T A"],
    gates: Float[Tensor, "T A"],
    first: Stack,
    second: Stack,
    activation: Callable[[Tensor], Tensor],
    biases: Biases = (None, None),
) -> Float[Tensor, "T H"]:
    """y[t] = sum over a of gates[t, a] * second[e] @ activation(first[e] @ x[t]), e = ids[t, a].

    `activation` maps the first product [M, N] to the second's input [M, I] (gating included).
    biases: [E, N] and [E, H], added to the first and second product.
    Contributions are summed in float32, expert by expert, and returned in the dtype of x.
    """
    E = first.shape[0]
    ids = expert_ids.flatten()
    order = torch.argsort(ids, stable=True)
    counts = torch.bincount(ids, minlength=E)[:E].tolist()
    token = order // expert_ids.shape[1]
    weight = gates.flatten()[order].float()
    out = torch.zeros(x.shape[0], second.shape[1], dtype=torch.float32, device=x.device)
    start = 0
    for e, count in enumerate(counts):
        if count:
            rows = token[start : start + count]
            product = first.matmul(x[rows], e)
            if biases[0] is not None:
                product = product + biases[0][e]
            y = second.matmul(activation(product), e)
            if biases[1] is not None:
                y = y + biases[1][e]
            out.index_add_(0, rows, y.float() * weight[start : start + count, None])
            start += count
    return out.to(x.dtype)
