"""Suspended forward passes: a model's own forward, stopped at every decoder layer.

Every batch runs `model(...)` in a greenlet that switches out when it reaches a layer. When all
batches wait at layer i, one function sees all their inputs, does what it likes (load the layer,
gather statistics, quantize it, free it), and gives back the layer's outputs; the batches run on.
So one layer is in memory at a time, and whatever the model does around its layers (masks, rotary
tables, residual streams, encoder and decoder) is the model's own code.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import greenlet
import torch
from torch import nn

from qmoe.system.devices import moved


class Call(NamedTuple):
    """The arguments one batch passed to a layer."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def moved(self, device: torch.device) -> "Call":
        """The same arguments on that device; this call keeps its own."""
        kwargs = {name: moved(value, device) for name, value in self.kwargs.items()}
        return Call(moved(self.args, device), kwargs)


Visit = Callable[[int, Callable[..., Any], list[Call]], list[Any] | None]


def suspended(
    model: nn.Module,
    layers: Sequence[nn.Module],
    inputs: Sequence[dict[str, Any]],
    visit: Visit,
) -> Iterator[Any]:
    """Run the model on every element of `inputs` and yield its outputs in order.

    visit(i, forward, calls) is called once per layer i, with the layer's real forward and one Call
    per batch, and returns the layer's output for each, or None to end all passes there. Layers must
    be reached by all batches in the same order; a RuntimeError says where they were not. The layers
    get their forward back when the iterator ends, is closed or fails.
    """
    main = greenlet.getcurrent()
    original = [layer.forward for layer in layers]

    def waiting_at(i: int) -> Callable[..., Any]:
        return lambda *args, **kwargs: main.switch((i, Call(args, kwargs)))

    for i, layer in enumerate(layers):
        layer.forward = waiting_at(i)
    try:
        batches = [greenlet.greenlet(lambda x=x: model(**x)) for x in inputs]
        states = [batch.switch() for batch in batches]
        while not batches[0].dead:
            i = states[0][0]
            if any(b.dead or state[0] != i for b, state in zip(batches, states, strict=True)):
                raise RuntimeError(f"batches reached different layers after layer {i}")
            outputs = visit(i, original[i], [state[1] for state in states])
            if outputs is None:
                return
            states = []
            for batch in batches:
                # Popped, so that an output lives no longer than its batch needs it.
                state = batch.switch(outputs.pop(0))
                if batch.dead:
                    yield state
                else:
                    states.append(state)
            if not states:
                return
    finally:
        for layer in layers:
            del layer.forward
