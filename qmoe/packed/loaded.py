"""What a loaded packed model does in another way than other models of transformers: it stays in the
dtype and on the kind of device that its weights are laid out for, and is saved as its folder."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from qmoe.errors import ConfigError
from qmoe.model.source import Source
from qmoe.packed.save import files_of, save
from qmoe.runtime.gradients import add_placeholders


def guard(source: Source) -> None:
    """Give a filled model of a folder its own `save_pretrained`, refuse to change its dtype, and
    let adapters find its experts."""
    model = source.model
    add_placeholders(model)
    _keep_dtypes(model)
    model.save_pretrained = partial(save, model, source.folder, files_of(source.folder.path))


def _keep_dtypes(model: Any) -> None:
    """Refuse to change the dtype of a loaded model: packed weights run in the one they were loaded
    for, and what its class keeps in float32 would be rounded."""
    move = model.to

    def to(*args: Any, **kwargs: Any) -> Any:
        device, dtype, blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
        if dtype is not None and dtype != model.config.dtype:
            raise ConfigError(
                "dtype: a loaded qmoe model stays in the one it was loaded in; load it again with "
                f"dtype={dtype}"
            )
        if device is not None and hasattr(model, "hf_device_map"):
            raise ConfigError(
                f"device: the model is on several; load it again with device_map={str(device)!r}"
            )
        if device is not None and device.type != model.device.type:
            raise ConfigError(
                f"device: packed weights are laid out for {model.device.type}; load the model "
                f'again with device="{device}" (device_map="{device}" of from_pretrained)'
            )
        return model if device is None else move(device, non_blocking=blocking)

    def refuse(dtype: torch.dtype) -> Callable[[], Any]:
        return lambda: to(dtype)

    model.to = to
    for name in ("float", "double", "half", "bfloat16"):
        setattr(model, name, refuse(getattr(torch, name)))
