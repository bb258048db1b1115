"""The tokens a layer's experts received, kept until their statistics are asked for.

The Hessians of all experts of a large layer do not fit in memory (4 E K^2 bytes: 57 GB for
DeepSeek-V3); its tokens do. So tokens are kept while the layer runs, and Hessians are computed from
them for a few experts at a time.
"""

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from qmoe.calibration.stats import ExpertStats
from qmoe.model import experts
from qmoe.system import distributed
from qmoe.system.spill import Scratch

ROWS = 8192  # tokens of an expert multiplied at once


class RoutedTokens:
    """What one experts module was called with. `part` gives the statistics of some experts."""

    def __init__(self, module: Any, routing_weighted: bool, stride: int, scratch: Scratch):
        """stride: every stride-th token goes into the sample for rare experts. scratch: where
        tokens wait."""
        self.module, self.routing_weighted, self.stride = module, routing_weighted, stride
        self.scratch = scratch
        self._calls: list[tuple[Tensor, Tensor, Tensor]] = []
        first, second = experts.expert_weights(module)
        self.hidden = experts.rows(module, first).shape[2]
        self.intermediate = experts.rows(module, second).shape[2]

    def saw(
        self,
        x: Float[Tensor, "T H"],
        ids: Int[Tensor, "T A"],
        routing_weights: Float[Tensor, "T A"],
    ) -> None:
        self._calls.append(self.scratch.keep((x, ids, routing_weights)))

    def called(self) -> bool:
        """Whether any token was assigned to an expert."""
        here = any(bool((ids < self.module.num_experts).any()) for _, ids, _ in self._calls)
        return any(distributed.all_gather_object(here))

    def finish(self) -> None:
        """All calls, of all ranks, are in: sort the assignments by expert."""
        width = max((ids.shape[1] for _, ids, _ in self._calls), default=1)
        assert all(ids.shape[1] == width for _, ids, _ in self._calls)
        x, ids, routing_weights = (
            distributed.all_gather(torch.cat(parts)) for parts in zip(*self._calls, strict=True)
        )
        self._calls.clear()
        E = self.module.num_experts
        order = torch.argsort(ids.flatten(), stable=True)
        self._x, self._token = self.scratch.keep(x), order // width
        self._routing = routing_weights.flatten()[order].float()
        self.tokens = torch.bincount(ids.flatten(), minlength=E)[:E]
        self._start = [0, *self.tokens.cumsum(0).tolist()]
        weight = self._weight(self._routing)
        pieces = [slice(a, b) for a, b in zip(self._start, self._start[1:], strict=False)]
        self.routing_mass = torch.stack([self._routing[piece].sum() for piece in pieces])
        self.weight = torch.stack([weight[piece].sum() for piece in pieces])

    def _weight(self, routing: Tensor) -> Tensor:
        return routing.square() if self.routing_weighted else torch.ones_like(routing)

    def received(self) -> tuple[Float[Tensor, "T H"], Float[Tensor, " M"]]:
        """All tokens, and the routing weights of all assignments."""
        return self._x, self._routing

    def inputs(self, e: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Expert e's tokens [M, H], their routing weights and weights in its Hessian [M], a part at
        a time."""
        for row in range(self._start[e], self._start[e + 1], ROWS):
            rows = slice(row, min(row + ROWS, self._start[e + 1]))
            routing = self._routing[rows]
            yield self._x[self._token[rows]].float(), routing, self._weight(routing)

    def sample(self) -> Float[Tensor, "B H"]:
        """Tokens of the layer, routed anywhere."""
        return self._x[:: self.stride].float()

    def part(self, start: int, end: int, second: bool = True) -> ExpertStats:
        """Statistics of experts start to end; the experts still hold the weights they ran with.
        second: whether the second matrix's Hessian is wanted, else it stays zero."""
        stats = ExpertStats.empty(end - start, self.hidden, self.intermediate)
        first = experts.expert_weights(self.module)[0]
        where = getattr(self.module, first).device
        for e in range(start, end):
            for x, routing, weight in self.inputs(e):
                there = x.to(where)
                mid = None
                if second:
                    mid = experts.activation(
                        self.module, experts.product(self.module, first, e, there)
                    )
                stats.add(e - start, there, mid, routing, weight)
        stats.sample = self.sample()
        return stats
