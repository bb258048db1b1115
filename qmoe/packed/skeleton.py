"""A quantized folder as a model skeleton with places for its packed tensors."""

from typing import Any

import torch
from torch import nn

from qmoe.checkpoint.model_folder import ModelFolder
from qmoe.checkpoint.reader import Checkpoint
from qmoe.config import Scheme
from qmoe.errors import CheckpointError
from qmoe.format.compressed_tensors import Schemes
from qmoe.format.exl3_checkpoint import METHOD
from qmoe.model.experts import expert_weights, stack
from qmoe.model.skeleton import WeightMap, build
from qmoe.model.source import Source, check_routing
from qmoe.model.structure import find
from qmoe.model.tensor_names import matrices_in, matrix_names, packed_names
from qmoe.packed.coded import declare_coded
from qmoe.packed.modules import CodedLinear, PackedLinear, declare_experts
from qmoe.packed.stored import stored_stacks


def open_packed(folder: ModelFolder, dtype: torch.dtype | None = None) -> Source:
    """Open a quantized folder; loads no weights. dtype None is the checkpoint's own.

    Raises CheckpointError if it is neither pack-quantized nor EXL3, or in a scheme qmoe cannot run.
    """
    checkpoint, where = folder.checkpoint(), str(folder.path)
    if quantized_by(checkpoint.config) == METHOD:
        return _open_coded(folder, checkpoint, dtype)
    schemes = Schemes(checkpoint.config, where)
    config = folder.config(checkpoint)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the skeleton is built plain; qmoe puts the packed parts in
    model: Any = build(config, dtype or config.dtype or _scales_dtype(checkpoint), checkpoint)
    structure = find(model)
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


def quantized_by(config: dict[str, Any]) -> Any:
    """The format that config.json says the weights are in; None if it says nothing."""
    entry = config.get("quantization_config")
    return entry.get("quant_method") if isinstance(entry, dict) else None


def _open_coded(folder: ModelFolder, checkpoint: Checkpoint, dtype: torch.dtype | None) -> Source:
    """The same of a folder in EXL3's codes. Linears without codes stay as they are."""
    config = folder.config(checkpoint)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model: Any = build(config, dtype or config.dtype or torch.bfloat16, checkpoint)
    structure = find(model)
    check_routing(model, structure)
    known = set(checkpoint.names())
    run, places = model.dtype, dict[str, tuple[str, int]]()
    for layer in structure.layers:
        for name in layer.experts:
            module = model.get_submodule(name)
            for weight in expert_weights(module):
                target = f"{name}.{weight}"
                count = matrices_in(model, target)
                names = matrix_names(model, target, module.num_experts, count)
                places |= declare_coded(model, target, names, checkpoint, run)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            stored = _module_names(model, f"{name}.weight", module.weight)
            if f"{stored[0]}.trellis" not in known:
                continue
            if len(stored) > 1:
                raise CheckpointError(
                    f"{checkpoint.path}: {name} is stored as {len(stored)} coded matrices, which "
                    "qmoe does not put together"
                )
            places |= declare_coded(
                model, f"{name}.weight", [f"{stored[0]}.weight"], checkpoint, run
            )
            model.set_submodule(name, CodedLinear(module))
    weights = WeightMap(model, checkpoint, places=places)
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
