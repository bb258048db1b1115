"""GPTQ for EXL3's codes: blocks of 16 inputs, whose error the blocks behind them take back.

A matrix is scaled and rotated on both sides first (format/trellis.py), and its Hessian with it.
Rows of a block of 16 inputs are coded as tiles; what that loses is passed on through the block
factorization H = L D L' (LDLQ, Chee et al., 2023, arXiv 2307.13304; blocks as in QTIP, Tseng et
al., 2024, arXiv 2406.11235). Blocks of 128 inputs are visited by falling energy: an error passes on
to those that matter less. In the end both scales are fitted to the codes by least squares under
the Hessian.
"""

from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Float, Int, Int16
from torch import Tensor

from qmoe.config import Scheme
from qmoe.format.exl3 import (
    SIDE,
    Codebook,
    codebook_values,
    decode,
    from_tiles,
    tiles_of,
    to_tiles,
)
from qmoe.format.hadamard import rotate, rotate_moments
from qmoe.format.trellis import BLOCK, Codes, padded
from qmoe.kernels.cpu.encode import encode

# Of the codebook's deviation: what the deviation of the coded values is set to. Codes reach less
# far than a Gaussian does, and the more bits they have the more do its tails weigh.
SHARE = {1.0: 1.0, 1.5: 0.97, 2.0: 0.95, 2.5: 0.91, 3.0: 0.89}
MOST_SHARE = 0.87
SEED = 0x45584C33  # of the signs
RIDGE = 1e-4  # that keeps fitted input scales near those before


@dataclass(frozen=True)
class Coded:
    """lost, total [E]: tr(D H D') and tr(W H W') of errors D and weights W, float64. damped: by
    matrix, the damping that it took where the usual was not enough. alone: matrices that were coded
    without their Hessian, which none made usable."""

    codes: Codes
    lost: Float[Tensor, " E"]
    total: Float[Tensor, " E"]
    damped: dict[int, float]
    alone: list[int]


def code_stack(
    weight: Float[Tensor, "E N K"],
    hessian: Float[Tensor, "E K K"] | None,
    scheme: Scheme,
    *,
    damp: float,
    beam: int,
) -> Coded:
    """Matrices in EXL3's codes, all at once. hessian: of their inputs; without it every tile is
    coded for itself. Takes some twelve copies of the Hessians."""
    (E, n, k), codebook = weight.shape, cast(Codebook, scheme.codebook)
    N, K = padded(n), padded(k)
    W = torch.zeros(E, N, K)
    W[:, :n, :k] = weight
    rows, columns = scales_of(W)
    turned = rotate(rotate((W / columns[:, None] / rows[..., None]).mT, BLOCK).mT, BLOCK).mT
    share = SHARE.get(float(scheme.bits), MOST_SHARE) * codebook_values(codebook).std()
    size = turned.square().mean((1, 2)).sqrt().clamp(min=1e-30) / share
    order, factor = torch.arange(K).expand(E, K), _Factor(None, {}, [])
    H = torch.zeros(E, K, K)
    if hessian is not None:
        H[:, :k, :k] = hessian
        rotated = rotate_moments(H * columns[:, None] * columns[..., None], BLOCK)
        order = _order(rotated)
        each = torch.arange(E)[:, None, None]
        factor = _factor(rotated[each, order[..., None], order[:, None]], damp)
    there = torch.arange(E)[:, None]
    trellis = _code(turned[there, order] / size[:, None, None], factor.unit, scheme, beam)
    trellis = trellis[there, torch.argsort(order[:, ::SIDE] // SIDE)]
    rows = rows * size[:, None]
    made = torch.stack([rotate(rotate(decode(t, codebook).T, BLOCK).T, BLOCK) for t in trellis])
    if hessian is not None:
        columns, rows = fit_scales(made, W, H, columns, rows, damp)
    # Both sides of equal size, so that neither leaves the range of float16.
    balance = (rows.abs().mean(1) / columns.abs().mean(1)).sqrt()[:, None]
    suh, svh = (columns * balance).half().contiguous(), (rows / balance).half().contiguous()
    # What is filled up is cut off again, and whatever is coded there is no loss.
    W = W[:, :n]
    D = (suh.float()[..., None] * made * svh.float()[:, None]).mT[:, :n] - W
    lost, total = (((M @ H) * M).sum((1, 2), dtype=torch.float64) for M in (D, W))
    return Coded(Codes(trellis, suh, svh, codebook, n, k), lost, total, factor.damped, factor.alone)


def scales_of(W: Float[Tensor, "E N K"]) -> tuple[Float[Tensor, "E N"], Float[Tensor, "E K"]]:
    """Scales of outputs and inputs with random signs, ahead of the rotations. With outputs scaled
    by the root of their size the error is least; inputs are scaled to equal size."""
    generator = torch.Generator().manual_seed(SEED)
    signs = [torch.randint(0, 2, (size,), generator=generator) * 2.0 - 1 for size in W.shape[1:]]
    columns = _even(W.square().mean(1).sqrt())
    rows = _even((W / columns[:, None]).square().mean(2).sqrt()).sqrt()
    return rows * signs[0], columns * signs[1]


def _even(size: Float[Tensor, "E n"]) -> Float[Tensor, "E n"]:
    """Sizes over the mean of those that are not zero; the least of them are taken larger."""
    count = (size > 0).sum(1, keepdim=True).clamp(min=1)
    mean = (size.sum(1, keepdim=True) / count).clamp(min=torch.finfo(size.dtype).tiny)
    return (size / mean).clamp(min=1e-2)


def _order(H: Float[Tensor, "E K K"]) -> Int[Tensor, "E K"]:
    """Inputs in blocks of 128 by falling energy."""
    energy = H.diagonal(dim1=1, dim2=2).unflatten(1, (-1, BLOCK)).sum(2)
    blocks = torch.argsort(energy, dim=1, descending=True, stable=True)
    return (blocks[..., None] * BLOCK + torch.arange(BLOCK)).flatten(1)


@dataclass
class _Factor:
    """unit [E, K, K]: upper U of H = U D U', D in blocks of 16, with ones on its diagonal blocks.
    damped, alone: see `Coded`."""

    unit: Tensor | None
    damped: dict[int, float]
    alone: list[int]


def _factor(H: Float[Tensor, "E K K"], damp: float) -> _Factor:
    unit = torch.zeros_like(H)
    out = _Factor(unit, {}, [])
    for e, matrix in enumerate(H):
        mean, amount = matrix.diagonal().mean(), damp
        while mean > 0 and amount <= 1:
            damped = matrix / mean + amount * torch.eye(len(matrix))
            # L L' of the reversed matrix, reversed again, is U U'.
            L, info = torch.linalg.cholesky_ex(damped.flip(0, 1))
            if info == 0 and L.isfinite().all():
                unit[e] = _unit_blocks(L).flip(0, 1)
                break
            amount *= 10
        else:
            out.alone.append(e)
        if damp < amount <= 1:
            out.damped[e] = amount
    return out


def _unit_blocks(L: Float[Tensor, "K K"]) -> Float[Tensor, "K K"]:
    """Lower L with ones for its diagonal blocks of 16: columns times the inverses of these."""
    blocks = torch.stack([L[i : i + SIDE, i : i + SIDE] for i in range(0, len(L), SIDE)])
    ones = torch.eye(SIDE).expand_as(blocks)
    inverse = torch.linalg.solve_triangular(blocks, ones, upper=False)
    made = L.unflatten(1, (-1, SIDE)).transpose(0, 1) @ inverse
    whole: Tensor = made.transpose(0, 1).flatten(1)
    return whole


def _code(
    W: Float[Tensor, "E K N"], unit: Tensor | None, scheme: Scheme, beam: int
) -> Int16[Tensor, "E k n w"]:
    """Tiles of matrices whose inputs lie in the order in which they are coded."""
    rate, codebook = float(scheme.bits), cast(Codebook, scheme.codebook)
    values, error, out = codebook_values(codebook), torch.zeros_like(W), list[Tensor]()
    for start in range(0, W.shape[1], SIDE):
        block = slice(start, start + SIDE)
        target = W[:, block]
        if unit is not None and start:
            # LDLQ's feedback: what was lost in the blocks before comes back here.
            target = target + unit[:, :start, block].mT @ error[:, :start]
        states, _ = encode(to_tiles(target), rate, codebook, beam)
        error[:, block] = W[:, block] - from_tiles(values[states])
        out.append(states[:, 0])
    return tiles_of(torch.stack(out, dim=1), rate)


def fit_scales(
    P: Float[Tensor, "E K N"],
    W: Float[Tensor, "E N K"],
    H: Float[Tensor, "E K K"],
    columns: Float[Tensor, "E K"],
    rows: Float[Tensor, "E N"],
    damp: float,
) -> tuple[Float[Tensor, "E K"], Float[Tensor, "E N"]]:
    """The scales with the least output error for given codes P: outputs, inputs, outputs again,
    each by least squares under the damped H with the other as it is."""
    mean = H.diagonal(dim1=1, dim2=2).mean(1) + torch.finfo(H.dtype).tiny
    H = H / mean[:, None, None] + damp * torch.eye(H.shape[1])
    wanted = H @ W.mT  # [E, K, N]

    def outputs() -> Tensor:
        coded = columns[..., None] * P
        return _near((coded * wanted).sum(1) / (coded * (H @ coded)).sum(1), rows)

    rows = outputs()
    coded = P * rows[:, None]
    system = H * (coded @ coded.mT)
    ridge = RIDGE * system.diagonal(dim1=1, dim2=2) + torch.finfo(H.dtype).tiny
    right = (coded * wanted).sum(2) + ridge * columns
    fitted, bad = torch.linalg.solve_ex(system + torch.diag_embed(ridge), right)
    columns = torch.where((bad == 0)[:, None], _near(fitted, columns), columns)
    return columns, outputs()


def _near(fitted: Tensor, before: Tensor) -> Tensor:
    """A scale that would change by half or to twice stays as it is."""
    share = fitted / before
    return torch.where((share > 0.5) & (share < 2), fitted, before)
