"""Where and how packed weights run: what the options of `load` come to."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qmoe.errors import ConfigError
from qmoe.system.devices import find_device

if TYPE_CHECKING:
    from qmoe.kernels.hosted.hybrid import How


@dataclass(frozen=True)
class RunOn:
    """device: where products are computed.
    home: the memory that routed experts stay in, if it is another (runtime/offload.py).
    exact: on a CPU, take activations as they are instead of rounding them to 8 bits.
    cache: on a CPU, keep large models in the kernels' layout for the next load.
    prepared: on a CPU, the buffers in the kernels' layout, if they need not be made from the stored
        tensors (runtime/prepared.py), by the module's name and the place of the matrix in it.
    places: of modules by the beginnings of their names, for a model on several devices
        (runtime/spread.py); `at` gives how a module runs.
    hot: of experts modules whose experts do not all lie on the GPU, those that do. how: the others
        are computed (runtime/hybrid.py)."""

    device: torch.device
    home: torch.device | None = None
    exact: bool = False
    cache: bool = True
    prepared: Mapping[str, Tensor] | None = None
    places: Mapping[str, torch.device] = field(default_factory=dict)
    hot: Mapping[str, Sequence[int]] = field(default_factory=dict)
    how: "How | None" = None

    def at(self, name: str) -> "RunOn":
        """How the module of this name runs."""
        return replace(self, device=place_of(self.places, name)) if self.places else self


def place_of(places: Mapping[str, torch.device], name: str) -> torch.device:
    """The device of a module, by the longest name among `places` that it is or lies in; "" is the
    whole model. ConfigError if there is none."""
    while name not in places:
        if not name:
            raise ConfigError(
                f"device_map: expected a device for every module, found {sorted(places)}; add one "
                'for what is left, under the name ""'
            )
        name = name.rpartition(".")[0]
    return places[name]


def usable_device(device: str | torch.device) -> torch.device:
    """The device by its name, "auto" for a GPU if there is one; ConfigError if it is none, is not
    there, or has no kernels."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    run_on = find_device(device)
    if run_on.type == "cuda":
        from qmoe.kernels.layer import device_table

        try:
            device_table(run_on)
        except ValueError as error:
            raise ConfigError(f"device: {error}") from error
    return run_on
