"""A rotation of the residual stream, fused into the weights around it: nothing to do at run time.

A model that computes on h R, with R orthogonal, is the same model: an RMSNorm commutes with R once
its scale is in the matrices that read it. These become W diag(scale) R, those that write to the
stream R' W, and the embedding E R (SliceGPT, Ashkboos et al., 2024, arXiv 2401.15024, section 3.1;
QuaRot, 2024, arXiv 2404.00456, section 4, stage 1a, whose R this is: a Hadamard matrix with signs
of its rows drawn). A tied output projection then is no longer the embedding. Which modules these
are is found by qmoe/rotation/find_rotation.py.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from qmoe.format.hadamard import LARGEST, rotate
from qmoe.model.experts import bias, expert_weights, is_experts, rows
from qmoe.model.norm_readers import columns, read_weight

ROWS = 4096  # turned at once


@dataclass(frozen=True)
class Norm:
    """neutral: the weight with which it scales nothing, 1, or 0 if it scales by 1 + weight."""

    neutral: float
    readers: list[str]


@dataclass(frozen=True)
class Part:
    """What touches the stream in a layer, or outside of all, by module name. writers: linears,
    experts and embeddings."""

    norms: dict[str, Norm]
    writers: list[str]


@dataclass(frozen=True)
class FusedRotation:
    """layers: by the layer's name. untied: the output projection, if it is tied to the embedding,
    from which the rotation sets it off."""

    layers: dict[str, Part]
    outside: Part
    untied: str | None

    def rotate_layer(self, model: nn.Module, name: str) -> set[str]:
        """Rotate a layer that is in memory; the names of the parameters that changed."""
        return rotate_part(model, self.layers[name])

    def rotate_outside(self, model: nn.Module) -> set[str]:
        """The same for what lies outside the layers; a tied head gets a weight of its own."""
        if self.untied is not None:
            lm_head: Any = model.get_submodule(self.untied)
            lm_head.weight = nn.Parameter(lm_head.weight.detach().clone(), requires_grad=False)
        return rotate_part(model, self.outside)


def rotate_part(model: nn.Module, part: Part) -> set[str]:
    """Rotate what is in `part`, in place; returns the names of the parameters that changed."""
    changed = set()
    for name, norm in part.norms.items():
        module: Any = model.get_submodule(name)
        scale = module.weight.float() + (1 - norm.neutral)
        for reader in norm.readers:
            weight = columns(model.get_submodule(reader))
            assert weight is not None
            _turn_rows(weight, scale)
            changed.add(f"{reader}.{read_weight(model.get_submodule(reader))}")
        module.weight.data.fill_(norm.neutral)
        changed.add(f"{name}.weight")
    for name in part.writers:
        changed |= {f"{name}.{parameter}" for parameter in _turn_output(model.get_submodule(name))}
    return changed


def _turn_output(module: Any) -> list[str]:
    """Rotate what a module gives; returns the names of its parameters that changed."""
    if isinstance(module, nn.Embedding):
        _turn_rows(module.weight)
        return ["weight"]
    if is_experts(module):
        down = expert_weights(module)[1]
        weight, values, names = rows(module, down), bias(module, down), [down, f"{down}_bias"]
    else:
        weight, values, names = module.weight, getattr(module, "bias", None), ["weight", "bias"]
    _turn_rows(weight.mT)
    if values is None:
        return names[:1]
    values.data.copy_(turn(values.float()))
    return names


def _turn_rows(weight: Float[Tensor, "*E N H"], scale: Tensor | float = 1.0) -> None:
    """Scale and turn the rows of matrices in place, a part at a time."""
    for matrix in weight.data if weight.dim() == 3 else weight.data[None]:
        for part in matrix.split(ROWS):
            part.copy_(turn(part.float() * scale))


def turn(x: Float[Tensor, "*any H"]) -> Float[Tensor, "*any H"]:
    """x R along the last dimension."""
    H = x.shape[-1]
    block, x = block_of(H), x * _signs(H, x.device)
    if block <= LARGEST:
        return rotate(x, block)
    # Sylvester's matrix of a large size is the Kronecker product of two smaller ones.
    parts = rotate(x.unflatten(-1, (-1, LARGEST)), LARGEST).mT
    return rotate(parts, block // LARGEST).mT.flatten(-2)


def block_of(H: int) -> int:
    """Of R: the largest power of two that divides the size of the stream."""
    return H & -H


@cache
def _signs(H: int, device: torch.device) -> Float[Tensor, " H"]:
    drawn = torch.randint(2, (H,), generator=torch.Generator().manual_seed(0))
    return (drawn * 2.0 - 1).to(device)
