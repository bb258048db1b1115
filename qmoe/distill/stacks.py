"""Quantized stacks from the tensors of a shard, in the family's names on disk."""

import torch
from torch import Tensor

from qmoe.config import QuantConfig, Scheme
from qmoe.format.packing import unpack_rows, unpack_zeros
from qmoe.format.quantized import Quantized, common
from qmoe.model.schemes import weight_shapes
from qmoe.model.source import Source, schemes_of, widths_of
from qmoe.model.structure import Layer
from qmoe.model.tensor_names import matrices_in, matrix_names


def stacks_of(
    source: Source, layer: Layer, config: QuantConfig, tensors: dict[str, Tensor]
) -> dict[str, Quantized]:
    """The quantized stacks of a layer, by parameter, from the tensors of its shard."""
    widths = widths_of(layer, config)
    return {
        target: _stack_of(source, target, scheme, widths.get(target), shape, tensors)
        for name, scheme in schemes_of(source, layer, config).items()
        for target, shape in weight_shapes(source.model, name)
    }


def lm_head_stack(
    source: Source, config: QuantConfig, tensors: dict[str, Tensor]
) -> dict[str, Quantized]:
    """The output projection's stack, by parameter, from the tensors of the last shard; nothing if
    it is not quantized."""
    if config.lm_head is None:
        return {}
    target = f"{source.structure.lm_head}.weight"
    shape = tuple(source.model.get_parameter(target).shape)
    return {target: _stack_of(source, target, config.lm_head, None, shape, tensors)}


def _stack_of(
    source: Source,
    target: str,
    scheme: Scheme,
    widths: tuple[int, ...] | None,
    shape: tuple[int, ...],
    tensors: dict[str, Tensor],
) -> Quantized:
    """The inverse of pipeline/shard.py's `shard_tensors`. widths: bits of each matrix,
    where they are not the scheme's. shape: of the parameter as a stack [E, N, K], or of a linear
    [N, K]."""
    E = shape[0] if len(shape) == 3 else 1
    count = matrices_in(source.model, target)
    names = matrix_names(source.model, target, E if len(shape) == 3 else None, count)
    bits = widths or (scheme.bits,) * E
    q, zero = [], []
    for i, name in enumerate(names):
        b = bits[i // count]
        n, k = tensors[f"{name}_shape"].tolist()
        q.append(unpack_rows(tensors[f"{name}_packed"][None], b, k)[0])
        if not scheme.symmetric:
            zero.append(unpack_zeros(tensors[f"{name}_zero_point"][None], b, n)[0])
    scale = [tensors[f"{name}_scale"] for name in names]
    zeros = _joined(zero, E) if zero else None
    return Quantized(_joined(q, E), _joined(scale, E), zeros, *common(scheme, bits))


def _joined(matrices: list[Tensor], E: int) -> Tensor:
    """Matrices, of which each expert has some, as a stack."""
    stack: Tensor = torch.cat(matrices).unflatten(0, (E, -1))
    return stack
