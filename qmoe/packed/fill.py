"""Filling an opened quantized folder: what `qmoe.load` and transformers' `from_pretrained`
(quantizer.py) both do with a skeleton that has places for packed weights.

Layers are loaded and repacked one at a time, so that memory stays near the checkpoint's size.
"""

from dataclasses import replace

import torch

from qmoe.errors import ConfigError
from qmoe.fused.attention_layers import fuse_attention_layers
from qmoe.fused.decoder_layers import fuse_decoder_layers
from qmoe.fused.growing_cache import let_caches_grow
from qmoe.fused.norms import fuse_norms
from qmoe.fused.routers import fuse_routers
from qmoe.kernels import uses_arena
from qmoe.kernels.cpu.stack import uses_cpu_kernels
from qmoe.model.source import Source
from qmoe.runtime.hybrid import measure_rates, place_experts
from qmoe.runtime.modules import PackedLinear, finish_experts
from qmoe.runtime.offload import offload_experts
from qmoe.runtime.prepared import keep_prepared, open_prepared, prepared_file
from qmoe.runtime.run_on import RunOn
from qmoe.runtime.spread import check_places, move_apart
from qmoe.system.host_memory import return_freed
from qmoe.system.progress import progress


@torch.no_grad()
def fill(source: Source, dtype: torch.dtype | None, run: RunOn, memory: int | None = None) -> None:
    """Load all weights of an opened folder (packed/skeleton.py) into its model, which runs packed
    from then on.

    dtype: of parameters that have none of their own. memory: bytes for routed experts on the GPU,
    None for no limit; the others are copied to slots (offload.py), or, if `run` has no home for
    them, computed by the CPU (hybrid.py). Raises CheckpointError for tensors that contradict each
    other, and ConfigError for scales that the model's dtype cannot hold, and for a
    plan that codes cannot keep.
    """
    in_c = uses_cpu_kernels(run.device) and not uses_arena(run.device) and not run.places
    file = None
    coded = any(hasattr(module, "_qmoe_coded") for module in source.model.modules())
    if run.cache and in_c and not coded:  # codes run from the file's bytes
        file = prepared_file(source.checkpoint, source.model.config.dtype)
    if file is not None:
        run = replace(run, prepared=open_prepared(*file))
    hybrid = memory is not None and run.home is None
    if memory is not None and hybrid:
        if coded:
            raise ConfigError(
                "plan: experts in EXL3's codes are not computed by the CPU beside a GPU yet; give "
                "expert_memory instead of the plan, so that they are copied to the GPU"
            )
        run = place_experts(source, run, memory)
    if run.places:
        check_places(source, run.places)
    # What is prepared is not read again.
    wanted = source.weights.names()
    if run.prepared is not None:
        wanted = [name for name in wanted if name not in source.weights.packed]
    unread = set(wanted)
    for layer in progress(source.structure.layers, "loading layers"):
        names = [name for name in source.weights.sources(layer.name) if name in unread]
        unread.difference_update(names)
        source.weights.load(names, dtype)
        _finish(source, layer.name, run)
    source.weights.load([name for name in wanted if name in unread], dtype)
    source.weights.tie()
    _finish(source, "", run)
    if memory is not None and not hybrid:
        offload_experts(source.model, source.structure, run.device, memory, source.folder.path)
    if run.places:
        move_apart(source, run.places)
    else:
        source.model.to(run.device)
    source.model.requires_grad_(False)
    if hybrid:
        measure_rates(source.model)
    if file is not None and run.prepared is None:
        keep_prepared(source.model, *file)
    if in_c:
        fuse_norms(source.model)
        routers = [name for layer in source.structure.layers for name in layer.routers]
        fuse_routers(source.model.get_submodule(name) for name in routers)
        fuse_attention_layers(source.model.modules())
        fuse_decoder_layers(
            source.model.get_submodule(layer.name) for layer in source.structure.layers
        )
        let_caches_grow(source.model)
    return_freed()


def _finish(source: Source, prefix: str, run: RunOn) -> None:
    experts = {n for layer in source.structure.layers for n in layer.experts}
    for name, module in source.model.named_modules():
        if prefix and not name.startswith(prefix + "."):
            continue
        if name in experts and _holds(module, "down_proj"):
            finish_experts(module, name, run.at(name))
        elif isinstance(module, PackedLinear) and _holds(module, "weight"):
            module.finish(name, run.at(name))
        for parameter in module.parameters(recurse=False):
            if parameter.device.type != "meta":
                # What safetensors gives may be a view into the mapped file and keep all of it.
                parameter.data = parameter.data.clone()


def _holds(module: object, weight: str) -> bool:
    """Whether the stored tensors of a weight are there and not yet in the runtime's form."""
    return hasattr(module, f"{weight}_packed") or hasattr(module, f"{weight}_trellis")
