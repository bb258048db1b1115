"""What a layer that predicts a token beyond the next is given: the hidden states that come to the
output projection when batches finish, joined with the embeddings of the tokens that follow.

No batch runs through the layer by itself: it stands behind the model, whose forward leaves it out.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from jaxtyping import Int
from torch import Tensor, nn

from qmoe.errors import UnsupportedModelError
from qmoe.model.hooks import hooked
from qmoe.model.layerwise import Call
from qmoe.model.skeleton import free
from qmoe.model.source import Source
from qmoe.prediction.draft import joined, with_states
from qmoe.system.spill import Scratch


@dataclass
class Seen:
    """Of every batch, in order: the arguments of the layer that the prediction layer is like,
    without its hidden states, and the hidden states at the end of the model [B, L, H]."""

    calls: list[Call] = field(default_factory=list)
    hidden: list[Tensor] = field(default_factory=list)

    def check(self, name: str, calls: Sequence[Call]) -> None:
        """All batches wait at a layer. Raises UnsupportedModelError if layers pass on something
        else than hidden states [B, L, H], as those with hyper-connections do."""
        for call in calls:
            states = call.kwargs.get("hidden_states", call.args[0] if call.args else None)
            if not isinstance(states, Tensor) or states.dim() != 3:
                raise UnsupportedModelError(
                    f"{name}: layers of this model do not pass on plain hidden states, so what its "
                    "layer for predicting tokens beyond the next is given is not known; leave that "
                    "layer in 16 bits (--set mtp=keep)"
                )

    def keep_calls(self, calls: Sequence[Call]) -> None:
        """All batches wait at the layer that the prediction layer is like."""
        self.calls = [with_states(call, None) for call in calls]


@contextmanager
def seeing_last(source: Source, scratch: Scratch) -> Iterator[Seen]:
    """Inside, what comes to the output projection is kept, if the model has a prediction layer.
    Only the last token of each row is projected then: nobody asks for the logits."""
    seen = Seen()

    def keep(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        states, *rest = args
        seen.hidden.append(scratch.keep(states))
        return states[:, -1:], *rest

    head = source.model.get_output_embeddings()
    with hooked([] if source.prediction is None else [(head, keep)]):
        yield seen


@torch.no_grad()
def prediction_calls(
    source: Source, seen: Seen, batches: Sequence[Int[Tensor, "_ L"]], scratch: Scratch
) -> list[Call]:
    """The arguments of the prediction layer for everything that was seen, none if no text ran.
    batches: of token ids, which may have run more than once, all in the same order."""
    found, calls = source.prediction, list[Call]()
    assert found is not None
    if not seen.hidden:
        return calls
    names = [name for part in found.before for name in source.weights.sources(part)]
    source.weights.load(names, torch.float32)
    for i, (call, hidden) in enumerate(zip(seen.calls, seen.hidden, strict=True)):
        states = joined(source.model, found, hidden, batches[i % len(batches)])
        calls.append(with_states(call, scratch.keep(states)))
    if found.join.startswith(f"{found.layer}."):  # else it lies outside the layers, and stays
        for part in found.before:
            free(source.model.get_submodule(part))
    seen.hidden.clear()
    return calls
