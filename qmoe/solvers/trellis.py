"""GPTQ for EXL3's codes: blocks of 16 inputs, whose error the blocks behind them take back.

A matrix is scaled and rotated on both sides first (format/trellis.py), and its Hessian with it.
Rows of a block of 16 inputs are coded as tiles; what that loses is passed on through the block
factorization H = L D L' (LDLQ, Chee et al., 2023, arXiv 2307.13304; blocks as in QTIP, Tseng et
al., 2024, arXiv 2406.11235). Blocks of 128 inputs are visited by falling energy: an error passes on
to those that matter less. In the end both scales are fitted to the codes by least squares under
the Hessian.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from qmoe.config import Scheme
from qmoe.format.exl3 import SIDE, codebook_values, decode, tiles_of, to_tiles
from qmoe.format.hadamard import rotate, rotate_moments
from qmoe.format.trellis import BLOCK, Codes, padded
from qmoe.kernels.cpu.encode import encode

# Of the codebook's deviation: what the deviation of the coded values is set to. Codes reach less
# far than a Gaussian does, and the more bits they have the more do its tails weigh.
SHARE = {1.0: 1.0, 1.5: 0.97, 2.0: 0.95, 2.5: 0.91, 3.0: 0.89}
MOST_SHARE = 0.87
SEED = 0x45584C33  # of the signs


@dataclass(frozen=True)
class CodedPart:
    """codes: of one matrix. lost, total: tr(D H D') and tr(W H W') of error D and weights W. damp:
    the damping that worked, None if none did and the matrix was coded without its Hessian."""

    codes: Codes
    lost: float
    total: float
    damp: float | None


def code_matrix(
    weight: Float[Tensor, "N K"],
    hessian: Float[Tensor, "K K"] | None,
    scheme: Scheme,
    *,
    damp: float,
    beam: int,
) -> CodedPart:
    """One matrix in EXL3's codes. hessian: of its inputs; None codes every tile for itself."""
    (n, k), wide = weight.shape, (padded(weight.shape[0]), padded(weight.shape[1]))
    W = torch.zeros(wide)
    W[:n, :k] = weight
    H = torch.zeros(wide[1], wide[1])
    if hessian is not None:
        H[:k, :k] = hessian
    rows, columns = scales_of(W, H)
    turned = rotate(rotate((W / columns / rows[:, None]).T, BLOCK).T, BLOCK).T  # [K, N]
    values = codebook_values(scheme.codebook)  # type: ignore[arg-type]
    share = SHARE.get(float(scheme.bits), MOST_SHARE)
    size = turned.square().mean().sqrt().clamp(min=1e-30) / (values.std() * share)
    factor, used = None, damp
    if hessian is not None and (diagonal := H.diagonal().mean()) > 0:
        rotated = rotate_moments(H * columns * columns[:, None] / diagonal, BLOCK)
        order = _order(rotated)
        factor, used = _factor(rotated[order][:, order], damp)
    if factor is None:
        order, used = torch.arange(wide[1]), None
    trellis = _code(turned[order] / size, factor, scheme, beam)
    trellis = trellis[torch.argsort(order[::SIDE] // SIDE)]
    rows = rows * size
    made = rotate(rotate(decode(trellis, scheme.codebook).T, BLOCK).T, BLOCK)  # type: ignore[arg-type]
    if factor is not None:
        columns, rows = fit_scales(made, W, H, columns, rows, damp)
    return _finished(trellis, columns, rows, made, weight, H[:k, :k], scheme, used)


def scales_of(
    W: Float[Tensor, "N K"], H: Float[Tensor, "K K"]
) -> tuple[Float[Tensor, " N"], Float[Tensor, " K"]]:
    """Scales of outputs and inputs with random signs, ahead of the rotations. With outputs scaled
    by the root of their size the error is least; inputs are scaled to equal size."""
    generator = torch.Generator().manual_seed(SEED)
    signs = [torch.randint(0, 2, (size,), generator=generator) * 2.0 - 1 for size in W.shape]
    columns = _even(W.square().mean(0).sqrt())
    rows = _even((W / columns).square().mean(1).sqrt()).sqrt()
    return rows * signs[0], columns * signs[1]


def _even(size: Tensor) -> Tensor:
    """Sizes over their mean; those of empty rows, and all others far below it, are taken larger."""
    mean = size[size > 0].mean() if bool((size > 0).any()) else torch.ones(())
    return (size / mean).clamp(min=1e-2)


def _order(H: Float[Tensor, "K K"]) -> Tensor:
    """Inputs in blocks of 128 by falling energy."""
    energy = H.diagonal().view(-1, BLOCK).sum(1)
    blocks = torch.argsort(energy, descending=True, stable=True)
    return (blocks[:, None] * BLOCK + torch.arange(BLOCK)).flatten()


def _factor(H: Float[Tensor, "K K"], damp: float) -> tuple[Tensor | None, float | None]:
    """The unit upper block factor U of H = U D U' with blocks of 16, and the damping that worked.
    Row block b of U holds what of the error of later blocks is still to come back in b."""
    amount = damp
    while amount <= 1:
        damped = H.flip(0, 1) + amount * H.diagonal().mean() * torch.eye(len(H))
        L, info = torch.linalg.cholesky_ex(damped)
        if info == 0 and L.isfinite().all():
            blocks = torch.stack([L[i : i + SIDE, i : i + SIDE] for i in range(0, len(L), SIDE)])
            inverse = torch.linalg.solve_triangular(
                blocks, torch.eye(SIDE).expand_as(blocks), upper=False
            )
            unit = (L.unflatten(1, (-1, SIDE)).transpose(0, 1) @ inverse).transpose(0, 1).flatten(1)
            return unit.flip(0, 1), amount
        amount *= 10
    return None, None


def _code(
    W: Float[Tensor, "K N"], factor: Tensor | None, scheme: Scheme, beam: int
) -> Tensor:
    """Tiles [K/16, N/16, W] of a matrix in the order in which it is coded."""
    K, N = W.shape
    rate, codebook = float(scheme.bits), scheme.codebook
    error = torch.zeros_like(W)
    out = []
    for start in range(0, K, SIDE):
        block = slice(start, start + SIDE)
        target = W[block]
        if factor is not None and start:
            # W - Q of the blocks before, times H's factor: LDLQ's feedback.
            target = target + factor[:start, block].T @ error[:start]
        tiles = to_tiles(target)[0]
        states, _ = encode(tiles, rate, codebook, beam)  # type: ignore[arg-type]
        trellis = tiles_of(states, rate)
        error[block] = W[block] - decode(trellis[None], codebook)  # type: ignore[arg-type]
        out.append(trellis)
    return torch.stack(out)


def fit_scales(
    P: Float[Tensor, "K N"],
    W: Float[Tensor, "N K"],
    H: Float[Tensor, "K K"],
    columns: Float[Tensor, " K"],
    rows: Float[Tensor, " N"],
    damp: float,
) -> tuple[Float[Tensor, " K"], Float[Tensor, " N"]]:
    """The scales with the least output error for given codes P: outputs, inputs, outputs again,
    each by least squares under the damped H with the other as it is."""
    H = H + damp * H.diagonal().mean() * torch.eye(len(H))
    wanted = H @ W.T  # [K, N]

    def outputs() -> Tensor:
        coded = columns[:, None] * P
        fitted = (coded * wanted).sum(0) / (coded * (H @ coded)).sum(0)
        sound = (fitted / rows > 0.5) & (fitted / rows < 2)
        return torch.where(sound, fitted, rows)

    rows = outputs()
    coded = P * rows
    system = H * (coded @ coded.T)
    ridge = 1e-4 * system.diagonal()
    system = system + torch.diag(ridge + torch.finfo(torch.float32).tiny)
    right = (coded * wanted).sum(1) + ridge * columns
    fitted, bad = torch.linalg.solve_ex(system, right)
    if int(bad) == 0:
        sound = (fitted / columns > 0.5) & (fitted / columns < 2)
        columns = torch.where(sound, fitted, columns)
    return columns, outputs()


def _finished(
    trellis: Tensor,
    columns: Tensor,
    rows: Tensor,
    made: Float[Tensor, "K N"],
    weight: Tensor,
    H: Tensor,
    scheme: Scheme,
    damp: float | None,
) -> CodedPart:
    """The codes with scales as they are stored, both sides of equal size, and what they lose."""
    (n, k), balance = weight.shape, (rows.abs().mean() / columns.abs().mean()).sqrt()
    suh, svh = (columns * balance).half(), (rows / balance).half()
    error = (suh.float()[:, None] * made * svh.float()).T[:n, :k] - weight
    lost = float((error @ H * error).sum(dtype=torch.float64))
    total = float((weight @ H * weight).sum(dtype=torch.float64))
    codes = Codes(trellis[None], suh[None], svh[None], scheme.codebook, n, k)  # type: ignore[arg-type]
    return CodedPart(codes, lost, total, damp)
