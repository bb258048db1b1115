"""GPTQ (Frantar et al., 2022, arXiv 2210.17323), one column loop for all experts of a layer.

Left out on purpose: models, files, devices. H is sum(x x') over an expert's tokens; its scale does
not matter. Act-order keeps the groups of the original columns ("static groups"), so the checkpoint
needs no column index.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from qmoe.config import Scheme
from qmoe.grid import grid_of, make_quantized, round_to_grid
from qmoe.types import Quantized

BLOCK = 128  # columns whose error is propagated lazily (section 3.3, step 2)
MAX_DAMP = 1.0


@dataclass(frozen=True)
class GptqResult:
    """damped: expert -> damping used, where the asked one did not make H positive definite.
    rounded: experts that ended up rounded to nearest because no damping did."""

    quantized: Quantized
    damped: dict[int, float]
    rounded: list[int]


def gptq(
    weight: Float[Tensor, "E N K"],
    hessian: Float[Tensor, "E K K"],
    scheme: Scheme,
    *,
    scale_dtype: torch.dtype,
    act_order: bool = True,
    damp: float = 0.01,
) -> GptqResult:
    """Quantize each expert so that its output error on its own tokens is small.

    An input feature that was never active (zero diagonal) keeps its weight for rounding and takes
    no part in error feedback; an expert whose H is all zero is therefore rounded to nearest.
    """
    H = hessian.float()
    K = weight.shape[-1]
    order = _column_order(H, act_order)
    H = H.gather(1, order[:, :, None].expand_as(H)).gather(2, order[:, None, :].expand_as(H))
    U, damped, rounded = _inverse_factor(H, damp)

    # [E, K, N] from here on: a column is then contiguous along N, which makes the loop faster.
    W = weight.float().mT.contiguous()
    W = W.gather(1, order[:, :, None].expand_as(W))
    # With act-order the columns of one group are not neighbors: fix all grids beforehand.
    scale, zero = (grid.mT.contiguous() for grid in grid_of(weight, scheme, scale_dtype))
    static = act_order or scheme.groups(K) == 1
    group = K // scheme.groups(K)
    expert = torch.arange(len(W))
    Q = torch.empty_like(W)
    for start in range(0, K, BLOCK):
        end = min(start + BLOCK, K)
        error = torch.zeros_like(W[:, start:end])
        for i in range(start, end):
            if not static and i % group == 0:
                # A group never straddles blocks (32, 64 and 128 divide BLOCK), so W is current.
                fresh = grid_of(W[:, i : i + group].mT, scheme, scale_dtype)
                scale[:, i // group], zero[:, i // group] = fresh[0][..., 0], fresh[1][..., 0]
            g = order[:, i] // group
            s, z, w = scale[expert, g], zero[expert, g], W[:, i]
            Q[:, i] = q = round_to_grid(w, s, z, scheme.bits)
            error[:, i - start] = e = (w - (q - z) * s) / U[:, i, i, None]
            W[:, i + 1 : end] -= U[:, i, i + 1 : end, None] * e[:, None]
        W[:, end:].baddbmm_(U[:, start:end, end:].mT, error, alpha=-1)
    q = torch.empty_like(Q).scatter_(1, order[:, :, None].expand_as(Q), Q)
    made = make_quantized(q.mT, scale.mT, zero.mT, scheme, scale_dtype)
    return GptqResult(made, damped, rounded)


def _column_order(H: Tensor, act_order: bool) -> Tensor:
    """[E, K] column permutation: by falling diagonal (stable, so the result is reproducible)."""
    diagonal = torch.diagonal(H, dim1=1, dim2=2)
    if act_order:
        return torch.argsort(diagonal, dim=1, descending=True, stable=True)
    return torch.arange(H.shape[1]).expand(H.shape[0], -1)


def _inverse_factor(H: Tensor, damp: float) -> tuple[Tensor, dict[int, float], list[int]]:
    """Upper Cholesky factor U of the damped H^-1 (section 3.3, step 3), for every expert.

    Damping is raised tenfold for the experts where the factorization fails, up to the mean
    diagonal itself; where even that fails U is the identity and the expert is reported.
    """
    E, K, _ = H.shape
    diagonal = torch.diagonal(H, dim1=1, dim2=2)
    mean = diagonal.mean(1)
    dead = diagonal <= 0
    U = torch.eye(K).repeat(E, 1, 1)
    todo = torch.nonzero(mean > 0)[:, 0]
    damped: dict[int, float] = {}
    amount = damp
    while len(todo):
        A = H[todo].clone()
        # A dead feature has no correlation with any other: give it a unit of its own.
        torch.diagonal(A, dim1=1, dim2=2).add_((amount * mean[todo])[:, None])
        torch.diagonal(A, dim1=1, dim2=2)[dead[todo]] = 1.0
        L, info = torch.linalg.cholesky_ex(A)
        inverse = torch.cholesky_inverse(L)
        upper, info2 = torch.linalg.cholesky_ex(inverse, upper=True)
        ok = (info == 0) & (info2 == 0) & torch.isfinite(upper).all(2).all(1)
        U[todo[ok]] = upper[ok]
        if amount > damp:
            damped |= {int(e): amount for e in todo[ok]}
        todo = todo[~ok]
        if amount >= MAX_DAMP:
            break
        amount = min(amount * 10, MAX_DAMP)
    # With the identity for U no error is fed back: these experts are rounded to nearest.
    return U, damped, sorted(int(e) for e in [*todo, *torch.nonzero(mean <= 0)[:, 0]])
