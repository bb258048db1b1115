"""Weights for inputs that are no longer the original's.

A matrix behind a quantized one gets inputs y where the original gave it x. Its weights W are first
moved to those that make the original's outputs W x from y with the least squared error, and then
rounded: the part of the earlier error that the inputs still tell is taken back. GPTAQ (Li et al.,
2025, arXiv 2504.02692) and Qronos (Zhang et al., 2025, arXiv 2505.11695) put the same target into
GPTQ's column loop; beforehand it is one linear system, and any solver can follow.
"""

import torch
from jaxtyping import Float
from torch import Tensor


def refit(
    weight: Float[Tensor, "E N K"],
    cross: Float[Tensor, "E K K"],
    hessian: Float[Tensor, "E K K"],
    damp: float,
) -> Float[Tensor, "E N K"]:
    """The W' with the least |W' y - W x|^2 + d |W' - W|^2, float32, where `weight` is.

    cross: sum(w x y') over an expert's tokens, hessian: sum(w y y'). d: `damp` of the mean diagonal
    of the hessian; an expert that saw nothing keeps its weights.
    """
    W, C, H = (t.to(weight.device, torch.float32) for t in (weight, cross, hessian))
    damping = damp * H.diagonal(dim1=1, dim2=2).mean(1) + torch.finfo(torch.float32).tiny
    added = torch.diag_embed(damping[:, None].expand(-1, H.shape[1]))
    # C - H where C would do: what is solved for is the change, and large weights lose no digits.
    change: Tensor = torch.linalg.solve((H + added).mT, (W @ (C - H)).mT).mT
    return W + change
