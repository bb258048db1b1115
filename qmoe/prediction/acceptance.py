"""How many drafts of a prediction layer a model would accept: the share of places at which the
layer drafts the token that the model itself finds most likely there, after the same text.

At a place i the layer is given the model's hidden state of token i and the embedding of token
i + 1, and drafts token i + 2; the model's own choice is the one it makes at token i + 1. This is
the acceptance of the first draft when an engine decodes greedily. The layer of a quantized model
drafts for the quantized model, that of the original for the original.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from qmoe.model.hooks import hooked
from qmoe.model.layerwise import Call
from qmoe.model.source import Source
from qmoe.model.structure import Prediction
from qmoe.prediction.attach import prediction_of
from qmoe.prediction.draft import drafts, joined, with_states
from qmoe.system.devices import CPU, device_of, moved

Batches = Sequence[tuple[str, Int[Tensor, "_ _"]]]  # token ids by domain


@dataclass
class Watched:
    """Of every batch that ran through the model, in order: the arguments of the layer that the
    prediction layer is like, without hidden states, what the output projection was given [B, L, H],
    and the model's greedy choices [B, L]."""

    calls: list[Call] = field(default_factory=list)
    hidden: list[Tensor] = field(default_factory=list)
    greedy: list[Tensor] = field(default_factory=list)


@contextmanager
def watched(model: Any) -> Iterator[Watched]:
    """Inside, what a model with a prediction layer computes is noted."""
    found, seen = prediction_of(model), Watched()

    def call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.calls.append(with_states(Call(args, kwargs), None))

    def head(module: nn.Module, args: tuple[Tensor, ...], logits: Tensor) -> None:
        seen.hidden.append(args[0].to(CPU))
        seen.greedy.append(logits.argmax(-1).to(CPU))

    if found is None:
        yield seen
        return
    like, output = model.get_submodule(found.like), model.get_output_embeddings()
    with hooked([(like, call)], with_kwargs=True), hooked([], [(output, head)]):
        yield seen


@torch.no_grad()
def accepted(model: Any, seen: Watched, batches: Batches, run: Callable[..., Any]) -> list[float]:
    """Of every batch, how many drafts are accepted. run: the prediction layer."""
    found = prediction_of(model)
    assert found is not None
    counts = []
    each = zip(seen.calls, seen.hidden, seen.greedy, batches, strict=True)
    device = device_of(model.get_submodule(found.layer))
    for call, hidden, greedy, (_, ids) in each:
        states = joined(model, found, hidden.to(device), ids.to(device))
        args, kwargs = moved(with_states(call, states), device)
        drafted = drafts(model, found, run(*args, **kwargs)).to(CPU)
        counts.append(float((drafted[:, :-1] == greedy[:, 1:]).sum()))
    return counts


def shares(counts: list[float], batches: Batches) -> dict[str, float]:
    """The share of accepted drafts by domain, and of all ("all")."""
    right: dict[str, float] = {}
    places: dict[str, int] = {}
    for count, (domain, ids) in zip(counts, batches, strict=True):
        for name in (domain, "all"):
            right[name] = right.get(name, 0.0) + count
            places[name] = places.get(name, 0) + ids[:, 1:].numel()
    return {name: right[name] / max(places[name], 1) for name in right}


def of_models(
    models: dict[str, Any], source: Source | None, seen: dict[str, Watched], batches: Batches
) -> dict[str, dict[str, float]]:
    """The shares of the original, if it has such a layer, and of every model that has it. source:
    the original. seen: by model."""
    found = {}
    if source is not None and source.prediction is not None:
        layer: Prediction = source.prediction
        with source.loaded(layer.layer, source.model.dtype) as module:
            counts = accepted(source.model, seen["original"], batches, module.forward)
        found["original"] = shares(counts, batches)
    for name, model in models.items():
        own = prediction_of(model)
        if own is not None:
            counts = accepted(model, seen[name], batches, model.get_submodule(own.layer))
            found[name] = shares(counts, batches)
    return found
