"""One call for all methods: a stack and its Hessian in, stored integers and what happened out."""

from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from qmoe.config import Method, Scheme
from qmoe.grid import dequantize
from qmoe.solvers.awq import output_error
from qmoe.solvers.gptq import gptq
from qmoe.solvers.rtn import rtn
from qmoe.types import Quantized


@dataclass(frozen=True)
class Solved:
    """error: per expert, RMS output error relative to the RMS output on its calibration tokens
    (0 for an expert that saw none; empty without statistics). damped, rounded: see GptqResult."""

    quantized: Quantized
    error: list[float]
    damped: dict[int, float] = field(default_factory=dict)
    rounded: list[int] = field(default_factory=list)


def solve(
    weight: Float[Tensor, "E N K"],
    hessian: Float[Tensor, "E K K"] | None,
    scheme: Scheme,
    method: Method,
    *,
    scale_dtype: torch.dtype,
    act_order: bool,
    damp: float,
) -> Solved:
    """Quantize a stack. AWQ's scales are already in the weights, so it rounds to nearest here.

    Only plain rounding can do without a Hessian.
    """
    if method == "gptq" and hessian is not None:
        result = gptq(
            weight, hessian, scheme, scale_dtype=scale_dtype, act_order=act_order, damp=damp
        )
        quantized, damped, rounded = result.quantized, result.damped, result.rounded
    else:
        quantized, damped, rounded = rtn(weight, scheme, scale_dtype), {}, []
    if hessian is None:
        return Solved(quantized, [], damped, rounded)
    difference = dequantize(quantized) - weight.float()
    lost, total = output_error(difference, hessian), output_error(weight.float(), hessian)
    ratio = torch.where(total > 0, lost.clamp(min=0) / total.clamp(min=1e-30), 0.0)
    return Solved(quantized, ratio.sqrt().tolist(), damped, rounded)
