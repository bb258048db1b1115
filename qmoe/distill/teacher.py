"""The original model's logits for the text that a quantized one is distilled on.

Logits of all tokens of a vocabulary are too much to keep, and so are two models: kept is what comes
out of the last layer. A batch's logits are made from it when they are needed, by the model's own
forward with that in the place of every layer's output.
"""

from dataclasses import dataclass
from typing import Any

from jaxtyping import Int
from torch import Tensor

from qmoe.model.last_layer import Run, last_outputs, logits_of
from qmoe.model.skeleton import inputs_of
from qmoe.model.source import Source


@dataclass(frozen=True)
class Teacher:
    """batches: of token ids [B, L]. outputs: of the original's last layer, for each of them."""

    source: Source
    batches: list[Int[Tensor, "_ L"]]
    outputs: list[Any]

    @classmethod
    def of(cls, source: Source, batches: list[Int[Tensor, "_ L"]], run: Run) -> "Teacher":
        """Run the batches once through the original. run: loads one of its layers for all calls."""
        inputs = [inputs_of(source.model, ids) for ids in batches]
        return cls(source, batches, last_outputs(source.model, source.stages(), inputs, run))

    def logits(self, i: int) -> Tensor:
        """Those of batch i [B, L, V]."""
        model, inputs = self.source.model, inputs_of(self.source.model, self.batches[i])
        return logits_of(model, self.source.stages(), inputs, self.outputs[i])
