"""What the steps of quantizing one layer share."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qmoe.calibration.capture import Captured
from qmoe.calibration.stats import LayerStats
from qmoe.config import QuantConfig, Scheme
from qmoe.format.quantized import Quantized
from qmoe.layer.solved_cache import Units
from qmoe.model.structure import Layer
from qmoe.system.spill import Scratch


@dataclass
class Result:
    """Of one layer. captured: what experts received, if their statistics are not all needed at
    once. weights: quantized stacks by parameter name, originals: what they were made from, if they
    are to be tuned. changed: other parameters that AWQ rescaled.
    record: what goes into the report."""

    stats: LayerStats = field(default_factory=LayerStats)
    captured: dict[str, Captured] = field(default_factory=dict)
    weights: dict[str, Quantized] = field(default_factory=dict)
    originals: dict[str, Tensor] = field(default_factory=dict)
    changed: set[str] = field(default_factory=set)
    record: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Job:
    """What is the same for every part of a layer. tokens: of calibration text, in all batches of
    all ranks. scratch: where activations wait. units: where solved experts are kept. last: whether
    nothing behind the layer is to be run. stored: the dtype that a parameter has on disk."""

    model: nn.Module
    layer: Layer
    config: QuantConfig
    schemes: dict[str, Scheme]
    scale_dtype: torch.dtype
    tokens: int
    save: Callable[[LayerStats], None] | None = None
    scratch: Scratch = field(default_factory=Scratch)
    units: Units | None = None
    last: bool = False
    stored: Callable[[str], torch.dtype] = lambda name: torch.float32

    @property
    def whole(self) -> bool:
        """Whether statistics of all experts are needed at once: AWQ folds them into the layer, and
        a file holds all of them."""
        return self.save is not None or self.config.applies_awq

    @property
    def refits(self) -> bool:
        """Whether matrices are fitted to quantized ones before them: that takes text, and all
        experts' statistics only when those before them are solved."""
        return self.config.refit and self.config.method == "gptq" and not self.whole
