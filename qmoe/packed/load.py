"""`load`: a quantized folder as a transformers model that runs packed."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from qmoe.checkpoint.model_config import generation_config
from qmoe.checkpoint.model_folder import ModelFolder
from qmoe.checkpoint.tokenizer import has_tokenizer
from qmoe.errors import ConfigError, OutputError
from qmoe.format.exl3_checkpoint import METHOD
from qmoe.kernels import uses_arena
from qmoe.kernels.cpu.stack import uses_cpu_kernels
from qmoe.model.source import Source, check_complete
from qmoe.packed.audit import audit_model, audit_unpacked
from qmoe.packed.modules import PackedLinear, finish_experts
from qmoe.packed.offload import offload_experts
from qmoe.packed.prepared import keep_prepared, open_prepared, prepared_file
from qmoe.packed.run_on import RunOn
from qmoe.packed.skeleton import open_packed, quantized_by
from qmoe.system.devices import find_device
from qmoe.system.host_memory import return_freed
from qmoe.system.progress import is_shown, progress, shown
from qmoe.system.sizes import parse_size

Activations = Literal["int8", "bf16"]


@dataclass(frozen=True)
class Loading:
    """How a quantized model is loaded: the options of `load`, for what loads several."""

    dtype: torch.dtype | None = None
    device: str = "cpu"
    expert_memory: str | int | None = None
    trust_remote_code: bool = False
    activations: Activations = "int8"
    cache: bool = True

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
    activations: Activations = "int8",
    cache: bool = True,
    progress: bool = True,
    trust_remote_code: bool = False,
) -> tuple[Any, Any]:
    """Load a quantized model that runs packed, and its tokenizer (None if the folder has none).

    path: a quantized folder or a hub name.
    dtype: of activations and unquantized weights; None is the checkpoint's own. bfloat16 is the
        fast one on CPUs.
    device: "cpu", or a GPU ("cuda", "cuda:1"), where packed weights run through the Triton kernels.
    expert_memory: the GPU's memory for routed experts, in bytes or as a size ("6GB"). If they need
        more they stay in pinned host memory, and those in use are copied to the GPU
        (qmoe/packed/offload.py). None keeps all of them on the GPU.
    activations: "int8" rounds the inputs of packed products on a CPU to 8 bits per token and 32
        features, which is several times faster; "bf16" takes them as they are. Models in float32
        and models on a GPU always do.
    cache: on a CPU, keep the weights of large models in the kernels' layout in the user's cache
        directory, so that the next load is ready in seconds (packed/prepared.py).
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
    if activations not in get_args(Activations):
        raise ConfigError(
            f"activations: expected one of {get_args(Activations)}, got {activations!r}"
        )
    memory = None if expert_memory is None else parse_size("expert_memory", expert_memory)
    run_on = usable_device(device)
    if memory is not None and not uses_arena(run_on):
        raise ConfigError(f"expert_memory: is of use with a GPU only, the device is {device}")
    with shown(progress):
        home = None if memory is None else torch.device("cpu")
        run = RunOn(run_on, home, exact=activations == "bf16")
        return _load(ModelFolder.find(path, trust_remote_code), dtype, run, memory, cache)


def _load(
    folder: ModelFolder, dtype: torch.dtype | None, run: RunOn, memory: int | None, cache: bool
) -> tuple[Any, Any]:
    source = open_packed(folder, dtype)
    check_complete(source.weights)
    file = None
    coded = quantized_by(source.checkpoint.config) == METHOD  # which runs from the file's bytes
    if cache and not coded and uses_cpu_kernels(run.device) and not uses_arena(run.device):
        file = prepared_file(source.checkpoint, source.model.config.dtype)
    if file is not None:
        run = replace(run, prepared=open_prepared(*file))
    # What is prepared is not read again.
    wanted = source.weights.names()
    if run.prepared is not None:
        wanted = [name for name in wanted if name not in source.weights.packed]
    tokenizer = None
    if has_tokenizer(folder.path):
        tokenizer = folder.tokenizer(source.model.config)
    generation = generation_config(folder.path)
    unread = set(wanted)
    for layer in progress(source.structure.layers, "loading layers"):
        names = [name for name in source.weights.sources(layer.name) if name in unread]
        unread.difference_update(names)
        source.weights.load(names, dtype)
        _finish(source, layer.name, run)
    source.weights.load([name for name in wanted if name in unread], dtype)
    source.weights.tie()
    _finish(source, "", run)
    if memory is not None:
        offload_experts(source.model, source.structure, run.device, memory, folder.path)
    source.model.to(run.device).requires_grad_(False)
    if file is not None and run.prepared is None:
        keep_prepared(source.model, *file)
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


def _finish(source: Source, prefix: str, run: RunOn) -> None:
    experts = {n for layer in source.structure.layers for n in layer.experts}
    for name, module in source.model.named_modules():
        if prefix and not name.startswith(prefix + "."):
            continue
        if name in experts and (
            hasattr(module, "down_proj_packed") or hasattr(module, "down_proj_trellis")
        ):
            finish_experts(module, name, run)
        elif isinstance(module, PackedLinear) and (
            hasattr(module, "weight_packed") or hasattr(module, "weight_trellis")
        ):
            module.finish(name, run)
        for parameter in module.parameters(recurse=False):
            if parameter.device.type != "meta":
                # What safetensors gives may be a view into the mapped file and keep all of it.
                parameter.data = parameter.data.clone()
