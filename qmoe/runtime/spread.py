"""A model on several devices: every decoder layer is on one of them, and computed there.

Layers on a CPU run through the C kernels there, while accelerate's own hooks would copy their
weights to a GPU for each token. So the hooks here do one thing: they move a module's inputs to its
device. What generates token by token needs one move of a hidden state from device to device.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from qmoe.errors import ConfigError
from qmoe.model.source import Source
from qmoe.runtime.run_on import place_of
from qmoe.system.devices import moved

Places = Mapping[str, torch.device]
SHARE = 0.8  # of a GPU's free memory that weights may take; the rest is for a cache and activations


def check_places(source: Source, places: Places) -> None:
    """Raises ConfigError for a map with names that the model does not have, that leaves modules
    out, that cuts a decoder layer, or that tears apart tensors that are one."""
    model, layers = source.model, [layer.name for layer in source.structure.layers]
    names = {name for name, _ in model.named_modules()}
    for name in places:
        if name not in names:
            raise ConfigError(
                f"device_map: the model has no module {name!r}; its layers are {layers[0]} to "
                f"{layers[-1]}"
            )
    for layer in layers:
        inside = [n for n in places if n.startswith(f"{layer}.")]
        if any(places[n] != place_of(places, layer) for n in inside):
            raise ConfigError(
                f"device_map: {inside[0]} is not on the device of its layer; qmoe computes a layer "
                f"on one device, so give {layer} alone"
            )
    for name, first in model.all_tied_weights_keys.items():
        devices = place_of(places, first), place_of(places, name)
        if len(set(devices)) > 1:
            raise ConfigError(
                f"device_map: {first} and {name} are one tensor, on {devices[0]} and {devices[1]}; "
                "give both one device"
            )


def move_apart(source: Source, places: Places) -> None:
    """Move every module of a filled model to its device, and have it take its inputs there. The
    model's outputs come on the device of its inputs."""
    model = source.model
    layers = [layer.name for layer in source.structure.layers]
    for name, module, whole in _units(model, layers):
        device = place_of(places, name)
        module._apply(lambda tensor, device=device: tensor.to(device), recurse=whole)
        if name:
            module.register_forward_pre_hook(_to(device), with_kwargs=True)
    model.register_forward_pre_hook(_remember, with_kwargs=True)
    model.register_forward_hook(_return)
    model.hf_device_map = {
        name: str(device) if device.type == "cpu" else device for name, device in places.items()
    }


def _units(model: nn.Module, layers: Sequence[str]) -> Iterator[tuple[str, nn.Module, bool]]:
    """The modules that take their inputs on their device, each with whether it is moved with all
    that is in it: decoder layers, linears, and others that hold tensors of their own."""
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if name.startswith(inside) and inside:
            continue
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        around = any(layer.startswith(f"{name}." if name else "") for layer in layers)
        if name in layers or ((own or isinstance(module, nn.Linear)) and not around):
            inside = (*inside, f"{name}.")
            yield name, module, True
        elif own:
            yield name, module, False


def _to(device: torch.device) -> Any:
    def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
        return moved(args, device), moved(dict(kwargs), device)

    return hook


def _remember(module: Any, args: Any, kwargs: Any) -> None:
    tensors = [v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor)]
    module._qmoe_asked_on = tensors[0].device if tensors else None


def _return(module: Any, args: Any, output: Any) -> Any:
    device = module._qmoe_asked_on
    if device is not None and hasattr(output, "logits"):
        output["logits"] = output.logits.to(device)
    return output


def fill_up(
    layers: Mapping[str, int], rest: int, free: Sequence[tuple[torch.device, int]]
) -> dict[str, torch.device]:
    """A map for layers in running order: on as few devices as it takes, those of `free` one after
    the other, and on the CPU what fits on none.

    layers: bytes by name. rest: bytes of all else, which is on the first device. free: devices with
    the bytes that they have.
    """
    left = [int(nbytes * SHARE) for _, nbytes in free]
    places, at = {"": free[0][0]}, 0
    left[0] -= rest
    for name, nbytes in layers.items():
        while at < len(free) and left[at] < nbytes:
            at += 1
        if at < len(free):
            left[at] -= nbytes
        places[name] = free[at][0] if at < len(free) else torch.device("cpu")
    return places if len(set(places.values())) > 1 else {"": free[0][0]}
