"""What runs on a GPU while a model is quantized: one layer, with its calibration batches one at a
time. All that waits, statistics and finished integers among it, is in the machine's own memory.
"""

from typing import Any

import torch
from torch import Tensor, nn

from qmoe.errors import ConfigError
from qmoe.system import distributed

CPU = torch.device("cpu")


def find_device(name: str | torch.device) -> torch.device:
    """The device of that name; "cuda" is a GPU for each rank. ConfigError if it is none or is not
    there."""
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise ConfigError(f"device: expected cpu, cuda or cuda:N, got {name!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device: expected cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cpu":
        return CPU
    count = torch.cuda.device_count()
    if (device.index or 0) >= count:
        raise ConfigError(f"device: {name!r} asked for, {count} CUDA devices found")
    if device.index is None and distributed.count() > 1:
        return torch.device("cuda", distributed.local() % count)
    return device


def move_to(module: nn.Module, device: torch.device) -> None:
    """Move a module's parameters and buffers, but those on the meta device."""
    module._apply(lambda tensor: tensor if tensor.is_meta else tensor.to(device))


def device_of(module: nn.Module) -> torch.device:
    """The device of a module that `move_to` moved."""
    return next((p.device for p in module.parameters() if not p.is_meta), CPU)


def moved(value: Any, device: torch.device) -> Any:
    """A layer's argument or output with its tensors moved. Dictionaries and lists stay the same
    objects, since layers leave things in them for those behind."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        value.update({key: moved(v, device) for key, v in value.items()})
    elif isinstance(value, list):
        value[:] = [moved(v, device) for v in value]
    elif isinstance(value, tuple):
        parts = [moved(v, device) for v in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value
