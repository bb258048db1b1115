"""Stored tensors inside a model: empty ones on the meta device until a checkpoint fills them, then
read as stacks [E, N, K].

Left out: what they become at run time (modules.py).
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from qmoe.config import Scheme
from qmoe.errors import CheckpointError, ConfigError
from qmoe.format.compressed_tensors import SUFFIXES
from qmoe.format.grid import FAR, far_scales, stored_scale
from qmoe.format.packing import StoredWords, packed_words, unpack_zeros
from qmoe.model.stacked import Stacked


@dataclass(frozen=True)
class Declared:
    """A weight with stored tensors: its shape [*, N, K], of how many matrices (per expert) it is
    made, the dtype of its scales, and bits of each expert's where they differ from the scheme's."""

    shape: tuple[int, ...]
    scheme: Scheme
    parts: int
    dtype: torch.dtype
    widths: tuple[int, ...] = ()


def declare(module: Any, name: str, declared: Declared) -> None:
    """Stored tensors of a weight made of `parts` matrices, each packed on its own. Where widths
    differ all have room for the widest, which the scheme has."""
    shape, scheme, parts, dtype = declared.shape, declared.scheme, declared.parts, declared.dtype
    *stack, n, k = shape
    groups = scheme.groups(k)
    stored = {
        "_packed": torch.empty(
            *stack, n, packed_words(k, scheme.bits), dtype=torch.int32, device="meta"
        ),
        "_scale": torch.empty(*stack, n, groups, dtype=dtype, device="meta"),
        "_shape": torch.empty(*stack, 2 * parts, dtype=torch.int64, device="meta"),
    }
    if not scheme.symmetric:
        words = parts * packed_words(n // parts, scheme.bits)
        stored["_zero_point"] = torch.empty(*stack, words, groups, dtype=torch.int32, device="meta")
    for suffix, tensor in stored.items():
        module.register_parameter(name + suffix, nn.Parameter(tensor, requires_grad=False))
    if not hasattr(module, "_qmoe_stored"):
        module._qmoe_stored = {}
    module._qmoe_stored[name] = declared


def stored_stacks(model: nn.Module) -> Iterator[Stacked]:
    """Every weight with stored tensors."""
    for name, module in model.named_modules():
        for weight, declared in getattr(module, "_qmoe_stored", {}).items():
            experts = declared.shape[0] if len(declared.shape) == 3 else None
            yield Stacked(f"{name}.{weight}", experts, declared.parts, _shorter(declared))


def _shorter(declared: Declared) -> dict[str, list[tuple[int, int]]]:
    """By suffix, the shape of each stored matrix of an expert, where widths differ."""
    *_, n, k = declared.shape
    rows, groups = n // declared.parts, declared.scheme.groups(k)
    found = {
        "_packed": [(rows, packed_words(k, bits)) for bits in declared.widths],
        "_zero_point": [(packed_words(rows, bits), groups) for bits in declared.widths],
    }
    return {suffix: shapes for suffix, shapes in found.items() if shapes}


def take_stored(module: nn.Module, where: str) -> dict[str, StoredWords]:
    """Remove the stored tensors of a module's weights and return them, by weight name, as stacks
    [E, N, K]. Raises CheckpointError if they contradict the model or each other."""
    return {
        name: _take(module, name, f"{where}.{name}") for name in getattr(module, "_qmoe_stored", {})
    }


def take_to_run(module: Any, where: str) -> dict[str, StoredWords]:
    """The same with scales in the dtype that the model runs in (`scale_to_run`)."""
    out = {}
    for name, stored in take_stored(module, where).items():
        dtype = module._qmoe_stored[name].dtype
        out[name] = stored
        if stored.scale.dtype != dtype:
            out[name] = replace(stored, scale=scale_to_run(stored, dtype, f"{where}.{name}"))
    return out


def scale_to_run(stored: StoredWords, dtype: torch.dtype, where: str) -> Tensor:
    """Scales in the dtype that a model runs in. ConfigError if it has no number near one of them;
    scales of nothing but zeros may become anything."""
    scale = stored.scale.float()
    made = stored_scale(scale, dtype)
    far = far_scales(scale, made, FAR)
    if far.any():
        zero = 0 if stored.zero is None else stored.zero[..., None]
        used = stored.unpack().q.unflatten(-1, (scale.shape[-1], -1)) != zero
        far &= used.any(-1)
    if far.any():
        raise ConfigError(
            f"dtype: {where} has {int(far.sum())} scales that {dtype} cannot hold, such as "
            f"{float(scale[far].min()):.1e}; load the model in bfloat16 or float32"
        )
    return made.to(dtype)


def _take(module: Any, name: str, where: str) -> StoredWords:
    declared: Declared = module._qmoe_stored[name]
    scheme, parts = declared.scheme, declared.parts
    e, n, k = (1,) * (3 - len(declared.shape)) + declared.shape
    stored: dict[str, Any] = {s: getattr(module, name + s, None) for s in SUFFIXES}
    for suffix, tensor in stored.items():
        if tensor is not None:
            delattr(module, name + suffix)
    wanted = torch.tensor([n // parts, k]).repeat(parts)
    found = stored["_shape"].view(e, -1)
    if not (found == wanted).all():
        raise CheckpointError(
            f"{where}: weight_shape says {found.tolist()}, the model needs {wanted.tolist()}"
        )
    zero = stored["_zero_point"]
    if zero is not None:
        zero = _zeros(zero.data.view(e, -1, zero.shape[-1]), declared)
    scale = stored["_scale"].data.view(e, n, -1)
    # One pass and no temporary tensors; a NaN is the smallest and the largest.
    least, most = torch.aminmax(scale)
    if not (least > 0 and most < torch.inf):
        raise CheckpointError(f"{where}: weight_scale has values that are not positive numbers")
    words = stored["_packed"].data.view(e, n, -1)
    return StoredWords(words, k, scale, zero, scheme, declared.widths)


def _zeros(words: Tensor, declared: Declared) -> Tensor:
    """Zero points [E, N, G] of stored words."""
    rows = declared.shape[-2] // declared.parts
    found = []
    for e, matrix in enumerate(words.split(1) if declared.widths else [words]):
        bits = declared.widths[e] if declared.widths else declared.scheme.bits
        parts = matrix.chunk(declared.parts, dim=1)
        own = packed_words(rows, bits)
        found.append(torch.cat([unpack_zeros(z[:, :own], bits, rows) for z in parts], dim=1))
    return torch.cat(found)
