"""Round to nearest: the baseline, and the documented last resort of the other solvers."""

import torch
from jaxtyping import Float
from torch import Tensor

from qmoe.config import Scheme
from qmoe.format.grid import expand_groups, grid_of, make_quantized, round_to_grid
from qmoe.format.quantized import Quantized


def rtn(weight: Float[Tensor, "E N K"], scheme: Scheme, scale_dtype: torch.dtype) -> Quantized:
    """Round every weight to the nearest point of its group's min-max grid."""
    scale, zero = grid_of(weight, scheme, scale_dtype)
    k = weight.shape[-1]
    q = round_to_grid(weight.float(), expand_groups(scale, k), expand_groups(zero, k), scheme.bits)
    return make_quantized(q, scale, zero, scheme, scale_dtype)
