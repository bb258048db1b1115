"""What a part of the model is stored as once it is quantized, and the way back."""

import torch
from torch import Tensor

from qmoe.format.compressed_tensors import packed_tensors
from qmoe.format.exl3_checkpoint import coded_tensors
from qmoe.format.quantized import Quantized
from qmoe.format.trellis import Stack, Trellis
from qmoe.model import experts
from qmoe.model.source import Source
from qmoe.model.structure import Layer
from qmoe.model.tensor_names import matrix_names, original_names, packed_names
from qmoe.system.devices import CPU


def shard_tensors(
    source: Source, names: list[str], quantized: dict[str, Stack], changed: set[str]
) -> dict[str, Tensor]:
    """The tensors that replace the checkpoint tensors `names`: packed weights (by parameter) in the
    family's names, changed parameters in the dtype they had, all else byte for byte."""
    weights = source.weights
    replaced = {n for target in quantized for n in weights.targets[target]}
    out = {n: weights.checkpoint.tensor(n) for n in names if n not in replaced}
    for target in sorted(changed):
        parameter = source.model.get_parameter(target)
        dtype = stored_dtype(source, target)
        for name, tensor in original_names(source.model, target, parameter).items():
            out[name] = tensor.to(CPU, dtype)
    for target, stack in quantized.items():
        pack = _coded if isinstance(stack, Trellis) else _packed
        out |= pack(source, target, stack)  # type: ignore[arg-type]
    return out


def stored_dtype(source: Source, target: str) -> torch.dtype:
    """Of a parameter in the checkpoint; of a head that was tied, the embedding's. It is not one for
    all: a router may be in float32 beside matrices in bfloat16."""
    checkpoint = source.weights.checkpoint
    named = original_names(source.model, target, source.model.get_parameter(target))
    stored = [name for name in named if name in checkpoint.names()]
    return checkpoint.dtype((stored or source.weights.sources(source.embedding()))[0])


def _packed(source: Source, target: str, quantized: Quantized) -> dict[str, Tensor]:
    single = target.endswith(".weight")  # a linear's parameter is 2-D, an experts stack 3-D

    def named(tensor: Tensor) -> dict[str, Tensor]:
        return packed_names(source.model, target, tensor[0] if single else tensor)

    count = 1 if single else len(quantized.q)
    bits = [quantized.scheme_of(e).bits for e in range(count)]
    marker = torch.tensor(bits)[:, None, None].expand(-1, quantized.q.shape[1], 1)
    widths = named(marker)
    scales = named(quantized.scale)
    zeros = named(quantized.zero) if quantized.zero is not None else {}
    out: dict[str, Tensor] = {}
    for name, q in named(quantized.q).items():
        width = int(widths[name][0, 0])
        out |= packed_tensors(name, q, scales[name], zeros.get(name), width)
    return out


def scale_tensors(source: Source, target: str, scale: Tensor) -> dict[str, Tensor]:
    """The scales [E, N, G] of a quantized stack, as they are stored."""
    named = packed_names(source.model, target, scale[0] if target.endswith(".weight") else scale)
    return {f"{name}_scale": part.contiguous() for name, part in named.items()}


def _coded(source: Source, target: str, stack: Trellis) -> dict[str, Tensor]:
    count, E = len(stack.parts), len(stack.scale)
    single = target.endswith(".weight")
    names = matrix_names(source.model, target, None if single else E, count)
    out: dict[str, Tensor] = {}
    for i, name in enumerate(names):
        out |= coded_tensors(name, stack.parts[i % count], i // count)
    return out


def round_unpacked(source: Source, changed: set[str], packed: set[str]) -> set[str]:
    """Round in place the parameters `changed` by a rotation that are not to be `packed` to what
    will be stored of them, so that all that comes after sees what will run; returns their names."""
    for target in changed - packed:
        parameter = source.model.get_parameter(target)
        parameter.data.copy_(parameter.to(stored_dtype(source, target)))
    return changed - packed


def restore(
    source: Source, layer: Layer, tensors: dict[str, Tensor], experts_dtype: torch.dtype
) -> None:
    """Load a layer as it was after it was quantized. tensors: of its shard, unpacked."""
    stacks = source.expert_stacks(layer.name)
    replaced = {n for target in stacks for n in source.weights.targets[target]}
    names = [n for n in source.weights.sources(layer.name) if n not in replaced]
    source.weights.load(names, torch.float32, tensors)
    for target in stacks:
        module, weight = source.make_stack(target, experts_dtype, "cpu")
        E, count = module.num_experts, len(experts.matrices_of(module, weight))
        matrices = matrix_names(source.model, target, E, count)
        rows = torch.cat([tensors[stored] for stored in matrices])
        experts.put(module, weight, rows.unflatten(0, (E, -1)))
