"""Places for EXL3's tensors in a model skeleton, declared from the headers of a checkpoint, and the
stacks that they become.

Every matrix of a module has places of its own, [E, ...] for experts, since gate and up may differ
in rate: `gate_proj_trellis`, `gate_proj_suh`, ... A linear's are called `weight_trellis` and so on.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qmoe.checkpoint.reader import Checkpoint
from qmoe.config import CHANNEL, RATES, Scheme
from qmoe.errors import CheckpointError
from qmoe.format.exl3 import MULTIPLIERS, SIDE, Codebook
from qmoe.format.exl3_checkpoint import CODED, multiplier
from qmoe.format.trellis import Codes, Trellis, padded
from qmoe.model.experts import is_experts, matrices_of

DTYPES = (torch.int16, torch.float16, torch.float16)
SUFFIXES = ("_trellis", "_suh", "_svh", *(f"_{codebook}" for codebook in MULTIPLIERS))


@dataclass(frozen=True)
class Declared:
    """A weight [*, N, K] with places for codes. parts: prefixes of the places of its matrices.
    dtype: that it runs in."""

    shape: tuple[int, ...]
    scheme: Scheme
    parts: tuple[str, ...]
    codebook: Codebook
    dtype: torch.dtype


def declare_coded(
    model: nn.Module, target: str, names: list[str], checkpoint: Checkpoint, dtype: torch.dtype
) -> dict[str, tuple[str, int]]:
    """Put places for codes where weight `target` is. names: of the matrices that it is stored as,
    in order. Returns where each stored tensor belongs: the parameter, and its place there. Raises
    CheckpointError, by tensor, for what does not fit the model."""
    owner, _, weight = target.rpartition(".")
    module: Any = model.get_submodule(owner)
    shape = tuple(getattr(module, weight).shape)
    if is_experts(module) and module.is_transposed:
        shape = (shape[0], shape[2], shape[1])
    parts = tuple(matrices_of(module, weight)) if is_experts(module) else ("weight",)
    count, k = len(parts), shape[-1]
    known = set(checkpoint.names())
    first = names[0].removesuffix(".weight")
    codebook: Any = next((c for c in MULTIPLIERS if f"{first}.{c}" in known), "3inst")
    places: dict[str, tuple[str, int]] = {}
    stack = list(shape[:-2])
    for p, part in enumerate(parts):
        mine = names[p::count]
        rate = _rate(checkpoint, mine[0].removesuffix(".weight"), known)
        sizes = (padded(k), padded(shape[-2] // count))
        shapes = ([*(size // SIDE for size in sizes), int(SIDE * rate)], [sizes[0]], [sizes[1]])
        for suffix, size, kind in zip(CODED, shapes, DTYPES, strict=True):
            place = f"{part}_{suffix[1:]}"
            _put(module, place, torch.empty(*stack, *size, dtype=kind, device="meta"))
            for e, name in enumerate(mine):
                places[name.removesuffix(".weight") + suffix] = (f"{owner}.{place}", e)
        if codebook in MULTIPLIERS:
            _put(module, f"{part}_{codebook}", torch.empty(stack, dtype=torch.int32, device="meta"))
            for e, name in enumerate(mine):
                key = f"{name.removesuffix('.weight')}.{codebook}"
                places[key] = (f"{owner}.{part}_{codebook}", e)
        scheme = Scheme(rate, CHANNEL, codebook=codebook)
    delattr(module, weight)
    if not hasattr(module, "_qmoe_coded"):
        module._qmoe_coded = {}
    module._qmoe_coded[weight] = Declared(shape, scheme, parts, codebook, dtype)
    return places


def _put(module: Any, name: str, tensor: Tensor) -> None:
    module.register_parameter(name, nn.Parameter(tensor, requires_grad=False))


def _rate(checkpoint: Checkpoint, key: str, known: set[str]) -> float:
    """Bits a weight, by the shape of the codes."""
    name = f"{key}.trellis"
    if f"{key}.su" in known or f"{key}.sv" in known:
        raise CheckpointError(
            f"{checkpoint.path}: {key}.su holds signs alone, as the first versions of exllamav3 "
            "wrote them; convert the model with a newer one"
        )
    if name not in known:
        raise CheckpointError(f"{checkpoint.path}: {name} is missing")
    shape = checkpoint.lazy(name).get_shape()
    rate: float = shape[-1] / SIDE if len(shape) == 3 else 0.0
    if rate not in RATES:
        raise CheckpointError(
            f"{checkpoint.path}: {name} has shape {tuple(shape)}; expected 16 times 1 to 8 bits, "
            "in halves, in the last of three dimensions"
        )
    return int(rate) if rate.is_integer() else rate


def take_coded(module: Any, where: str) -> dict[str, Trellis]:
    """Remove the stored tensors of a module's weights and return them as stacks, by weight.
    CheckpointError for a multiplier that is no codebook's, and for scales that are no numbers."""
    return {
        weight: _take(module, declared, f"{where}.{weight}")
        for weight, declared in getattr(module, "_qmoe_coded", {}).items()
    }


def _take(module: Any, declared: Declared, where: str) -> Trellis:
    *stack, n, k = declared.shape
    made = []
    for part in declared.parts:
        found = [_pop(module, f"{part}{suffix}") for suffix in SUFFIXES[:3]]
        said = multiplier(declared.codebook)
        if said is not None:
            values = _pop(module, f"{part}_{declared.codebook}")
            if not bool((values == said).all()):
                wrong = values[values != said].flatten().tolist()[0]
                raise CheckpointError(
                    f"{where}: {part}.{declared.codebook} says the multiplier {wrong}, the "
                    f"codebook has {int(said)}"
                )
        trellis, suh, svh = (t.data if stack else t.data[None] for t in found)
        if not (suh.isfinite().all() and svh.isfinite().all()):
            raise CheckpointError(f"{where}: suh or svh has values that are no numbers")
        made.append(Codes(trellis, suh, svh, declared.codebook, n // len(declared.parts), k))
    return Trellis(tuple(made), declared.scheme)


def _pop(module: Any, name: str) -> Tensor:
    tensor: Tensor = module._parameters.pop(name)
    return tensor
