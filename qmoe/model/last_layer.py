"""A model cut behind its last layer: what comes out of that, and the logits that follow from it.

Logits of all tokens of a text over a vocabulary are too much to keep; what comes out of the last
layer is not.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qmoe.model.layerwise import Call, Finished, Forward, suspended

# Loads layer i, whose own forward is given, and gives its output for each of the calls.
Run = Callable[[int, Forward, list[Call]], list[Any]]


@torch.no_grad()
def last_outputs(
    model: nn.Module, layers: Sequence[nn.Module], inputs: Sequence[dict[str, Any]], run: Run
) -> list[Any]:
    """The outputs of the last layer that is reached, one for each of `inputs`."""
    outputs: list[Any] = []
    for event in suspended(model, layers, inputs):
        if isinstance(event, Finished):
            continue  # there are more layers, which no text reaches
        outputs = run(event.index, event.forward, event.calls)
        if event.index + 1 < len(layers):
            event.go_on(list(outputs))
    return outputs


@torch.no_grad()
def logits_of(
    model: nn.Module, layers: Sequence[nn.Module], inputs: dict[str, Any], output: Any
) -> Tensor:
    """The model's logits [B, L, V] where `output` comes out of the last layer: its own forward,
    with that in the place of every layer's output."""
    for event in suspended(model, layers, [inputs]):
        if isinstance(event, Finished):
            logits: Tensor = event.output.logits
            return logits
        event.go_on([output])
    raise RuntimeError("the batch did not come out of the model")
