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

# Of the codebook's deviation: what the deviation of the weights is set to. Codes reach less far
# than a Gaussian does, and the more bits they have the more do its tails weigh. With a Hessian what
# is coded is wider than the weights, by the errors that are fed back.
ALONE = {1.0: 1.0, 1.5: 0.97, 2.0: 0.95, 2.5: 0.91, 3.0: 0.89}
MOST_ALONE = 0.87
FED_BACK = {1.0: 0.66, 1.5: 0.71}
MOST_FED_BACK = 0.77
SEED = 0x45584C33  # of the signs
ENERGY = 0.125  # the power of an input's energy by which its scale is less
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
    H = None
    if hessian is not None:
        H = torch.zeros(E, K, K)
        H[:, :k, :k] = hessian
    rows, columns = scales_of(W, None if H is None else H.diagonal(dim1=1, dim2=2))
    turned = rotate(rotate((W / columns[:, None] / rows[..., None]).mT, BLOCK).mT, BLOCK).mT
    share = share_of(float(scheme.bits), H is not None) * codebook_values(codebook).std()
    size = turned.square().mean((1, 2)).sqrt().clamp(min=1e-30) / share
    order, factor = torch.arange(K).expand(E, K), _Factor(None, None, {}, [])
    if H is not None:
        rotated = rotate_moments(H * columns[:, None] * columns[..., None], BLOCK)
        order = _order(rotated)
        each = torch.arange(E)[:, None, None]
        factor = _factor(rotated[each, order[..., None], order[:, None]], damp)
    there = torch.arange(E)[:, None]
    trellis = _code(turned[there, order] / size[:, None, None], factor, scheme, beam)
    trellis = trellis[there, torch.argsort(order[:, ::SIDE] // SIDE)]
    rows = rows * size[:, None]
    made = torch.stack([rotate(rotate(decode(t, codebook).T, BLOCK).T, BLOCK) for t in trellis])
    if H is not None:
        columns, rows = fit_scales(made, W, H, columns, rows, damp)
    # Both sides of equal size, so that neither leaves the range of float16.
    balance = (rows.abs().mean(1) / columns.abs().mean(1)).sqrt()[:, None]
    suh, svh = (columns * balance).half().contiguous(), (rows / balance).half().contiguous()
    # What is filled up is cut off again, and whatever is coded there is no loss.
    W = W[:, :n]
    D = (suh.float()[..., None] * made * svh.float()[:, None]).mT[:, :n] - W
    lost, total = (
        ((M if H is None else M @ H) * M).sum((1, 2), dtype=torch.float64) for M in (D, W)
    )
    return Coded(Codes(trellis, suh, svh, codebook, n, k), lost, total, factor.damped, factor.alone)


def share_of(rate: float, fed_back: bool) -> float:
    """The deviation of weights over that of the codebook."""
    if fed_back:
        return FED_BACK.get(rate, MOST_FED_BACK)
    return ALONE.get(rate, MOST_ALONE)


def scales_of(
    W: Float[Tensor, "E N K"], energy: Float[Tensor, "E K"] | None
) -> tuple[Float[Tensor, "E N"], Float[Tensor, "E K"]]:
    """Scales of outputs and inputs with random signs, ahead of the rotations. energy: of inputs.

    Codes lose alike everywhere, and scaled back that is a loss by the square of the scale. With
    outputs scaled by the root of their size the sum is least; inputs are scaled to equal size, and
    those of high energy to a larger one, so that they lose less."""
    generator = torch.Generator().manual_seed(SEED)
    signs = [torch.randint(0, 2, (size,), generator=generator) * 2.0 - 1 for size in W.shape[1:]]
    columns = _even(W.square().mean(1).sqrt())
    if energy is not None:
        columns = columns / _even(energy) ** ENERGY
        columns = columns * _level(W / columns[:, None], 1)
    rows = _even((W / columns[:, None]).square().mean(2).sqrt()) ** 0.5
    rows = rows * _level(W / columns[:, None] / rows[..., None], 2)
    return rows * signs[0], columns * signs[1]


def _even(size: Float[Tensor, "E n"]) -> Float[Tensor, "E n"]:
    """Sizes over the mean of those that are not zero; the least of them are taken larger."""
    count = (size > 0).sum(1, keepdim=True).clamp(min=1)
    mean = (size.sum(1, keepdim=True) / count).clamp(min=torch.finfo(size.dtype).tiny)
    return (size / mean).clamp(min=1e-2)


def _level(W: Float[Tensor, "E N K"], dim: int) -> Float[Tensor, "E n"]:
    """The size of each block of 128 rows or columns, which are rotated as one and must not differ:
    all have the same codes: over the largest. dim: the other one."""
    mean = W.square().mean(dim).unflatten(1, (-1, BLOCK)).mean(2).sqrt()
    largest = mean.amax(1, keepdim=True).clamp(min=torch.finfo(mean.dtype).tiny)
    # Where there is nothing, any scale will do.
    share = torch.where(mean > 0, mean / largest, 1.0).clamp(min=1e-2)
    return share.repeat_interleave(BLOCK, 1)


def _order(H: Float[Tensor, "E K K"]) -> Int[Tensor, "E K"]:
    """Inputs in blocks of 128 by falling energy."""
    energy = H.diagonal(dim1=1, dim2=2).unflatten(1, (-1, BLOCK)).sum(2)
    blocks = torch.argsort(energy, dim=1, descending=True, stable=True)
    return (blocks[..., None] * BLOCK + torch.arange(BLOCK)).flatten(1)


@dataclass
class _Factor:
    """unit [E, K, K], inner [E, K / 16, 16, 16]: upper U and D of H = U D U', D in blocks of 16, U
    with ones for its diagonal blocks. damped, alone: see `Coded`."""

    unit: Tensor | None
    inner: Tensor | None
    damped: dict[int, float]
    alone: list[int]


def _factor(H: Float[Tensor, "E K K"], damp: float) -> _Factor:
    unit = torch.zeros_like(H)
    inner = torch.eye(SIDE).repeat(len(H), H.shape[1] // SIDE, 1, 1)
    out = _Factor(unit, inner, {}, [])
    for e, matrix in enumerate(H):
        mean, amount = matrix.diagonal().mean(), damp
        while mean > 0 and amount <= 1:
            damped = matrix / mean + amount * torch.eye(len(matrix))
            # L L' of the reversed matrix, reversed again, is U U'.
            L, info = torch.linalg.cholesky_ex(damped.flip(0, 1))
            if info == 0 and L.isfinite().all():
                blocks = torch.stack(
                    [L[i : i + SIDE, i : i + SIDE] for i in range(0, len(L), SIDE)]
                )
                unit[e] = _unit_blocks(L, blocks).flip(0, 1)
                inner[e] = (blocks @ blocks.mT).flip(0, 1, 2)
                break
            amount *= 10
        else:
            out.alone.append(e)
        if damp < amount <= 1:
            out.damped[e] = amount
    return out


def _unit_blocks(L: Float[Tensor, "K K"], blocks: Float[Tensor, "k 16 16"]) -> Float[Tensor, "K K"]:
    """Lower L with ones for its diagonal blocks of 16: columns times the inverses of these."""
    ones = torch.eye(SIDE).expand_as(blocks)
    inverse = torch.linalg.solve_triangular(blocks, ones, upper=False)
    made = L.unflatten(1, (-1, SIDE)).transpose(0, 1) @ inverse
    whole: Tensor = made.transpose(0, 1).flatten(1)
    return whole


def _code(
    W: Float[Tensor, "E K N"], factor: _Factor, scheme: Scheme, beam: int
) -> Int16[Tensor, "E k n w"]:
    """Tiles of matrices whose inputs lie in the order in which they are coded."""
    rate, codebook = float(scheme.bits), cast(Codebook, scheme.codebook)
    values, error, out = codebook_values(codebook), torch.zeros_like(W), list[Tensor]()
    for start in range(0, W.shape[1], SIDE):
        block = slice(start, start + SIDE)
        target = W[:, block]
        metric = None if factor.inner is None else factor.inner[:, start // SIDE]
        if factor.unit is not None and start:
            # LDLQ's feedback: what was lost in the blocks before comes back here.
            target = target + factor.unit[:, :start, block].mT @ error[:, :start]
        states, _ = encode(to_tiles(target), rate, codebook, beam, metric=metric)
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
