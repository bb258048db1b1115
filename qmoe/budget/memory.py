"""Where a budget of bytes is counted: in the weight files, or in the memory of a GPU."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import ceil, prod

from qmoe.config import BITS, QuantConfig
from qmoe.model.source import Source
from qmoe.plan.choose import AT_ONCE, measure
from qmoe.plan.in_memory import gpu_matrices, in_memory
from qmoe.plan.placement import MARGIN, Budget, Load, place
from qmoe.plan.sizes import SHAPE, Stack, sizes, stacks
from qmoe.plan.workspace import workspace

PLENTY = 1 << 60  # bytes


@dataclass(frozen=True)
class Disk:
    """Bytes of the weight files, headers counted at their most."""

    source: Source

    def total(self, config: QuantConfig) -> int:
        """What these settings take."""
        found = sizes(self.source, config, stacks(self.source, config))
        return found.tensors + found.headers

    def each(self, module: Sequence[Stack]) -> list[list[int]]:
        """Of each stack of a module, what one of its matrices takes at each of BITS."""
        scale = self.source.weight_dtype().itemsize
        return [[one.weights + one.scales(scale) for one in _at_all(part)] for part in module]


@dataclass(frozen=True)
class Gpu:
    """Bytes of a GPU's memory, margin left out, if all of the model lies there: what `qmoe plan`
    counts. context: tokens of a sequence."""

    source: Source
    context: int

    def usable(self, vram: int) -> int:
        """Of so many bytes, those that are not margin."""
        return int(vram / (1 + MARGIN))

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
        """As for the disk. Scales and tables are the same for all widths, and not counted."""
        from qmoe.kernels.arena import ALIGN

        return [
            [-(-matrix.weight_bytes(bits) // ALIGN) * ALIGN for bits in BITS]
            for matrix in gpu_matrices(module)
        ]


Memory = Disk | Gpu


def _at_all(part: Stack) -> list[Stack]:
    """One matrix of a part at each of BITS."""
    one = replace(part, shape=(1, *part.shape[1:]), widths=())
    return [replace(one, scheme=replace(part.scheme, bits=bits)) for bits in BITS]


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
