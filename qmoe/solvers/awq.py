"""AWQ's scale search (Lin et al., 2023, arXiv 2306.00978, section 3.2).

Inputs that are large on average get finer weights: column k is multiplied by s_k before rounding
and the producer of the input divided by it. Here only s is found; folding it into whatever
produces the input is the caller's business (qmoe/layer/awq.py). Two changes to the paper:
activation size is the RMS, and the loss is the full output error tr(D H D'), both read off the
Hessian that GPTQ uses as well.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from qmoe.config import Scheme
from qmoe.format.grid import dequantize
from qmoe.solvers.rtn import rtn

STEPS = 20


def output_error(
    difference: Float[Tensor, "E N K"], hessian: Float[Tensor, "E K K"]
) -> Float[Tensor, " E"]:
    """tr(D H D') per expert, float64: summed squared output error of a weight difference D. Squares
    of weights below 1e-19 are zero in float32, and infinite above 1e19: D is scaled to about 1 by a
    power of two, which changes no digit."""
    exponent = torch.frexp(difference.abs().amax((1, 2))).exponent - 1
    size = torch.ldexp(torch.ones_like(exponent, dtype=torch.float32), exponent)
    D = difference / size[:, None, None]
    return ((D @ hessian) * D).sum((1, 2)).double() * size.double().square()


@dataclass(frozen=True)
class Reader:
    """A stack that reads the scaled input: weight [E, N, K], the input's Hessian, its scheme."""

    weight: Float[Tensor, "E N K"]
    hessian: Float[Tensor, "E K K"]
    scheme: Scheme


def awq_scales(
    readers: list[Reader], *, scale_dtype: torch.dtype, shared: bool
) -> Float[Tensor, "S K"]:
    """The factors s = (RMS of the input)^alpha with the least output error, alpha in [0, 1).

    shared: one row of factors for all matrices of all readers (their input comes from one norm),
    powers of two, so that norm and routers stay exact in 16 bits; otherwise one row per expert of
    the single reader. alpha = 0 (s = 1, plain rounding) is among
    the candidates, so the result is never worse on the calibration text. An input that was never
    active gets the factor 1.
    """
    energy = torch.cat([torch.diagonal(r.hessian, dim1=1, dim2=2) for r in readers]).clamp(min=0)
    if shared:
        energy = energy.sum(0, keepdim=True)
    best = torch.ones_like(energy)
    least: Tensor | None = None
    for step in range(STEPS):
        s = _factors(energy, step / STEPS)
        if shared:
            s = s.log2().round().exp2()
        loss = torch.cat([_loss(reader, s, scale_dtype) for reader in readers])
        if shared:
            loss = loss.sum(0, keepdim=True)
        if least is None:
            least = loss
        best = torch.where((loss < least)[:, None], s, best)
        least = torch.minimum(loss, least)
    return best


def _loss(reader: Reader, s: Tensor, scale_dtype: torch.dtype) -> Tensor:
    W = reader.weight.float()
    rounded = dequantize(rtn(W * s[:, None], reader.scheme, scale_dtype)) / s[:, None]
    return output_error(rounded - W, reader.hessian)


def _factors(energy: Tensor, alpha: float) -> Tensor:
    """[*, K] energy^(alpha/2), centered so that the largest and smallest factor are reciprocal."""
    s = torch.where(energy > 0, energy, 1.0) ** (alpha / 2)
    s = s / (s.amax(1, keepdim=True) * s.amin(1, keepdim=True)).sqrt()
    return torch.where(energy > 0, s, 1.0)
