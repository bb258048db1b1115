"""Where a budget of bytes is counted: in the weight files, or in the memory of a GPU."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import ceil, prod

from qmoe.budget.ways import ways
from qmoe.config import BITS, QuantConfig, Scheme
from qmoe.model.source import Source
from qmoe.plan.choose import AT_ONCE, measure
from qmoe.plan.in_memory import Weights, expert_sizes, gpu_matrices, in_memory
from qmoe.plan.placement import CUDA, CUDA_HOST, MARGIN, SLOTS, Budget, Load, place
from qmoe.plan.run_plan import RunPlan
from qmoe.plan.sizes import SHAPE, Stack, sizes, stacks
from qmoe.plan.workspace import workspace
from qmoe.system.host_memory import PROCESS

PLENTY = 1 << 60  # bytes
COPIES = 3  # of an expert in host memory: for the CPU, and pinned, which rounds up to twice as much


@dataclass(frozen=True)
class Disk:
    """Bytes of the weight files, headers counted at their most."""

    source: Source

    def total(self, config: QuantConfig) -> int:
        """What these settings take."""
        found = sizes(self.source, config, stacks(self.source, config))
        return found.tensors + found.headers

    def each(self, module: Sequence[Stack]) -> list[list[int]]:
        """Of each stack of a module, what one of its matrices takes in each of its ways."""
        scale = self.source.weight_dtype().itemsize
        return [[one.weights + one.scales(scale) for one in _each_way(part)] for part in module]


@dataclass(frozen=True)
class Gpu:
    """Bytes of a GPU's memory, margin left out: what `qmoe plan` counts. context: tokens of a
    sequence. ram: bytes of host memory in which routed experts may lie, None for none: all of the
    model is on the GPU then."""

    source: Source
    context: int
    ram: int | None = None

    def usable(self, vram: int) -> int:
        """Bytes that the model may take, in the layout of the GPU's kernels, if the GPU has `vram`
        bytes: those that are not margin, and what host memory has room for."""
        on_gpu = int(vram / (1 + MARGIN))
        if self.ram is None:
            return on_gpu
        room = int(self.ram / (1 + MARGIN)) - PROCESS - CUDA_HOST - self._loading
        return on_gpu - self._staging + max(0, room // COPIES)

    @cached_property
    def _widest(self) -> Weights:
        scheme = Scheme(max(BITS), 128)
        config = QuantConfig(experts=scheme)
        return in_memory(self.source, config, stacks(self.source, config), gpu=True)

    @property
    def _loading(self) -> int:
        """What loading takes of host memory at most."""
        found = self._widest
        return found.loading() + found.embeddings + found.lm_head + found.other

    @property
    def _staging(self) -> int:
        """What slots take at most through which experts in host memory are copied."""
        every = self._widest.routed
        return SLOTS * max((m.expert for m in every), default=0) + 2 * sum(m.table for m in every)

    def plan(self, config: QuantConfig, nbytes: int, vram: int) -> RunPlan:
        """How the model runs that takes `nbytes` bytes with these settings."""
        on_gpu = int(vram / (1 + MARGIN))
        loading, ram = self._loading, self.ram
        host = loading if ram is None else ram
        if nbytes <= on_gpu:
            return RunPlan(vram, host, self.context, 1, nbytes - CUDA, loading, None, False)
        modules: dict[str, list[Stack]] = {}
        for part in stacks(self.source, config):
            if part.routed:
                modules.setdefault(part.module, []).append(part)
        dtype = self.source.weight_dtype()
        routed = sum(sum(expert_sizes(parts, dtype)) for parts in modules.values())
        memory = on_gpu - (nbytes - routed)
        need = loading + COPIES * (routed - memory + self._staging)
        return RunPlan(vram, host, self.context, 1, on_gpu - CUDA, need, memory, True)

    @cached_property
    def run(self) -> Load:
        """The cache, activations and workspace of one sequence."""
        found = measure(self.source, self.context)
        every = stacks(self.source, QuantConfig())
        dtype = self.source.weight_dtype()
        return Load(found, workspace(every, dtype, found.chosen, AT_ONCE, True), 1)

    def total(self, config: QuantConfig) -> int:
        """What settings take in which all experts have one width."""
        parts = stacks(self.source, config)
        weights = in_memory(self.source, config, parts, gpu=True)
        placed = place(weights, self.run, Budget(PLENTY, PLENTY))
        return sum(part.gpu for part in placed.parts if not part.name.startswith("margin"))

    def each(self, module: Sequence[Stack]) -> list[list[int]]:
        """As for the disk. Tables, which are the same for all ways, are not counted."""
        from qmoe.kernels.arena import expert_bytes

        found: list[list[int]] = [[] for _ in module]
        dtype = self.source.weight_dtype()
        for like in zip(*(_each_way(part) for part in module), strict=True):
            for row, matrix in zip(found, gpu_matrices(like), strict=True):
                row.append(expert_bytes([matrix], [matrix.bits], dtype))
        return found


Memory = Disk | Gpu


def _each_way(part: Stack) -> list[Stack]:
    """One matrix of a part in each of its ways."""
    one = replace(part, shape=(1, *part.shape[1:]), widths=())
    return [replace(one, scheme=scheme) for scheme in ways(part.scheme)]


def average_bits(source: Source, config: QuantConfig) -> float:
    """Stored bits of a quantized weight on average, scales and zero points counted."""
    stored, weights = _stored(source, config)
    return 8 * stored / weights


def bytes_for(source: Source, config: QuantConfig, bits: float) -> int:
    """The bytes of the weight files in which a quantized weight takes `bits` on average, scales and
    zero points counted."""
    stored, weights = _stored(source, config)
    return Disk(source).total(config) - stored + ceil(weights * bits / 8)


def _stored(source: Source, config: QuantConfig) -> tuple[int, int]:
    """Bytes of integers, scales and zero points, and how many weights they are for."""
    every, scale = stacks(source, config), source.weight_dtype().itemsize
    shapes = sum(SHAPE * part.shape[0] * part.matrices for part in every)
    stored = sum(part.weights + part.scales(scale) for part in every) - shapes
    return stored, sum(prod(part.shape) for part in every)
