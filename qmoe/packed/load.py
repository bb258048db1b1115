"""`load`: a quantized folder as a transformers model that runs packed."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qmoe.checkpoint.model_config import generation_config
from qmoe.checkpoint.model_folder import ModelFolder
from qmoe.checkpoint.tokenizer import has_tokenizer
from qmoe.errors import ConfigError, OutputError
from qmoe.kernels import uses_arena
from qmoe.model.source import Source, check_complete
from qmoe.packed.audit import audit_model, audit_unpacked
from qmoe.packed.modules import PackedLinear, finish_experts
from qmoe.packed.offload import offload_experts
from qmoe.packed.skeleton import open_packed
from qmoe.system.devices import find_device
from qmoe.system.host_memory import return_freed
from qmoe.system.progress import is_shown, progress, shown
from qmoe.system.sizes import parse_size


@dataclass(frozen=True)
class Loading:
    """How a quantized model is loaded: the options of `load`, for what loads several."""

    dtype: torch.dtype | None = None
    device: str = "cpu"
    expert_memory: str | int | None = None
    trust_remote_code: bool = False

    def __call__(self, path: str | Path) -> Any:
        """The model alone."""
        options: dict[str, Any] = {**vars(self)}
        return load(path, options.pop("dtype"), progress=is_shown(), **options)[0]


@torch.no_grad()
def load(
    path: str | Path,
    dtype: torch.dtype | None = None,
    *,
    device: str | torch.device = "cpu",
    expert_memory: str | int | None = None,
    progress: bool = True,
    trust_remote_code: bool = False,
) -> tuple[Any, Any]:
    """Load a quantized model that runs packed, and its tokenizer (None if the folder has none).

    path: a quantized folder or a hub name.
    dtype: of activations and unquantized weights; None is the checkpoint's own. bfloat16 is the
        fast one on CPUs (kernels/stack.py).
    device: "cpu", or a GPU ("cuda", "cuda:1"), where packed weights run through the Triton kernels.
    expert_memory: the GPU's memory for routed experts, in bytes or as a size ("6GB"). If they need
        more they stay in pinned host memory, and those in use are copied to the GPU
        (qmoe/packed/offload.py). None keeps all of them on the GPU.
    progress: show a bar on standard error, if that is a terminal.
    trust_remote_code: allow code that lies beside the weights to run, where transformers has no
        class for the model.

    Returns a transformers model and a transformers tokenizer. Layers are loaded and repacked one at
    a time, so memory stays near the checkpoint's size. Raises CheckpointError for a folder that is
    not a complete quantized model, ConfigError for a device that is not there, and AuditError if
    anything is left unpacked or without data.
    """
    if not isinstance(dtype, torch.dtype | None):
        raise ConfigError(f"dtype: expected a torch.dtype or None, got {dtype!r}")
    memory = None if expert_memory is None else parse_size("expert_memory", expert_memory)
    run_on = usable_device(device)
    if memory is not None and not uses_arena(run_on):
        raise ConfigError(f"expert_memory: is of use with a GPU only, the device is {device}")
    with shown(progress):
        return _load(ModelFolder.find(path, trust_remote_code), dtype, run_on, memory)


def _load(
    folder: ModelFolder, dtype: torch.dtype | None, run_on: torch.device, memory: int | None
) -> tuple[Any, Any]:
    home = None if memory is None else torch.device("cpu")
    source = open_packed(folder, dtype)
    check_complete(source.weights)
    tokenizer = None
    if has_tokenizer(folder.path):
        tokenizer = folder.tokenizer(source.model.config)
    generation = generation_config(folder.path)
    in_layers: set[str] = set()
    for layer in progress(source.structure.layers, "loading layers"):
        names = source.weights.sources(layer.name)
        in_layers.update(names)
        source.weights.load(names, dtype)
        _finish(source, layer.name, run_on, home)
    source.weights.load([n for n in source.weights.names() if n not in in_layers], dtype)
    source.weights.tie()
    _finish(source, "", run_on, home)
    if memory is not None:
        offload_experts(source.model, source.structure, run_on, memory, folder.path)
    source.model.to(run_on).requires_grad_(False)
    if generation is not None:
        source.model.generation_config = generation
    audit_unpacked(source, str(folder.path))
    audit_model(source.model, str(folder.path))
    return_freed()
    source.model.save_pretrained = _refuse_to_save
    _keep_dtypes(source.model)
    return source.model, tokenizer


def _refuse_to_save(*args: Any, **kwargs: Any) -> None:
    raise OutputError(
        "save_pretrained: a loaded qmoe model holds its weights in the runtime's own layout; copy "
        "the folder it was loaded from instead"
    )


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
        return model if device is None else move(device, non_blocking=blocking)

    def refuse(dtype: torch.dtype) -> Callable[[], Any]:
        return lambda: to(dtype)

    model.to = to
    for name in ("float", "double", "half", "bfloat16"):
        setattr(model, name, refuse(getattr(torch, name)))


def usable_device(device: str | torch.device) -> torch.device:
    """The device by its name; ConfigError if it is none, is not there, or has no kernels."""
    run_on = find_device(device)
    if run_on.type == "cuda":
        from qmoe.kernels.layer import device_table

        try:
            device_table(run_on)
        except ValueError as error:
            raise ConfigError(f"device: {error}") from error
    return run_on


def _finish(source: Source, prefix: str, device: torch.device, home: torch.device | None) -> None:
    experts = {n for layer in source.structure.layers for n in layer.experts}
    for name, module in source.model.named_modules():
        if prefix and not name.startswith(prefix + "."):
            continue
        if name in experts and hasattr(module, "down_proj_packed"):
            finish_experts(module, name, device, home)
        elif isinstance(module, PackedLinear) and hasattr(module, "weight_packed"):
            module.finish(name, device)
        for parameter in module.parameters(recurse=False):
            if parameter.device.type != "meta":
                # What safetensors gives may be a view into the mapped file and keep all of it.
                parameter.data = parameter.data.clone()
