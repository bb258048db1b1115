"""What a part of the model is stored as once it is quantized, and the way back."""

import torch
from torch import Tensor

from qmoe import experts
from qmoe.format import packed_tensors
from qmoe.naming import matrix_names, original_names, packed_names
from qmoe.plan import Source
from qmoe.structure import Layer
from qmoe.types import Quantized


def shard_tensors(
    source: Source, names: list[str], quantized: dict[str, Quantized], changed: set[str]
) -> dict[str, Tensor]:
    """The tensors that replace the checkpoint tensors `names`: packed weights (by parameter) in the
    family's names, changed parameters in the dtype they had, all else byte for byte."""
    weights = source.weights
    replaced = {n for target in quantized for n in weights.targets[target]}
    out = {n: weights.checkpoint.tensor(n) for n in names if n not in replaced}
    for target in sorted(changed):
        parameter = source.model.get_parameter(target)
        for name, tensor in original_names(source.model, target, parameter).items():
            out[name] = tensor.to(weights.checkpoint.tensor(name).dtype)
    for target, stack in quantized.items():
        out |= _packed(source, target, stack)
    return out


def _packed(source: Source, target: str, quantized: Quantized) -> dict[str, Tensor]:
    single = target.endswith(".weight")  # a linear's parameter is 2-D, an experts stack 3-D

    def named(tensor: Tensor) -> dict[str, Tensor]:
        return packed_names(source.model, target, tensor[0] if single else tensor)

    scales = named(quantized.scale)
    zeros = named(quantized.zero) if quantized.zero is not None else {}
    out: dict[str, Tensor] = {}
    for name, q in named(quantized.q).items():
        out |= packed_tensors(name, q, scales[name], zeros.get(name), quantized.scheme.bits)
    return out


def restore(source: Source, layer: Layer, tensors: dict[str, Tensor]) -> None:
    """Load a layer as it was after it was quantized. tensors: of its shard, unpacked."""
    source.weights.load(source.weights.sources(layer.name), torch.float32, tensors)
    for name in layer.experts:
        module = source.model.get_submodule(name)
        for weight in experts.expert_weights(module):
            E, count = module.num_experts, len(experts.parts(module, weight))
            names = matrix_names(source.model, f"{name}.{weight}", E, count)
            rows = torch.cat([tensors[stored] for stored in names])
            experts.put(module, weight, rows.unflatten(0, (E, -1)))
