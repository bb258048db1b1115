"""Round to nearest: the baseline, and the documented last resort of the other solvers."""

import torch
from jaxtyping import Float
from torch import Tensor

from qmoe.config import Scheme
from qmoe.format.grid import grid_of, make_quantized, round_to_grid
from qmoe.format.quantized import Quantized


def rtn(weight: Float[Tensor, "E N K"], scheme: Scheme, scale_dtype: torch.dtype) -> Quantized:
    """Round every weight to the nearest point of its group's min-max grid."""
    scale, zero = grid_of(weight, scheme, scale_dtype)
    q = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    # Matrix by matrix: temporaries of a whole stack are new pages each time, and handing those out
    # takes longer than computing with them.
    for matrix, s, z, to in zip(weight, scale, zero, q, strict=True):
        grouped = matrix.float().unflatten(-1, (s.shape[-1], -1))
        to.copy_(round_to_grid(grouped, s[..., None], z[..., None], scheme.bits).flatten(-2))
    return make_quantized(q, scale, zero, scheme, scale_dtype)
