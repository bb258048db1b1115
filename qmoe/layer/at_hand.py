"""The decoder layer that is in memory, what it is quantized with, and what becomes of it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qmoe.calibration.collect import See, collecting_experts
from qmoe.config import QuantConfig, Scheme
from qmoe.format.trellis import Stack
from qmoe.layer.records import LayerRecord
from qmoe.model.layerwise import Call, Forward
from qmoe.model.structure import Layer
from qmoe.solved.kept_matrices import KeptMatrices
from qmoe.solved.solved_cache import SolvedCache
from qmoe.system.devices import CPU, device_of, moved
from qmoe.system.spill import Scratch


@dataclass(frozen=True)
class LayerAtHand:
    """Names are those in the model.

    structure: the names of its parts.
    module: the layer itself. forward: its own, while batches wait where its forward is called.
    experts: fused experts modules. linears: those to be quantized, of unfused experts among them.
    schemes: of everything to be quantized, by module. widths: bits of each expert's matrix, by
        stack, where they are not the scheme's.
    is_last: whether nothing behind the layer is to be run.
    """

    structure: Layer
    module: nn.Module
    forward: Forward
    experts: dict[str, Any]
    linears: dict[str, Any]
    schemes: dict[str, Scheme]
    is_last: bool = False
    widths: dict[str, tuple[int, ...]] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        model: nn.Module,
        structure: Layer,
        forward: Forward,
        schemes: dict[str, Scheme] | None = None,
        is_last: bool = False,
        widths: dict[str, tuple[int, ...]] | None = None,
    ) -> "LayerAtHand":
        """The layer of a model with these names."""
        schemes = schemes or {}
        experts = {name: model.get_submodule(name) for name in structure.experts}
        linears = {name: model.get_submodule(name) for name in schemes if name not in experts}
        module = model.get_submodule(structure.name)
        return cls(structure, module, forward, experts, linears, schemes, is_last, widths or {})

    @property
    def name(self) -> str:
        return self.structure.name

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return device_of(self.module)

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """All modules in it, with their names in the model."""
        yield from self.module.named_modules(prefix=self.name)

    def submodule(self, name: str) -> Any:
        """The module of that name in the model."""
        return self.module.get_submodule(name.removeprefix(self.name).removeprefix("."))

    def parameter(self, name: str) -> Tensor:
        """The parameter of that name in the model."""
        return self.module.get_parameter(name.removeprefix(f"{self.name}."))

    def run(self, calls: list[Call], see: See | None = None) -> Iterator[Any]:
        """Its output for each batch, with experts run by qmoe: they may be in 16 bits, whatever the
        activations are. Batches come to where the layer is, and outputs go back. see: is shown what
        experts are given (calibration/collect.py)."""
        device = self.device
        with collecting_experts(self.experts, see):
            for call in calls:
                args, kwargs = call.moved(device)
                yield moved(self.forward(*args, **kwargs), CPU)


@dataclass(frozen=True)
class LayerSettings:
    """The same for all layers of a run.

    tokens: of calibration text, in all batches of all ranks.
    scale_dtype: of the scales that are stored. stored_dtype: of a parameter on disk, by name.
    refits: whether matrices are fitted to quantized ones before them.
    needs_all_hessians: whether statistics of all experts of a layer are needed at once: AWQ folds
        them into the layer, and a file holds all of them.
    scratch: where activations wait. solved_cache: where solved experts are kept until their layer
        is written. kept_matrices: where matrices are kept for other runs.
    """

    config: QuantConfig
    tokens: int
    scale_dtype: torch.dtype
    stored_dtype: Callable[[str], torch.dtype] = lambda name: torch.float32
    refits: bool = False
    needs_all_hessians: bool = False
    scratch: Scratch = field(default_factory=Scratch)
    solved_cache: SolvedCache | None = None
    kept_matrices: KeptMatrices | None = None


@dataclass
class QuantizedLayer:
    """What quantizing a layer gives.

    weights: quantized stacks by parameter.
    originals: what they were made from, if the layer is to be tuned.
    changed: other parameters that AWQ rescaled or tuning moved.
    """

    record: LayerRecord
    weights: dict[str, Stack] = field(default_factory=dict)
    originals: dict[str, Tensor] = field(default_factory=dict)
    changed: set[str] = field(default_factory=set)
