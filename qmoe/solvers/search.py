"""Grids and integers better than min-max and one pass, judged by the Hessian, never by the weights.

Min-max spends its few points on outliers. Here each output row of each expert tries narrower
ranges, each rounded with full error feedback, and keeps the one with the least output error
tr(D H D'); scales are then refitted to the integers found (least squares under H), integers to the
scales, and at last single integers moved wherever that lowers the error (coordinate descent, as in
QuantEase, Behdin et al., 2023, arXiv 2309.01885). Clipping by weight
error instead raises KL by half and more on trained MoEs: what is clipped must be paid for by
feedback, and only H knows the price.

Everything here is in the columns' own order: W, q, D [E, K, N], scale, zero [E, G, N].
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from qmoe.config import Scheme
from qmoe.format.grid import grid_between, group_range, limits, settled, stored_scale

RATIOS = (1.0, 0.9, 0.8, 0.7, 0.6)  # of the min-max range
REFITS = 2
SWEEPS = 3
BLOCK = 32  # columns whose integers move before the gradient of the others follows

Round = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass
class Rounded:
    """A choice of grid and integers, and the output error of every row [E, N]."""

    q: Tensor
    scale: Tensor
    zero: Tensor
    loss: Tensor

    def take(self, other: "Rounded") -> None:
        """Keep the better of the two, row by row."""
        better = other.loss < self.loss
        for name in ("q", "scale", "zero"):
            mine, theirs = getattr(self, name), getattr(other, name)
            setattr(self, name, torch.where(better[:, None], theirs, mine))
        self.loss = torch.where(better, other.loss, self.loss)


def search(
    W: Float[Tensor, "E K N"],
    H: Float[Tensor, "E K K"],
    scheme: Scheme,
    scale_dtype: torch.dtype,
    round_on: Round,
) -> Rounded:
    """The best grid and integers found. H: damped, the metric. round_on(scale, zero) rounds all
    columns with error feedback and gives q [E, K, N] and the loss of every row [E, N]."""

    def fitted(at: Rounded) -> Tensor:
        return as_wanted(refit_scales(wanted, H, at, scale_dtype), at.zero)

    def as_wanted(scale: Tensor, zero: Tensor) -> Tensor:
        return settled(scale.mT, zero.mT, W.shape[1], scheme, scale_dtype).mT

    def rounded(scale: Tensor, zero: Tensor) -> Rounded:
        q, loss = round_on(scale, zero)
        return Rounded(q, scale, zero, loss)

    low, high = (bound.mT.contiguous() for bound in group_range(W.mT, scheme))

    def on_range(ratio: float) -> Rounded:
        scale, zero = grid_between(low * ratio, high * ratio, scheme, scale_dtype)
        return rounded(as_wanted(scale, zero), zero)

    best = on_range(RATIOS[0])
    for ratio in RATIOS[1:]:
        best.take(on_range(ratio))
    wanted = H @ W
    for _ in range(REFITS):
        best.take(rounded(fitted(best), best.zero))
    D = _error(W, best.q, best.scale, best.zero)
    slope = H @ D
    for _ in range(SWEEPS):
        move_integers(W, H, best, D, slope, scheme.bits)
        best.loss = (D * slope).sum(1)
        scale = fitted(best)
        moved = _error(W, best.q, scale, best.zero)
        through = H @ moved
        lower = ((moved * through).sum(1) < best.loss)[:, None]
        best.scale = torch.where(lower, scale, best.scale)
        D, slope = torch.where(lower, moved, D), torch.where(lower, through, slope)
    return best


def refit_scales(
    wanted: Tensor, H: Tensor, at: Rounded, scale_dtype: torch.dtype
) -> Float[Tensor, "E G N"]:
    """The scales with the least output error for given integers: one least-squares problem of G
    unknowns per row. A scale that would change threefold stays as it is. wanted: H W."""
    E, K, N = wanted.shape
    G = at.scale.shape[1]
    P = (at.q.unflatten(1, (G, -1)) - at.zero[:, :, None]).flatten(1, 2)
    target = (wanted * P).view(E, G, -1, N).sum(2)
    products = torch.empty(E, N, G, G, device=wanted.device)
    size = K // G
    for g in range(G):
        columns, below = slice(g * size, (g + 1) * size), slice(g * size, K)
        through = H[:, below, columns] @ P[:, columns]
        sums = (through * P[:, below]).view(E, G - g, size, N).sum(2).mT
        products[:, :, g:, g] = products[:, :, g, g:] = sums
    # A group without energy (or all its integers at zero) has no scale of its own.
    ridge = 1e-6 * products.diagonal(dim1=2, dim2=3).mean(2) + torch.finfo(wanted.dtype).tiny
    products.diagonal(dim1=2, dim2=3).add_(ridge[..., None])
    fitted, bad = torch.linalg.solve_ex(products, target.mT[..., None])
    scale = fitted[..., 0].mT
    sound = (scale > at.scale / 3) & (scale < at.scale * 3) & (bad == 0)[:, None]
    return torch.where(sound, stored_scale(scale, scale_dtype), at.scale)


def move_integers(W: Tensor, H: Tensor, at: Rounded, D: Tensor, slope: Tensor, bits: int) -> None:
    """One sweep of coordinate descent: every integer in turn goes where the error is least, all
    others as they are; the error never rises. Changes at.q, and D (W less what `at` stands for)
    and slope (H D) with it, both [E, K, N], in place."""
    E, K, N = W.shape
    qmin, qmax = limits(bits)
    size = K // at.scale.shape[1]
    energy = H.diagonal(dim1=1, dim2=2)[..., None]
    q = at.q.clone()
    for start in range(0, K, BLOCK):
        block = slice(start, min(start + BLOCK, K))
        before = D[:, block].clone()
        for k in range(block.start, block.stop):
            scale, zero = at.scale[:, k // size], at.zero[:, k // size]
            # A feature without energy costs nothing wherever it is: it stays.
            rest = slope[:, k] - energy[:, k] * D[:, k]
            aim = W[:, k] + torch.where(energy[:, k] > 0, rest / energy[:, k], -D[:, k])
            q[:, k] = (aim / scale + zero).round().clamp(qmin, qmax)
            moved = W[:, k] - (q[:, k] - zero) * scale - D[:, k]
            D[:, k] += moved
            slope[:, block].addcmul_(H[:, block, k, None], moved[:, None])
        outside = [slice(0, start), slice(block.stop, K)]
        for rows in outside:
            slope[:, rows].baddbmm_(H[:, rows, block], D[:, block] - before)
    at.q = q


def _error(W: Tensor, q: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    groups = q.unflatten(1, (scale.shape[1], -1))
    error: Tensor = W - ((groups - zero[:, :, None]) * scale[:, :, None]).flatten(1, 2)
    return error
