"""Experts in host memory, computed on the GPU: the most used ones wait in slots there.

Each layer's arena stays where it is (pinned host memory); a few slots of one expert each live on
the device. Before a layer computes, the experts its tokens chose are copied into slots if they are
not there (residency.py decides whom they replace); while it computes, those that the next layer
will probably want are copied already.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from qmoe.config import Scheme
from qmoe.kernels.arena import ALIGN, WEIGHTS
from qmoe.kernels.hosted.residency import Held, empty, fetch, guess, waves
from qmoe.kernels.moe import Biases


@runtime_checkable
class InArena(Protocol):
    """A stack that computes with the ranges of its arena wherever they are: ArenaStack,
    CodedStack."""

    scheme: Scheme
    buffer: Tensor

    @property
    def arena(self) -> Any:
        """kernels/arena.py or kernels/coded/arena.py: `buffer`, `table`, `ranges()`."""
        ...

    def run(
        self,
        buffer: Tensor,
        table: Tensor,
        x: Tensor,
        ids: Tensor,
        gates: Tensor,
        activation: Callable[[Tensor], Tensor],
        biases: Biases,
    ) -> Tensor:
        """The routed experts, whose bytes are in `buffer` where `table` says."""
        ...

    def packed_bytes(self) -> int: ...

    def nbytes(self) -> int: ...


@runtime_checkable
class Copier(Protocol):
    """Brings bytes from the slow memory to the fast one."""

    def start(self, source: Tensor, target: Tensor) -> None:
        """Copy, after all computing asked for so far (it may still read the target)."""
        ...

    def wait(self) -> None:
        """What is computed from now on sees every copy started before."""
        ...


class NowCopier:
    """Copies at once; for a device that is the host."""

    def start(self, source: Tensor, target: Tensor) -> None:
        target.copy_(source)

    def wait(self) -> None:
        pass


class StreamCopier:
    """Copies on a CUDA stream of its own, beside the computing."""

    def __init__(self, device: torch.device):
        self.device, self.stream = device, torch.cuda.Stream(device)

    def start(self, source: Tensor, target: Tensor) -> None:
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            target.copy_(source, non_blocking=True)

    def wait(self) -> None:
        torch.cuda.current_stream(self.device).wait_stream(self.stream)


class SlotStack(nn.Module):
    """A stack whose experts live in host memory, with `slots` of them on the device.

    Takes its place: `experts`, `nbytes`, `packed_bytes`. `link` names the layer that follows.
    Reads the chosen experts back to the host at every call, so it cannot be part of a CUDA graph.
    """

    buffer: Tensor
    table: Tensor

    def __init__(
        self, stack: InArena, slots: int, device: torch.device, copier: Copier | None = None
    ):
        """stack: in host memory. Raises ValueError for fewer slots than 1."""
        super().__init__()
        if slots < 1:
            raise ValueError(f"slots: expected at least 1, got {slots}")
        arena = stack.arena
        self.scheme, self.stack = stack.scheme, [stack]  # in a list: not a submodule, never moved
        self.host = arena.buffer.pin_memory() if device.type == "cuda" else arena.buffer
        stack.buffer = self.host  # so that the bytes are in memory once
        self.ranges = arena.ranges()
        self.slot_bytes = max(length for _, length in self.ranges)
        self.held: Held = empty(min(slots, arena.experts))
        self.copier: Copier = copier or (
            StreamCopier(device) if device.type == "cuda" else NowCopier()
        )
        fast = torch.zeros(len(self.held.pairs) * self.slot_bytes, dtype=torch.uint8, device=device)
        self.register_buffer("buffer", fast, persistent=False)
        self.register_buffer("table", arena.table.clone().to(device), persistent=False)
        self.origin = arena.table.cpu().clone()
        self.places = self.origin.clone()
        self.followed = torch.zeros(0, 0)  # [E, E of the next layer]: see residency.guess
        self.neighbours: dict[str, SlotStack] = {}  # a dict: not submodules
        self.chosen: list[int] = []
        self.hits = self.misses = 0

    def link(self, following: "SlotStack") -> None:
        """Guess, from here on, what `following` will want, and copy it ahead of time."""
        self.followed = torch.zeros(len(self.ranges), len(following.ranges))
        self.neighbours["next"], following.neighbours["previous"] = following, self

    def warm(self, counts: Sequence[float]) -> None:
        """Fill the slots with the experts used most, by their calibration counts."""
        best = sorted(range(len(counts)), key=lambda e: -counts[e])[: len(self.held.pairs)]
        self._bring(best[::-1])

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def experts(
        self,
        x: Float[Tensor, "T H"],
        ids: Int[Tensor, "T A"],
        gates: Float[Tensor, "T A"],
        activation: Callable[[Tensor], Tensor],
        biases: Biases = (None, None),
    ) -> Float[Tensor, "T H2"]:
        """As moe.Experts; in rounds if the tokens chose more experts than fit the slots."""
        E = len(self.ranges)
        wanted = [e for e in ids.unique().tolist() if 0 <= e < E]
        self._learn(wanted)
        total = torch.zeros(len(x), self.stack[0].arena.matrices[-1].n, device=x.device)
        for i, wave in enumerate(waves(self.held, wanted)):
            self._bring(wave)
            self.copier.wait()
            if i == 0:
                self._guess_next()  # its copies run beside this layer's products
            here = torch.isin(ids, torch.tensor(wave, device=ids.device, dtype=ids.dtype))
            mine = torch.where(here, ids, E)
            stack = self.stack[0]
            total += stack.run(self.buffer, self.table, x, mine, gates, activation, biases)
        return total.to(x.dtype)

    def _learn(self, wanted: list[int]) -> None:
        self.hits += sum(self.held.slot_of(e) is not None for e in wanted)
        self.misses += sum(self.held.slot_of(e) is None for e in wanted)
        self.chosen = wanted
        previous = self.neighbours.get("previous")
        if previous is not None and previous.chosen:
            rows = torch.tensor(previous.chosen)[:, None]
            previous.followed[rows, torch.tensor(wanted, dtype=torch.long)] += 1

    def _guess_next(self) -> None:
        following = self.neighbours.get("next")
        if following is not None:
            count = min(len(self.chosen), len(following.held.pairs))
            following._bring(guess(self.followed, self.chosen, count))

    def _bring(self, wanted: Sequence[int]) -> None:
        """Start copying what is missing, and say in the table where it will be."""
        self.held, copies = fetch(self.held, wanted)
        for expert, slot in copies:
            first, length = self.ranges[expert]
            to = slot * self.slot_bytes
            self.copier.start(self.host[first : first + length], self.buffer[to : to + length])
            moved = (to - first) // ALIGN
            self.places[:, expert, WEIGHTS:] = self.origin[:, expert, WEIGHTS:] + moved
        if copies:
            self.table.copy_(self.places)

    def packed_bytes(self) -> int:
        """Bytes of packed integers, in host memory."""
        return self.stack[0].packed_bytes()

    def nbytes(self) -> int:
        """Bytes in host memory and in the slots."""
        return self.stack[0].nbytes() + int(self.buffer.nbytes + self.table.nbytes)
