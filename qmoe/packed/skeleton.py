"""A quantized folder as a model skeleton with places for its packed tensors."""

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from qmoe.checkpoint.model_folder import ModelFolder
from qmoe.checkpoint.reader import Checkpoint
from qmoe.config import Scheme
from qmoe.errors import CheckpointError
from qmoe.format.compressed_tensors import Schemes
from qmoe.format.exl3_checkpoint import METHOD
from qmoe.format.quantized import common
from qmoe.model.experts import expert_weights, matrices_of
from qmoe.model.skeleton import build, settle
from qmoe.model.source import Source, check_routing
from qmoe.model.structure import Prediction, find
from qmoe.model.tensor_names import matrices_in, matrix_names, packed_names
from qmoe.model.weight_map import WeightMap
from qmoe.prediction.attach import add_quantized
from qmoe.runtime.coded import declare_coded
from qmoe.runtime.modules import CodedLinear, PackedLinear, declare_experts
from qmoe.runtime.stored import stored_stacks


def open_packed(
    folder: ModelFolder,
    dtype: torch.dtype | None = None,
    attn_implementation: str | None = None,
    predicting: bool = False,
) -> Source:
    """Open a quantized folder; loads no weights. dtype None is the checkpoint's own;
    attn_implementation None is transformers' choice. predicting: whether a quantized layer that
    predicts tokens beyond the next is to be part of the model.

    Raises CheckpointError if it is neither pack-quantized nor EXL3, or in a scheme qmoe cannot run.
    """
    checkpoint, where = folder.checkpoint(), str(folder.path)
    if quantized_by(checkpoint.config) == METHOD:
        return _open_coded(folder, checkpoint, dtype, attn_implementation, predicting)
    schemes = Schemes(checkpoint.config, where)
    config = folder.config(checkpoint)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the skeleton is built plain; qmoe puts the packed parts in
    if attn_implementation is not None:
        config._attn_implementation = attn_implementation
    dtype = dtype or config.dtype or _scales_dtype(checkpoint)
    model = build(config, dtype, checkpoint)
    prediction = add_quantized(model, checkpoint) if predicting else None
    return _with_places(folder, checkpoint, schemes, model, prediction)


def open_packed_in(model: Any, folder: ModelFolder, dtype: torch.dtype) -> Source:
    """The same with a model that transformers has built on the meta device."""
    checkpoint = folder.checkpoint()
    schemes = Schemes(checkpoint.config, str(folder.path))
    return _with_places(folder, checkpoint, schemes, settle(model, dtype, checkpoint))


def _with_places(
    folder: ModelFolder,
    checkpoint: Checkpoint,
    schemes: Schemes,
    model: Any,
    prediction: Prediction | None = None,
) -> Source:
    where, structure = str(folder.path), find(model)
    check_routing(model, structure)
    for layer in structure.layers:
        for name in layer.experts:
            module = model.get_submodule(name)
            names = expert_weights(module)
            found = {w: _stack_scheme(model, name, w, schemes, where) for w in names}
            declare_experts(module, found)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            stored = _module_names(model, f"{name}.weight", module.weight)
            linear_scheme = schemes.of(stored[0])
            if linear_scheme is not None:
                model.set_submodule(name, PackedLinear(module, linear_scheme, len(stored)))
    weights = WeightMap(model, checkpoint, stored_stacks(model))
    return Source(folder, checkpoint, model, weights, structure, prediction)


def quantized_by(config: dict[str, Any]) -> Any:
    """The format that config.json says the weights are in; None if it says nothing."""
    entry = config.get("quantization_config")
    return entry.get("quant_method") if isinstance(entry, dict) else None


def _open_coded(
    folder: ModelFolder,
    checkpoint: Checkpoint,
    dtype: torch.dtype | None,
    attn_implementation: str | None,
    predicting: bool,
) -> Source:
    """The same of a folder in EXL3's codes. Linears without codes stay as they are."""
    config = folder.config(checkpoint)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    if attn_implementation is not None:
        config._attn_implementation = attn_implementation
    model: Any = build(config, dtype or config.dtype or torch.bfloat16, checkpoint)
    prediction = add_quantized(model, checkpoint) if predicting else None
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
    return Source(folder, checkpoint, model, weights, structure, prediction)


def _scales_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """That of the weights the checkpoint was made from."""
    scales = (name for name in checkpoint.names() if name.endswith("weight_scale"))
    name = next(scales, None)
    return torch.bfloat16 if name is None else checkpoint.dtype(name)


def _module_names(model: nn.Module, target: str, weight: torch.Tensor) -> list[str]:
    return [n.removesuffix(".weight") for n in packed_names(model, target, weight)]


def _stack_scheme(
    model: Any, experts: str, weight: str, schemes: Schemes, where: str
) -> tuple[Scheme, tuple[int, ...]]:
    """The scheme of a stack of experts, and bits of each expert's matrix where they differ."""
    module, target = model.get_submodule(experts), f"{experts}.{weight}"
    E, parts = module.num_experts, len(matrices_of(module, weight))
    names = [n.removesuffix(".weight") for n in matrix_names(model, target, E, parts)]
    found = [schemes.of(name) for name in names]
    known = [scheme for scheme in found if scheme is not None]
    if len(known) < len(found):
        raise CheckpointError(f"{where}: the experts of {experts} are not quantized")
    for name, scheme in zip(names, known, strict=True):
        if replace(scheme, bits=known[0].bits) != known[0]:
            raise CheckpointError(
                f"{where}: {names[0]} is {known[0]} and {name} is {scheme}; qmoe runs experts of a "
                "layer that differ in their bits alone"
            )
    each = [known[i : i + parts] for i in range(0, len(known), parts)]
    for e, matrices in enumerate(each):
        if len(set(matrices)) > 1:
            raise CheckpointError(
                f"{where}: expert {e} of {target} is in {' and '.join(map(str, matrices))}; qmoe "
                "multiplies with gate and up at once, which takes equal bits"
            )
    return common(known[0], [matrices[0].bits for matrices in each])
