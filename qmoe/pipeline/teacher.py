"""The original model's logits for the text that a quantized one is distilled on.

Logits of all tokens of a vocabulary are too much to keep, and so are two models: kept is what comes
out of the last layer. A batch's logits are made from it when they are needed, by the model's own
forward with that in the place of every layer's output.
"""

from typing import Any

import torch
from torch import Tensor

from qmoe.layer.at_hand import LayerAtHand
from qmoe.model.last_layer import last_outputs, logits_of
from qmoe.model.layerwise import Call, Forward
from qmoe.model.skeleton import inputs_of
from qmoe.pipeline.layers import rotate_layer
from qmoe.pipeline.plan import Plan
from qmoe.system.devices import move_to
from qmoe.system.spill import Scratch


class Teacher:
    """batches: of token ids [B, L]. Runs them once through the original model."""

    def __init__(self, plan: Plan, batches: list[Tensor], scratch: Scratch):
        self.plan, self.batches, self.scratch = plan, batches, scratch
        model, layers = plan.source.model, plan.source.stages()
        self.outputs = last_outputs(
            model, layers, [inputs_of(model, b) for b in batches], self._run
        )

    def logits(self, i: int) -> Tensor:
        """Those of batch i [B, L, V]."""
        model, layers = self.plan.source.model, self.plan.source.stages()
        return logits_of(model, layers, inputs_of(model, self.batches[i]), self.outputs[i])

    def _run(self, i: int, forward: Forward, calls: list[Call]) -> list[Any]:
        plan, structure = self.plan, self.plan.source.structure.layers[i]
        with plan.source.loaded(structure.name, torch.float32, plan.experts_dtype) as module:
            rotate_layer(plan, structure)
            move_to(module, plan.device)
            layer = LayerAtHand.of(plan.source.model, structure, forward)
            return [self.scratch.keep(output) for output in layer.run(calls)]
