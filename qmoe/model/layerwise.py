"""Suspended forward passes: a model's own forward, stopped at every decoder layer.

Every batch runs `model(...)` in a greenlet that switches out when it reaches a layer. When all
batches wait at layer i, the caller sees all their inputs, does what it likes (load the layer,
collect statistics, quantize it, free it), and gives back the layer's outputs; the batches run on.
So one layer is in memory at a time, and whatever the model does around its layers (masks, rotary
tables, residual streams, encoder and decoder) is the model's own code.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import greenlet
import torch
from torch import nn

from qmoe.system.devices import moved

Forward = Callable[..., Any]


class Call(NamedTuple):
    """The arguments one batch passed to a layer."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def moved(self, device: torch.device) -> "Call":
        """The same arguments on that device; this call keeps its own."""
        kwargs = {name: moved(value, device) for name, value in self.kwargs.items()}
        return Call(moved(self.args, device), kwargs)


@dataclass
class Waiting:
    """All batches wait at layer `index`. forward: the layer's own; calls: one for each batch."""

    index: int
    forward: Forward
    calls: list[Call]
    _outputs: list[Any] | None = field(default=None, init=False)

    def go_on(self, outputs: list[Any]) -> None:
        """Let every batch run on with its output of the layer. The list is emptied on the way, so
        that an output lives no longer than its batch needs it."""
        self._outputs = outputs


@dataclass(frozen=True)
class Finished:
    """One batch has run through. output: the model's."""

    output: Any


def suspended(
    model: nn.Module, layers: Sequence[nn.Module], inputs: Sequence[dict[str, Any]]
) -> Iterator[Waiting | Finished]:
    """Run the model on every element of `inputs`: yields `Waiting` once per layer, then `Finished`
    once per element, in order.

    All passes end at a layer where the caller does not say `go_on`. Layers must be reached by all
    batches in the same order; a RuntimeError says where they were not. The layers get their forward
    back when the iterator ends, is closed or fails.
    """
    main = greenlet.getcurrent()
    original = [layer.forward for layer in layers]

    def waiting_at(i: int) -> Forward:
        return lambda *args, **kwargs: main.switch((i, Call(args, kwargs)))

    for i, layer in enumerate(layers):
        layer.forward = waiting_at(i)
    try:
        batches = [greenlet.greenlet(lambda start, x=x: model(**x)) for x in inputs]
        outputs: list[Any] = [None] * len(batches)  # the first switch starts a batch
        while True:
            states = []
            for batch in batches:
                state = batch.switch(outputs.pop(0))
                if batch.dead:
                    yield Finished(state)
                else:
                    states.append(state)
            if not states:
                return
            i = states[0][0]
            if any(b.dead or state[0] != i for b, state in zip(batches, states, strict=True)):
                raise RuntimeError(f"batches reached different layers after layer {i}")
            event = Waiting(i, original[i], [state[1] for state in states])
            yield event
            if event._outputs is None:
                return
            outputs = event._outputs
            del event
    finally:
        for layer in layers:
            del layer.forward
