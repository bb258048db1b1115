"""GPTQ (Frantar et al., 2022, arXiv 2210.17323), one column loop for all experts of a layer.

Written as LDLQ, which chooses the same integers (Chee et al., 2023, arXiv 2307.13304, section 3 and
theorem 6): with H = U D U', U unit upper triangular, the loss is the sum over columns k of
D_k |(W - Q) U|_k^2, and column k is rounded once all columns before it are:
Q_k = round(W_k + sum over j < k of (W - Q)_j U_jk). One factorization instead of GPTQ's two and an
inverse, and the loss is known at the end.

Left out on purpose: models, files, devices. H is sum(x x') over an expert's tokens; its scale does
not matter. Act-order keeps the groups of the original columns ("static groups"), so the checkpoint
needs no column index.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from qmoe.config import Scheme
from qmoe.format.grid import dequantize, grid_of, make_quantized, round_to_grid
from qmoe.format.quantized import Quantized
from qmoe.solvers.awq import output_error
from qmoe.solvers.search import search

LEAF = 16  # columns whose error goes on column by column; beyond them by matrix products
WIDE = 256  # columns of U multiplied at once
MAX_DAMP = 1.0


@dataclass(frozen=True)
class GptqResult:
    """lost, total: per expert, tr(D H D') for D = W - Q and for D = W.
    damped: expert -> damping used, where the asked one did not make H positive definite.
    rounded: experts that ended up rounded to nearest because no damping did."""

    quantized: Quantized
    lost: Float[Tensor, " E"]
    total: Float[Tensor, " E"]
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
    search_grid: bool = False,
) -> GptqResult:
    """Quantize each expert so that its output error on its own tokens is small. searched: on grids,
    and with integers, from search.py instead of on min-max grids in one pass.

    An input feature that was never active (zero diagonal) keeps its weight for rounding and takes
    no part in error feedback; an expert whose H is all zero is therefore rounded to nearest.
    """
    K = weight.shape[-1]
    order = _column_order(hessian, act_order)
    factor = _factorize(hessian, order, damp)
    # [E, K, N] from here on: a column is then contiguous along N, which makes the loop faster.
    W = torch.stack([w.float().T[o] for w, o in zip(weight, order, strict=True)])
    total = _loss(factor, _times_upper(W, factor.upper), W)
    group = order // (K // scheme.groups(K))
    # With act-order the columns of one group are not neighbors: their grids are final beforehand.
    # So they are where scales depend on each other.
    static = act_order or search_grid or scheme.gguf or scheme.groups(K) == 1

    def round_on(scale: Tensor, zero: Tensor) -> tuple[Tensor, _Loop]:
        """The integers in the columns' own order, and the state at the end."""
        q = torch.empty_like(W, dtype=torch.int8)
        upper = factor.upper
        loop = _Loop(
            W.clone(), W.clone(), q, scale, zero, upper, group, static, scheme, scale_dtype
        )
        _solve(loop, 0, K)
        return torch.empty_like(q).scatter_(1, order[:, :, None].expand_as(q), q), loop

    if search_grid:

        def round_rows(scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
            q, loop = round_on(scale, zero)
            return q, (loop.target.square() * factor.diagonal[..., None]).sum(1)

        damped = hessian + torch.diag_embed(
            torch.zeros_like(factor.added).scatter_(1, order, factor.added)
        )
        damped[factor.rounded] = 0
        found = search(weight.float().mT.contiguous(), damped, scheme, scale_dtype, round_rows)
        made = make_quantized(found.q.mT, found.scale.mT, found.zero.mT, scheme, scale_dtype)
        lost = output_error(dequantize(made) - weight.float(), hessian)
    else:
        scale, zero = (grid.mT.contiguous() for grid in grid_of(weight, scheme, scale_dtype))
        q, loop = round_on(scale, zero)
        made = make_quantized(q.mT, scale.mT, zero.mT, scheme, scale_dtype)
        lost = _loss(factor, loop.target, loop.error)
    return GptqResult(made, lost, total, factor.damped, factor.rounded)


@dataclass
class _Loop:
    """All experts in the order in which columns are rounded: error and target [E, K, N].

    error: the weights; W - Q once a column is rounded. target: what a column is rounded from; what
    rounding took off once it is. static: whether scale and zero [E, G, N] are final from the start.
    """

    error: Tensor
    target: Tensor
    q: Tensor
    scale: Tensor
    zero: Tensor
    upper: Tensor
    group: Tensor
    static: bool
    scheme: Scheme
    scale_dtype: torch.dtype


def _solve(loop: _Loop, start: int, end: int) -> None:
    """Round columns start to end, whose targets hold the errors of all columns before start."""
    if end - start <= LEAF:
        _solve_leaf(loop, start, end)
        return
    # A power of two, so that every group of columns (32, 64 or 128) is one of the parts.
    middle = start + (1 << ((end - start - 1).bit_length() - 1))
    _solve(loop, start, middle)
    U = loop.upper[:, start:middle, middle:end]
    loop.target[:, middle:end].baddbmm_(U.mT, loop.error[:, start:middle])
    _solve(loop, middle, end)


def _solve_leaf(loop: _Loop, start: int, end: int) -> None:
    size = loop.error.shape[1] // loop.scale.shape[1]
    if not loop.static and start % size == 0:
        scale, zero = grid_of(_best(loop, start, start + size), loop.scheme, loop.scale_dtype)
        loop.scale[:, start // size], loop.zero[:, start // size] = scale[..., 0], zero[..., 0]
    group = loop.group[:, start:end, None].expand(-1, -1, loop.scale.shape[2])
    scale, zero = loop.scale.gather(1, group), loop.zero.gather(1, group)
    for k in range(start, end):
        s, z, target = scale[:, k - start], zero[:, k - start], loop.target[:, k]
        q = round_to_grid(target, s, z, loop.scheme.bits)
        loop.q[:, k] = q
        rounded = (q - z) * s
        target -= rounded
        error = loop.error[:, k].sub_(rounded)
        loop.target[:, k + 1 : end].addcmul_(loop.upper[:, k, k + 1 : end, None], error[:, None])


def _best(loop: _Loop, start: int, end: int) -> Tensor:
    """[E, N, end - start] where columns would best be, given those before start: what a column is
    rounded from also answers the errors of columns between start and it."""
    W, U = loop.error[:, start:end], loop.upper[:, start:end, start:end]
    shift: Tensor = torch.linalg.solve_triangular(U.mT, loop.target[:, start:end] - W, upper=False)
    return (W + shift).mT


def _column_order(H: Tensor, act_order: bool) -> Tensor:
    """[E, K] column permutation: by falling diagonal (stable, so the result is reproducible)."""
    diagonal = torch.diagonal(H, dim1=1, dim2=2)
    if act_order:
        return torch.argsort(diagonal, dim=1, descending=True, stable=True)
    return torch.arange(H.shape[1], device=H.device).repeat(H.shape[0], 1)


@dataclass(frozen=True)
class _Factor:
    """U D U' of permuted, damped Hessians: upper [E, K, K] with a unit diagonal, diagonal [E, K],
    and what damping added to H's diagonal [E, K]. damped, rounded: as in GptqResult."""

    upper: Tensor
    diagonal: Tensor
    added: Tensor
    damped: dict[int, float]
    rounded: list[int]


def _factorize(hessian: Tensor, order: Tensor, damp: float) -> _Factor:
    """Permute, damp and factorize every expert's H.

    Damping is raised tenfold for the experts where the factorization fails, up to the mean
    diagonal itself; where even that fails U is the identity and the expert is reported.
    """
    E, K, _ = hessian.shape
    # With the identity for U no error is fed back: such experts are rounded to nearest.
    none = torch.zeros(E, K, device=hessian.device)
    identity = torch.eye(K, device=hessian.device).repeat(E, 1, 1)
    factor = _Factor(identity, none, none.clone(), {}, [])
    for e in range(E):
        # L L' of the reversed matrix, reversed again, is U U'.
        backward = order[e].flip(0)
        H = hessian[e].float()[backward][:, backward]
        amount = _factorize_one(H, damp, factor.upper[e], factor.diagonal[e], factor.added[e])
        if amount is None:
            factor.rounded.append(e)
        elif amount > damp:
            factor.damped[e] = amount
    return factor


def _factorize_one(
    H: Tensor, damp: float, upper: Tensor, pivots: Tensor, added: Tensor
) -> float | None:
    """Factorize one reversed H [K, K] into the tensors given; returns the damping that worked."""
    diagonal = H.diagonal().clone()
    amount = damp
    while diagonal.mean() > 0:
        # A dead feature has no correlation with any other: give it a unit of its own.
        more = torch.where(diagonal <= 0, 1.0, amount * diagonal.mean())
        H.diagonal().copy_(diagonal + more)
        L, info = torch.linalg.cholesky_ex(H)
        if info == 0 and L.isfinite().all():
            roots = L.diagonal()
            pivots.copy_(roots.square().flip(0))
            added.copy_(more.flip(0))
            upper.copy_((L / roots).flip(0, 1))
            return amount
        if amount >= MAX_DAMP:
            break
        amount = min(amount * 10, MAX_DAMP)
    return None


def _loss(factor: _Factor, through: Tensor, weight: Tensor) -> Tensor:
    """[E] tr(W H W') without the damping, float64, from W [E, K, N] and W U."""

    def squares(columns: Tensor) -> Tensor:
        norm: Tensor = torch.linalg.vector_norm(columns, dim=2, dtype=torch.float64)
        return norm.square()

    damped = squares(through) * factor.diagonal
    damping = squares(weight) * factor.added
    loss: Tensor = (damped - damping).sum(1)
    return loss


def _times_upper(W: Tensor, upper: Tensor) -> Tensor:
    """(W' U)' [E, K, N], leaving out the zeros below the diagonal."""
    out = torch.empty_like(W)
    for start in range(0, W.shape[1], WIDE):
        end = min(start + WIDE, W.shape[1])
        out[:, start:end] = upper[:, :end, start:end].mT @ W[:, :end]
    return out
