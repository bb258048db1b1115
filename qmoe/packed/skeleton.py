"""A quantized folder as a model skeleton with places for its packed tensors."""

from typing import Any

import torch
from torch import nn

from qmoe.checkpoint.model_folder import ModelFolder
from qmoe.checkpoint.reader import Checkpoint
from qmoe.config import Scheme
from qmoe.errors import CheckpointError
from qmoe.format.compressed_tensors import Schemes
from qmoe.model.experts import expert_weights, stack
from qmoe.model.skeleton import WeightMap, build, settle
from qmoe.model.source import Source, check_routing
from qmoe.model.structure import find
from qmoe.model.tensor_names import packed_names
from qmoe.packed.modules import PackedLinear, declare_experts
from qmoe.packed.stored import stored_stacks


def open_packed(
    folder: ModelFolder, dtype: torch.dtype | None = None, attn_implementation: str | None = None
) -> Source:
    """Open a quantized folder; loads no weights. dtype None is the checkpoint's own;
    attn_implementation None is transformers' choice.

    Raises CheckpointError if it is not pack-quantized, or in a scheme qmoe cannot run.
    """
    checkpoint = folder.checkpoint()
    schemes = Schemes(checkpoint.config, str(folder.path))
    config = folder.config(checkpoint)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the skeleton is built plain; qmoe puts the packed parts in
    if attn_implementation is not None:
        config._attn_implementation = attn_implementation
    dtype = dtype or config.dtype or _scales_dtype(checkpoint)
    return _with_places(folder, checkpoint, schemes, build(config, dtype, checkpoint))


def open_packed_in(model: Any, folder: ModelFolder, dtype: torch.dtype) -> Source:
    """The same with a model that transformers has built on the meta device."""
    checkpoint = folder.checkpoint()
    schemes = Schemes(checkpoint.config, str(folder.path))
    return _with_places(folder, checkpoint, schemes, settle(model, dtype, checkpoint))


def _with_places(
    folder: ModelFolder, checkpoint: Checkpoint, schemes: Schemes, model: Any
) -> Source:
    where, structure = str(folder.path), find(model)
    check_routing(model, structure)
    for layer in structure.layers:
        for name in layer.experts:
            scheme = _stack_scheme(model, name, schemes, where)
            declare_experts(model.get_submodule(name), scheme)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            stored = _module_names(model, f"{name}.weight", module.weight)
            linear_scheme = schemes.of(stored[0])
            if linear_scheme is not None:
                model.set_submodule(name, PackedLinear(module, linear_scheme, len(stored)))
    weights = WeightMap(model, checkpoint, stored_stacks(model))
    return Source(folder, checkpoint, model, weights, structure)


def _scales_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """That of the weights the checkpoint was made from."""
    scales = (name for name in checkpoint.names() if name.endswith("weight_scale"))
    name = next(scales, None)
    return torch.bfloat16 if name is None else checkpoint.dtype(name)


def _module_names(model: nn.Module, target: str, weight: torch.Tensor) -> list[str]:
    return [n.removesuffix(".weight") for n in packed_names(model, target, weight)]


def _stack_scheme(model: Any, experts: str, schemes: Schemes, where: str) -> Scheme:
    """The one scheme of all matrices of an experts module."""
    module = model.get_submodule(experts)
    found = {
        schemes.of(name)
        for weight in expert_weights(module)
        for name in _module_names(model, f"{experts}.{weight}", stack(module, weight))
    }
    if None in found:
        raise CheckpointError(f"{where}: the experts of {experts} are not quantized")
    if len(found) > 1:
        raise CheckpointError(
            f"{where}: the experts of {experts} use several schemes, qmoe runs one per layer: "
            + ", ".join(map(str, found))
        )
    return found.pop()  # type: ignore[return-value]
