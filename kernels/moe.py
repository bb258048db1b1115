"""The routed experts of one layer, computed on packed weights. CPU, or any device in torch ops.

token (T*A)   flattened assignments sorted by expert: the token each one belongs to
counts (E)    assignments per expert; ids >= E are sentinels ("no expert") and are skipped
"""

from collections.abc import Callable, Iterator
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from qmoe.config import Scheme

ROWS = 256  # assignments whose activation, biases and sum are computed at once
Biases = tuple[Tensor | None, Tensor | None]
Run = list[tuple[int, int, int]]  # an expert, its first row and the one behind its last


@runtime_checkable
class Stack(Protocol):
    """Matrices [E, N, K] that can be multiplied with, in whatever form they are kept."""

    shape: tuple[Any, ...]

    def matmul(self, x: Tensor, e: int) -> Tensor:
        """x [M, K] times the transpose of matrix e: [M, N]."""
        ...


@runtime_checkable
class Experts(Protocol):
    """The routed experts of a layer, in whatever form and wherever they are kept: CpuStack,
    TrellisStack, ArenaStack, CodedStack, SlotStack, HybridStack."""

    scheme: Scheme

    def experts(
        self,
        x: Float[Tensor, "T H"],
        ids: Int[Tensor, "T A"],
        gates: Float[Tensor, "T A"],
        activation: Callable[[Tensor], Tensor],
        biases: Biases = (None, None),
    ) -> Float[Tensor, "T H2"]:
        """`moe_forward` of their first and second matrices, in the dtype of x. `activation` is
        called if it could not be fused. biases: [E, N] and [E, H2]."""
        ...

    def packed_bytes(self) -> int:
        """Bytes of packed integers or codes."""
        ...

    def nbytes(self) -> int:
        """Bytes of all that is held."""
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
    ends = torch.bincount(ids, minlength=E)[:E].cumsum(0).tolist()
    token, expert = order // expert_ids.shape[1], ids[order]
    weight = gates.flatten()[order].float()
    out = torch.zeros(x.shape[0], second.shape[1], dtype=torch.float32, device=x.device)
    for run in _together(ends):
        start, stop = run[0][1], run[-1][2]
        rows, which = token[start:stop], expert[start:stop]
        mid = activation(_product(first, x[rows], run, biases[0], which))
        y = _product(second, mid, run, biases[1], which)
        out.index_add_(0, rows, y.float() * weight[start:stop, None])
    return out.to(x.dtype)


def _product(
    stack: Stack,
    x: Float[Tensor, "M K"],
    run: Run,
    bias: Float[Tensor, "E N"] | None,
    expert: Int[Tensor, " M"],
) -> Float[Tensor, "M N"]:
    first = run[0][1]
    parts = [stack.matmul(x[start - first : stop - first], e) for e, start, stop in run]
    y = parts[0] if len(parts) == 1 else torch.cat(parts)
    return y if bias is None else y + bias[expert]


def _together(ends: list[int]) -> Iterator[Run]:
    """Experts that have rows, in runs of few rows: what is done once for a run takes longer to
    start than to do."""
    run: Run = []
    for e, (start, stop) in enumerate(zip([0, *ends], ends, strict=False)):
        if start == stop:
            continue
        if run and stop - run[0][1] > ROWS:
            yield run
            run = []
        run.append((e, start, stop))
    if run:
        yield run
