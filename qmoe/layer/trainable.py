"""What of a layer may move beside its integers, and the layer as a function of it."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from qmoe.layer.at_hand import LayerAtHand
from qmoe.layer.latent import MakesWeight
from qmoe.layer.routing import router_parameters
from qmoe.model.layerwise import Call


def movable(layer: LayerAtHand) -> dict[str, Tensor]:
    """What stays in 16 bits and may move, by name: norms and routers."""
    return router_parameters(layer) | norms(layer.named_modules())


def norms(modules: Iterable[tuple[str, nn.Module]]) -> dict[str, Tensor]:
    """The parameters of those modules that are norms, by name."""
    return {
        f"{name}.{key}": parameter
        for name, module in modules
        if "norm" in type(module).__name__.lower()
        for key, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == 1
    }


def biases(layer: LayerAtHand) -> dict[str, Tensor]:
    """The biases of everything in a layer, by name."""
    named = layer.module.named_parameters(prefix=layer.name)
    return {name: parameter for name, parameter in named if name.endswith("bias")}


def as_stored(parameter: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounded as it will be stored; the gradient passes straight through."""
    stored = parameter.detach().to(dtype).to(parameter.dtype)
    return parameter + (stored - parameter).detach()


def linear_weights(
    layer: LayerAtHand, matrices: Mapping[str, Sequence[MakesWeight]]
) -> dict[str, Tensor]:
    """The weights of linears, by parameter. matrices: of linears and of experts, by parameter."""
    owners = {target: target.rpartition(".")[0] for target in matrices}
    return {
        target: matrices[target][0].weight()
        for target, owner in owners.items()
        if owner not in layer.experts
    }


def run_with(layer: LayerAtHand, given: dict[str, Tensor], call: Call) -> Any:
    """The layer's output for one batch with these parameters, by their names in the model, in place
    of its own. Inside `running`, and with all of it on one device."""
    inside = {name.removeprefix(f"{layer.name}."): p for name, p in given.items()}
    return functional_call(layer.module, inside, *call)


@contextmanager
def running(layer: LayerAtHand) -> Iterator[None]:
    """Calling the layer's module runs it, though its batches are suspended there."""
    module: Any = layer.module
    before = module.forward
    module.forward = layer.forward
    try:
        yield
    finally:
        module.forward = before
