"""The original model's logits for the text that a quantized one is distilled on, and those of its
routers.

Logits of all tokens of a vocabulary are too much to keep, and so are two models: kept is what comes
out of the last layer. A batch's logits are made from it when they are needed, by the model's own
forward with that in the place of every layer's output. Routers have few logits, which are kept.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jaxtyping import Int
from torch import Tensor

from qmoe.layer.routing import Parameters
from qmoe.model.last_layer import last_outputs, logits_of
from qmoe.model.layerwise import Call, Forward
from qmoe.model.skeleton import inputs_of
from qmoe.model.source import Source

# Layer i's outputs in the original for each of the calls, and the logits of its routers there.
RoutedRun = Callable[[int, Forward, list[Call]], tuple[list[Any], list[Parameters]]]


@dataclass(frozen=True)
class Teacher:
    """batches: of token ids [B, L]. outputs: of the original's last layer, for each of them.
    routing: router logits [T, E] by experts module, for each layer and batch."""

    source: Source
    batches: list[Int[Tensor, "_ L"]]
    outputs: list[Any]
    routing: list[list[Parameters]]

    @classmethod
    def of(cls, source: Source, batches: list[Int[Tensor, "_ L"]], run: RoutedRun) -> "Teacher":
        """Run the batches once through the original. run: loads one of its layers for all calls."""
        inputs = [inputs_of(source.model, ids) for ids in batches]
        routing: list[list[Parameters]] = [[] for _ in source.stages()]

        def outputs_of(i: int, forward: Forward, calls: list[Call]) -> list[Any]:
            outputs, routing[i] = run(i, forward, calls)
            return outputs

        outputs = last_outputs(source.model, source.stages(), inputs, outputs_of)
        return cls(source, batches, outputs, routing)

    def logits(self, i: int) -> Tensor:
        """Those of batch i [B, L, V]."""
        model, inputs = self.source.model, inputs_of(self.source.model, self.batches[i])
        return logits_of(model, self.source.stages(), inputs, self.outputs[i])
