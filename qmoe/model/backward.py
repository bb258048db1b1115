"""The gradient of a loss on a model's output, with one layer in memory at a time.

On the way forward each layer runs without a graph, and its output is a new leaf; what the model
does between its layers (masks, norms, residual streams of its own) is recorded by autograd as
usual, with the leaves in it. On the way back each layer runs once more, on the same inputs, and
hands the gradient of its output on to the output of the layer before it.

Tensors that layers leave for each other in dictionaries and lists are constants here: no gradient
flows through them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qmoe.model.last_layer import Run
from qmoe.model.layerwise import Call, Finished, Forward, suspended

Keep = Callable[[Any], Any]


@dataclass(frozen=True)
class Passed:
    """What one batch was given at a layer, and the leaves that came out of it."""

    index: int
    forward: Forward
    call: Call
    output: Any


def forward(
    model: nn.Module, layers: Sequence[nn.Module], inputs: dict[str, Any], run: Run, keep: Keep
) -> tuple[Any, list[Passed]]:
    """The model's output for one batch, with the graph of what comes behind its last layer, and
    what `backward` needs. keep: gives a tensor a place to wait in (system/spill.py)."""
    passed: list[Passed] = []
    with torch.enable_grad():
        for event in suspended(model, layers, [inputs]):
            if isinstance(event, Finished):
                return event.output, passed
            [call] = event.calls
            with torch.no_grad():
                [output] = run(event.index, event.forward, [_each(call, Tensor.detach)])
            leaves = _each(output, lambda t: _leaf(keep(t.detach())))
            passed.append(Passed(event.index, event.forward, call, leaves))
            event.go_on([leaves])
    raise RuntimeError("the batch did not come out of the model")


def backward(loss: Tensor, passed: list[Passed], run: Run) -> None:
    """Add the gradient of `loss` to the leaves that `run` computes with, and to those that lie
    behind the last layer. Empties `passed`."""
    with torch.enable_grad():
        loss.backward()
        while passed:
            step = passed.pop()
            slopes = [leaf.grad for leaf in _tensors(step.output)]
            given = _each(step.call, lambda t: _leaf(t.detach()) if t.requires_grad else t)
            # Copies, since a layer may add to its input in place, which a leaf does not allow.
            [again] = run(step.index, step.forward, [_each(given, Tensor.clone)])
            pairs = [
                (y, slope)
                for y, slope in zip(_tensors(again), slopes, strict=True)
                if slope is not None and y.requires_grad
            ]
            _hand_on(pairs)
            both = zip(_tensors(step.call), _tensors(given), strict=True)
            _hand_on([(x, leaf.grad) for x, leaf in both if leaf.grad is not None])


def _hand_on(pairs: list[tuple[Tensor, Tensor]]) -> None:
    if pairs:
        # What the model does between layers may share a graph with what it does before others.
        tensors, slopes = zip(*pairs, strict=True)
        torch.autograd.backward(tensors, slopes, retain_graph=True)


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.requires_grad_() if tensor.is_floating_point() else tensor


def _each(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A call or an output with its tensors changed; dictionaries and lists stay what they are."""
    if isinstance(value, Call):
        kwargs = {name: _each(v, change) for name, v in value.kwargs.items()}
        return Call(_each(value.args, change), kwargs)
    if isinstance(value, tuple):
        parts = [_each(v, change) for v in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return change(value) if isinstance(value, Tensor) else value


def _tensors(value: Any) -> list[Tensor]:
    """Those that `_each` changes, in its order."""
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    _each(value, note)
    return found
