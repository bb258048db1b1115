"""What tensors are called on disk: in the family's own names.

Packed weights are stored as one matrix per expert. Families that publish all experts of a layer in
one tensor have no name for a single expert; theirs are called `<experts>.<e>.gate_proj.weight` and
so on, as other tools call them when they take such a model apart.
"""

import re
from typing import Any

import torch
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange, revert_weight_conversion

from qmoe.errors import UnsupportedModelError
from qmoe.model import experts
from qmoe.model.experts import expert_weights, is_experts


def original_names(model: Any, target: str, tensor: Tensor) -> dict[str, Tensor]:
    """A tensor laid out like parameter `target`, split and named as the family publishes it."""
    return all_original_names(model, {target: tensor})


def all_original_names(model: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same of tensors by parameter, some of which the family may publish in one."""
    if getattr(model, "_weight_conversions", None) is not None:  # transformers loaded it
        return dict(revert_weight_conversion(model, tensors))
    rules = _rules(model)
    if not rules:
        return tensors
    model._weight_conversions = rules
    try:
        return dict(revert_weight_conversion(model, tensors))
    finally:
        del model._weight_conversions


def _rules(model: Any) -> list[Any]:
    """The rules that `revert_weight_conversion` would find anew for every tensor of a model that
    transformers has not loaded: its family's, without prefixes that a checkpoint may lack."""
    if not hasattr(model, "_qmoe_rules"):
        rules = get_model_conversion_mapping(model, add_legacy=False)
        model._qmoe_rules = [rule for rule in rules if not isinstance(rule, PrefixChange)]
    found: list[Any] = model._qmoe_rules
    return found


def packed_names(model: Any, target: str, tensor: Tensor) -> dict[str, Tensor]:
    """A tensor laid out like the stack `target` ([E, N, *], or a linear's [N, *]), split into
    what is stored: by the name of each matrix's weight.

    Only dimensions 0 and 1 are split, so packed words, scales and zero points of a stack go the
    same way as its weights.
    """
    module_name, _, weight = target.rpartition(".")
    module = model.get_submodule(module_name)
    container = None if not is_experts(module) else _containers(model)[module_name]
    if container is None:
        return original_names(model, target, tensor)
    names = experts.matrices_of(module, weight)
    return {
        f"{container}.{e}.{name}.weight": part
        for e, matrix in enumerate(tensor)
        for name, part in zip(names, matrix.chunk(len(names)), strict=True)
    }


def matrix_names(model: Any, target: str, experts_count: int | None, count: int) -> list[str]:
    """Names of the matrices that the stack `target` is stored as, in the order of its rows. count:
    matrices per expert, or of a linear (experts_count None)."""
    marker = torch.arange((experts_count or 1) * count).view(-1, count, 1)
    named = packed_names(model, target, marker if experts_count else marker[0])
    return sorted(named, key=lambda name: int(named[name].flatten()[0]))


def matrices_in(model: Any, target: str) -> int:
    """How many matrices the rows (of each expert) of a weight are stored as."""
    owner, _, weight = target.rpartition(".")
    module = model.get_submodule(owner)
    if is_experts(module):
        return len(experts.matrices_of(module, weight))
    return len(packed_names(model, target, getattr(module, weight)))


def stored_fused(model: Any) -> bool:
    """Whether the family stores the experts of a layer in one tensor. Raises UnsupportedModelError
    for a family that stores them together with those of another module."""
    return any(container is not None for container in _containers(model).values())


def _containers(model: Any) -> dict[str, str | None]:
    """Of every experts module: the name its experts are stored under, None if its family stores one
    matrix per expert. Found once, while the model still has its own weights."""
    if not hasattr(model, "_qmoe_containers"):
        model._qmoe_containers = {
            name: _container(model, name, module)
            for name, module in model.named_modules()
            if is_experts(module)
        }
    found: dict[str, str | None] = model._qmoe_containers
    return found


def _container(model: Any, name: str, module: Any) -> str | None:
    single = True
    for weight in expert_weights(module):
        like = torch.empty_like(experts.stack(module, weight), device="meta")
        parts = len(experts.matrices_of(module, weight))
        try:
            stored = original_names(model, f"{name}.{weight}", like)
        except ValueError as error:
            raise UnsupportedModelError(
                f"{name} ({type(module).__name__}): its family stores these experts together with "
                "those of another module; such models are not supported"
            ) from error
        shape = (like.shape[1] // parts, like.shape[2])
        single &= len(stored) == parts * len(like)
        single &= all(n.endswith(".weight") and t.shape == shape for n, t in stored.items())
    if single and not module.is_transposed and module.is_concatenated:
        return None
    # The layer as the family calls it on disk, then the experts as the model calls them.
    on_disk = next(iter(stored))
    layer = re.match(r"(.*\.\d+\.)", on_disk)
    inside = re.match(r".*\.\d+\.(.*)", name)
    container = layer[1] + inside[1] if layer and inside else name
    return container if container.endswith("experts") else f"{container}.experts"
