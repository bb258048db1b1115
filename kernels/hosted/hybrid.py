"""Experts on a GPU and on the CPU at once: the hot ones lie on the GPU, the others in host memory.

Those in host memory are there twice, in the layout of the CPU's kernels and in that of the GPU's.
While the GPU computes the hot ones, the CPU computes the others, or they are copied through slots
that all layers share, whichever is faster for their rows (placement.py).
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from qmoe.format.quantized import Quantized
from qmoe.kernels.activation import Activation
from qmoe.kernels.arena import ALIGN, WEIGHTS
from qmoe.kernels.arena_stack import ArenaStack
from qmoe.kernels.cpu.stack import CpuStack
from qmoe.kernels.hosted.placement import ASSUMED, Rates, shared_out
from qmoe.kernels.hosted.slots import Copier, NowCopier, StreamCopier
from qmoe.kernels.moe import Biases

AT_ONCE = 4  # experts that are computed while as many are copied
HOST = torch.device("cpu")
TRIED = 1 << 26  # bytes of a copy that is timed


class Staging:
    """Slots on the device through which experts of all layers go, in two halves: one is computed
    while the other is filled. rates: see placement.py."""

    def __init__(self, device: torch.device, slot_bytes: int, copier: Copier | None = None):
        """slot_bytes: of the largest expert."""
        self.slot_bytes, self.rates = slot_bytes, ASSUMED
        self.copier: Copier = copier or (
            StreamCopier(device) if device.type == "cuda" else NowCopier()
        )
        self.buffer = torch.zeros(2 * AT_ONCE * slot_bytes, dtype=torch.uint8, device=device)


@dataclass(frozen=True)
class How:
    """How experts in host memory are computed. staging: for those that are copied. exact: on the
    CPU take activations as they are, instead of rounding them to 8 bits."""

    staging: Staging
    exact: bool


class HybridStack(nn.Module):
    """Takes the place of an ArenaStack: `experts`, `nbytes`, `packed_bytes`.

    Reads the chosen experts back to the host at every call, so it cannot be part of a CUDA graph.
    hits, misses: assignments of tokens to experts on the device, and to others.
    """

    placed: Tensor

    def __init__(
        self,
        stacks: Sequence[Quantized],
        dtype: torch.dtype,
        device: torch.device,
        activation: Activation | None,
        hot: Sequence[int],
        how: How,
    ):
        """stacks: first and second [E, N, K]. hot: experts that lie on the device; neither none nor
        all of them is a mistake."""
        super().__init__()
        self.scheme, self.how, self.hits, self.misses = stacks[0].scheme, how, 0, 0
        E, self.width = len(stacks[0].q), stacks[1].q.shape[1]
        cold = [e for e in range(E) if e not in set(hot)]
        self.ids = {"hot": sorted(hot), "cold": cold}
        # By expert, its place among the hot and among the cold ones, which past the last is none.
        placed = torch.full((2, E + 1), E)
        for row, mine in zip(placed, self.ids.values(), strict=True):
            row[mine] = torch.arange(len(mine))
        self.register_buffer("placed", placed.to(device), persistent=False)
        paired = activation is not None
        self.hot: ArenaStack | None = None
        if hot:
            self.hot = ArenaStack(stacks, dtype, device, activation, paired, only=self.ids["hot"])
        # In lists: not submodules, never moved.
        self.cold: list[ArenaStack] = []
        self.beside: list[CpuStack] = []
        self.host_biases: Biases | None = None
        if cold:
            arena = ArenaStack(stacks, dtype, device, activation, paired, HOST, cold)
            if device.type == "cuda":
                arena.buffer = arena.buffer.pin_memory()
            each = [stack.matrices() for stack in stacks]
            own = [[stack[e] for e in cold] for stack in each]
            self.cold.append(arena)
            self.beside.append(
                CpuStack(own, dtype, activation, how.exact or dtype == torch.float32)
            )
            self.ranges = arena.arena.ranges()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def experts(
        self,
        x: Float[Tensor, "T H"],
        ids: Int[Tensor, "T A"],
        gates: Float[Tensor, "T A"],
        activation: Callable[[Tensor], Tensor],
        biases: Biases = (None, None),
    ) -> Float[Tensor, "T H2"]:
        """As moe.Experts."""
        E = self.placed.shape[1] - 1
        hot, cold = self.placed[:, torch.where((ids >= 0) & (ids < E), ids, E)]
        counts = torch.bincount(cold[cold < E], minlength=len(self.ids["cold"])).tolist()
        rows = {e: count for e, count in enumerate(counts) if count}
        self.misses += sum(counts)
        self.hits += int((hot < E).sum())
        lengths = [length for _, length in self.ranges] if self.cold else []
        copied, computed = shared_out(rows, lengths, self.how.staging.rates)
        # Read before the GPU is given work, which a copy to the host would wait for.
        given = [part.to(HOST) for part in (x, cold, gates)] if computed else []
        total = torch.zeros(len(x), self.width, device=x.device)
        if self.hot is not None:
            own = _of(biases, self.ids["hot"])
            total += self.hot.experts(x, hot, gates, activation, own)
        if copied:
            own = _of(biases, self.ids["cold"])
            self._add_copied(total, copied, (x, cold, gates), activation, own)
        if computed:
            y = self._on_cpu(computed, given, activation, biases, x.device)
            total += y.to(x.device, non_blocking=True)
        return total.to(x.dtype)

    def _add_copied(
        self,
        total: Tensor,
        copied: Sequence[int],
        given: tuple[Tensor, Tensor, Tensor],
        activation: Callable[[Tensor], Tensor],
        biases: Biases,
    ) -> None:
        """Add what experts in host memory give, which are copied to the device a few at a time."""
        (x, cold, gates), stack, staging = given, self.cold[0], self.how.staging
        waves = [copied[i : i + AT_ONCE] for i in range(0, len(copied), AT_ONCE)]
        table = self._bring(waves[0], 0)
        for i, wave in enumerate(waves):
            staging.copier.wait()
            # Before this wave's products are asked for, so that the copies need not wait for them.
            following = self._bring(waves[i + 1], i + 1) if i + 1 < len(waves) else table
            here = torch.isin(cold, torch.tensor(wave, device=cold.device))
            mine = torch.where(here, cold, len(self.ids["cold"]))
            total += stack.run(staging.buffer, table, x, mine, gates, activation, biases)
            table = following

    def _bring(self, wave: Sequence[int], turn: int) -> Tensor:
        """Start copying experts into one half of the slots; the table that says so."""
        stack, staging = self.cold[0], self.how.staging
        table = stack.table.to(HOST, copy=True)
        for i, e in enumerate(wave):
            (first, length), slot = self.ranges[e], turn % 2 * AT_ONCE + i
            to = slot * staging.slot_bytes
            target = staging.buffer[to : to + length]
            staging.copier.start(stack.buffer[first : first + length], target)
            table[:, e, WEIGHTS:] += (to - first) // ALIGN
        return table.to(staging.buffer.device)

    def _on_cpu(
        self,
        computed: Sequence[int],
        given: Sequence[Tensor],
        activation: Callable[[Tensor], Tensor],
        biases: Biases,
        device: torch.device,
    ) -> Tensor:
        """What experts add that the CPU computes, [T, H2] in host memory."""
        x, cold, gates = given
        if self.host_biases is None:
            first, second = _of(biases, self.ids["cold"])
            self.host_biases = (
                None if first is None else first.to(HOST),
                None if second is None else second.to(HOST),
            )
        here = torch.isin(cold, torch.tensor(computed))
        mine = torch.where(here, cold, len(self.ids["cold"]))

        def between(product: Tensor) -> Tensor:
            # A family's own activation may have parameters, which lie on the device.
            return activation(product.to(device)).to(HOST)

        return self.beside[0].experts(x, mine, gates, between, self.host_biases)

    def packed_bytes(self) -> int:
        """Bytes of packed integers, each expert counted once."""
        stacks = [*([self.hot] if self.hot is not None else []), *self.cold]
        return sum(stack.packed_bytes() for stack in stacks)

    def nbytes(self) -> int:
        """Bytes on the device and in host memory; slots that layers share are not counted."""
        arenas = [*([self.hot] if self.hot is not None else []), *self.cold]
        on_cpu = sum(stack.nbytes() for stack in self.beside)
        return sum(arena.nbytes() for arena in arenas) + on_cpu + int(self.placed.nbytes)

    def extra_repr(self) -> str:
        return f"{len(self.ids['hot'])} experts on the GPU, {len(self.ids['cold'])} in host memory"


def _of(biases: Biases, ids: Sequence[int]) -> Biases:
    """Those of some experts."""
    first, second = biases
    return (None if first is None else first[ids], None if second is None else second[ids])


def measured_rates(device: torch.device, stack: CpuStack, hidden: int, nbytes: float) -> Rates:
    """What copying to the device costs, and computing on the CPU, by trying both; on a device that
    is no GPU the copy is assumed.

    stack: some experts in host memory. hidden: width of their inputs. nbytes: of one of them.
    """
    E, dtype = len(stack.packed(0).table), stack.shapes[0].dtype
    every = torch.arange(E)[None]
    seconds = []
    for rows in (1, 33):
        x, gates = torch.randn(rows, hidden).to(dtype), torch.ones(rows, E)
        ids = every.expand(rows, E).contiguous()
        seconds.append(_seconds(partial(_compute, stack, x, ids, gates)))
    read = seconds[0] / (E * nbytes)
    row = max(0.0, seconds[1] - seconds[0]) / (32 * E * nbytes)
    if device.type != "cuda":
        return Rates(ASSUMED.copy, read, row, "measured on the CPU; copying is assumed")
    source = torch.zeros(TRIED, dtype=torch.uint8).pin_memory()
    target = torch.empty(TRIED, dtype=torch.uint8, device=device)

    def copy() -> None:
        target.copy_(source, non_blocking=True)
        torch.cuda.synchronize(device)

    return Rates(_seconds(copy) / TRIED, read, row, "measured")


def _compute(stack: CpuStack, x: Tensor, ids: Tensor, gates: Tensor) -> None:
    """An unfused activation is left out: half of the first product stands for it."""
    inner = stack.shapes[1].k
    stack.experts(x, ids, gates, lambda product: product[:, :inner].contiguous())


def _seconds(work: Callable[[], object]) -> float:
    """The best of a few tries; other work on the machine only takes time away."""
    found = []
    for _ in range(4):
        start = time.perf_counter()
        work()
        found.append(time.perf_counter() - start)
    return min(found)
