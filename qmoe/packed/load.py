"""`load`: a quantized folder as a transformers model that runs packed."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Unpack, cast, get_args

import torch

from qmoe.checkpoint.folders import HubOptions
from qmoe.checkpoint.model_config import generation_config
from qmoe.checkpoint.model_folder import ModelFolder
from qmoe.checkpoint.tokenizer import has_tokenizer
from qmoe.config import Kv
from qmoe.errors import ConfigError
from qmoe.fused.attention import fuse_attention
from qmoe.fused.int8_cache import keep_caches_in_int8
from qmoe.kernels import uses_arena
from qmoe.model.source import Source, check_complete
from qmoe.packed.audit import audit_model, audit_unpacked
from qmoe.packed.fill import fill
from qmoe.packed.loaded import guard
from qmoe.packed.quantizer import attach
from qmoe.packed.skeleton import open_packed
from qmoe.plan.run_plan import RunPlan
from qmoe.runtime.run_on import RunOn, usable_device
from qmoe.system.host_memory import return_freed
from qmoe.system.progress import is_shown, shown
from qmoe.system.sizes import parse_size

Activations = Literal["int8", "bf16"]


class MoreOptions(HubOptions, total=False):
    """Of `load`.

    plan: True for the plan in the folder, which `quantize_to_size` wrote for a GPU's memory, or the
        path of one that `qmoe plan --save` wrote. The experts that see most tokens lie on the GPU
        then, and the CPU computes the others beside it (qmoe/runtime/hybrid.py).
    prediction: True also loads a quantized layer that predicts tokens beyond the next. `generate`
        does not use it; `qmoe eval` measures it.
    kv: "int8" keeps the keys and values of a cache in 8 bits, where whole ones are kept
        (qmoe/fused/int8_cache.py); "bf16" keeps them as the model computes them, unless the plan
        says int8.
    """

    plan: bool | str | Path
    kv: Kv
    prediction: bool


@dataclass(frozen=True)
class Loading:
    """How a quantized model is loaded: the options of `load`, for what loads several."""

    dtype: torch.dtype | None = None
    device: str = "cpu"
    expert_memory: str | int | None = None
    trust_remote_code: bool = False
    activations: Activations = "int8"
    cache: bool = True
    plan: bool | str | Path = False
    kv: Kv = "bf16"
    prediction: bool = False

    def __call__(self, path: str | Path) -> Any:
        """The model alone."""
        options: dict[str, Any] = {**vars(self)}
        return load(path, options.pop("dtype"), progress=is_shown(), **options)[0]


@torch.no_grad()
def load(
    path: str | Path,
    dtype: torch.dtype | str | None = None,
    *,
    device: str | torch.device = "cpu",
    expert_memory: str | int | None = None,
    activations: Activations = "int8",
    cache: bool = True,
    progress: bool = True,
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
    **more: Unpack[MoreOptions],
) -> tuple[Any, Any]:
    """Load a quantized model that runs packed, and its tokenizer (None if the folder has none).

    path: a quantized folder or a hub name.
    dtype: of activations and unquantized weights, as a torch.dtype or its name; None and "auto" are
        the checkpoint's own. bfloat16 is the fast one on CPUs.
    device: "cpu", or a GPU ("cuda", "cuda:1"), where packed weights run through the Triton kernels;
        "auto" is a GPU if there is one.
    expert_memory: the GPU's memory for routed experts, in bytes or as a size ("6GB"). If they need
        more they stay in pinned host memory, and those in use are copied to the GPU
        (qmoe/runtime/offload.py). None keeps all of them on the GPU.
    activations: "int8" rounds the inputs of packed products on a CPU to 8 bits per token and 32
        features, which is several times faster; "bf16" takes them as they are. Models in float32
        and models on a GPU always do.
    cache: on a CPU, keep the weights of large models in the kernels' layout in the user's cache
        directory, so that the next load is ready in seconds (runtime/prepared.py).
    progress: show a bar on standard error, if that is a terminal.
    trust_remote_code: allow code that lies beside the weights to run, where transformers has no
        class for the model.
    attn_implementation: as in transformers ("sdpa", "eager", ..); None is transformers' choice, but
        on a CPU qmoe's kernel instead of "sdpa".
    more: MoreOptions (`plan`, `kv`, `prediction`); of a hub name `revision`, `token`, `cache_dir`.

    Returns a transformers model and a transformers tokenizer. Layers are loaded and repacked one at
    a time, so memory stays near the checkpoint's size. Raises CheckpointError for a folder that is
    not a complete quantized model, ConfigError for a device that is not there and for a plan that
    needs more memory than is free, and AuditError if anything is left unpacked or without data.
    """
    _check_choice("activations", activations, get_args(Activations))
    memory = None if expert_memory is None else parse_size("expert_memory", expert_memory)
    run_on = usable_device(device)
    if memory is not None and not uses_arena(run_on):
        raise ConfigError(f"expert_memory: is of use with a GPU only, the device is {device}")
    chosen = _dtype(dtype)
    with shown(progress):
        plan, kv = more.pop("plan", False), more.pop("kv", "bf16")
        predicting = more.pop("prediction", False)
        _check_choice("kv", kv, get_args(Kv))
        folder = ModelFolder.find(path, trust_remote_code, **cast(HubOptions, more))
        planned = _planned(folder, plan, run_on, memory)
        hybrid = planned is not None and planned.hybrid
        memory = memory if planned is None else planned.expert_memory
        home = None if memory is None or hybrid else torch.device("cpu")
        run = RunOn(run_on, home, exact=activations == "bf16", cache=cache)
        source = open_packed(folder, chosen, attn_implementation, predicting)
        model, tokenizer = _load(source, chosen, run, memory, attn_implementation)
        if "int8" in (kv, planned and planned.kv):
            keep_caches_in_int8(model)
        return model, tokenizer


def _planned(
    folder: ModelFolder, plan: bool | str | Path, device: torch.device, memory: int | None
) -> RunPlan | None:
    """The plan that was asked for. Raises ConfigError if it cannot be kept here."""
    if not plan:
        return None
    if memory is not None:
        raise ConfigError("expert_memory: the plan says how much; leave out one of them")
    given = folder.path if plan is True else Path(plan).expanduser()
    found = RunPlan.read(given)
    found.check(device, given)
    return found


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{name}: expected one of {choices}, got {value!r}")


def _dtype(value: torch.dtype | str | None) -> torch.dtype | None:
    named = getattr(torch, value, None) if isinstance(value, str) else value
    if value == "auto" or value is None:
        return None
    if not (isinstance(named, torch.dtype) and named.is_floating_point):
        raise ConfigError(
            f'dtype: expected a torch.dtype such as torch.bfloat16, its name, "auto" or None, got '
            f"{value!r}"
        )
    return named


def _load(
    source: Source,
    dtype: torch.dtype | None,
    run: RunOn,
    memory: int | None,
    attn_implementation: str | None,
) -> tuple[Any, Any]:
    folder = source.folder
    check_complete(source.weights)
    tokenizer = None
    if has_tokenizer(folder.path):
        tokenizer = folder.tokenizer(source.model.config)
    generation = generation_config(folder.path)
    fill(source, dtype, run, memory)
    if generation is not None:
        source.model.generation_config = generation
    audit_unpacked(source, str(folder.path))
    audit_model(source.model, str(folder.path))
    return_freed()
    if attn_implementation is None:
        fuse_attention(source.model, run)
    attach(source.model, source.checkpoint.config["quantization_config"])
    guard(source)
    return source.model, tokenizer
