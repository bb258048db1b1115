"""Scales and zero points of a group, rounding to them and back: the numeric truth of the format.

The grid of compressed-tensors (`calculate_qparams`), computed in float32 whatever the weights are
stored in: zero is always representable; a symmetric range is split into 2^bits - 1 steps, so the
step is absmax / (2^bits - 1) * 2.
"""

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from qmoe.config import Scheme
from qmoe.format.gguf_scales import gguf_scales
from qmoe.format.hadamard import rotate
from qmoe.format.quantized import Quantized


def limits(bits: int) -> tuple[int, int]:
    """Smallest and largest stored integer."""
    return -(1 << (bits - 1)), (1 << (bits - 1)) - 1


# Of a scale: what it may be off when it is stored, integers being chosen for what is; and what it
# may be off when it is loaded in another dtype, integers being what they are.
COARSE, FAR = 1 / 8, 1 / 32


def stored_scale(scale: Float[Tensor, "*any"], dtype: torch.dtype) -> Float[Tensor, "*any"]:
    """float32 scales as they come back from being stored in `dtype`: as the nearest number that it
    has, subnormal ones included (float16 has no normal ones below 6.1e-5, and trained matrices need
    them), never zero. Where there is nothing to scale, the smallest normal number."""
    info = torch.finfo(dtype)
    positive = torch.where(scale > 0, scale, info.tiny)
    rounded: Tensor = positive.clamp(info.tiny * info.eps, info.max).to(dtype).float()
    return rounded


def covering_scale(scale: Float[Tensor, "*any"], dtype: torch.dtype) -> Float[Tensor, "*any"]:
    """The same, but for subnormal numbers, of which few are left: the next larger one, since a
    smaller one cuts off the largest weights."""
    info = torch.finfo(dtype)
    rounded = stored_scale(scale, dtype)
    short = (rounded < scale) & (scale < info.tiny)
    return torch.where(short, rounded + info.tiny * info.eps, rounded)


def far_scales(
    scale: Float[Tensor, "*any"], stored: Float[Tensor, "*any"], share: float
) -> Bool[Tensor, "*any"]:
    """Where stored scales are off the ones wanted by more than a share of these, at the bounds of
    their dtype."""
    return (stored - scale).abs() > share * scale


def rows_at_bounds(
    weight: Float[Tensor, "E N K"], scheme: Scheme, dtype: torch.dtype
) -> Int[Tensor, " E"]:
    """How many rows of each matrix have weights for which `dtype` has no scale near the one that
    they need: too small, or too large."""
    wanted = wanted_scale(*group_range(weight, scheme), scheme)
    far = far_scales(wanted, covering_scale(wanted, dtype), COARSE) & (wanted > 0)
    return far.any(-1).sum(-1)


def grid_of(
    weight: Float[Tensor, "E N K"], scheme: Scheme, scale_dtype: torch.dtype
) -> tuple[Float[Tensor, "E N G"], Float[Tensor, "E N G"]]:
    """Min-max scale and zero point of every group, both float32."""
    scale, zero = grid_between(*group_range(weight, scheme), scheme, scale_dtype)
    return settled(scale, zero, weight.shape[-1], scheme, scale_dtype), zero


def settled(
    scale: Float[Tensor, "*any G"],
    zero: Float[Tensor, "*any G"],
    in_features: int,
    scheme: Scheme,
    scale_dtype: torch.dtype,
) -> Float[Tensor, "*any G"]:
    """Scales of whole rows as the scheme wants them: any that `scale_dtype` has, or those that
    llama.cpp's block types hold (gguf_scales.py)."""
    if not scheme.gguf:
        return scale
    return gguf_scales(scale, zero, scheme.bits, in_features // scale.shape[-1], scale_dtype)


def group_range(
    weight: Float[Tensor, "E N K"], scheme: Scheme
) -> tuple[Float[Tensor, "E N G"], Float[Tensor, "E N G"]]:
    """The smallest and largest weight of every group, zero among them."""
    shape = (scheme.groups(weight.shape[-1]), -1)
    # In float32, and smallest and largest apart: torch does the rest of the ways four times slower.
    matrices = (matrix.float().unflatten(-1, shape) for matrix in weight)
    ranges = [(values.amin(-1), values.amax(-1)) for values in matrices]
    low, high = (torch.stack(bounds) for bounds in zip(*ranges, strict=True))
    return low.clamp(max=0), high.clamp(min=0)


def grid_between(
    low: Float[Tensor, "*any"],
    high: Float[Tensor, "*any"],
    scheme: Scheme,
    scale_dtype: torch.dtype,
) -> tuple[Float[Tensor, "*any"], Float[Tensor, "*any"]]:
    """Scale and zero point, both float32, of the grid from low <= 0 to high >= 0.

    The scale is rounded to `scale_dtype` first, because that is what will be stored and what the
    integers must be chosen for. A group of zeros gets the smallest normal scale, so no division
    by zero is possible later. Zero points are whole numbers in float; 0 if symmetric.
    """
    qmin, qmax = limits(scheme.bits)
    scale = covering_scale(wanted_scale(low, high, scheme), scale_dtype)
    if scheme.symmetric:
        return scale, torch.zeros_like(scale)
    return scale, (qmin - low / scale).round().clamp(qmin, qmax)


def wanted_scale(
    low: Float[Tensor, "*any"], high: Float[Tensor, "*any"], scheme: Scheme
) -> Float[Tensor, "*any"]:
    """The scale of the grid from low to high, before it is stored."""
    qmin, qmax = limits(scheme.bits)
    half = (qmax - qmin) / 2  # halves, because the largest bfloat16 has no double in float32
    if scheme.symmetric:
        return torch.maximum(-low, high) / half
    return (high / 2 - low / 2) / half


def round_to_grid(
    weight: Float[Tensor, "*any"],
    scale: Float[Tensor, "*#any"],
    zero: Float[Tensor, "*#any"],
    bits: int,
) -> Float[Tensor, "*any"]:
    """Nearest integers on the grid, as float32; scale and zero broadcast against weight."""
    qmin, qmax = limits(bits)
    return (weight / scale).add_(zero).round_().clamp_(qmin, qmax)


def make_quantized(
    q: Shaped[Tensor, "E N K"],
    scale: Float[Tensor, "E N G"],
    zero: Float[Tensor, "E N G"],
    scheme: Scheme,
    scale_dtype: torch.dtype,
) -> Quantized:
    """Collect solver output in its stored dtypes."""
    stored_zero = None if scheme.symmetric else zero.to(torch.int8).contiguous()
    return Quantized(
        q.to(torch.int8).contiguous(), scale.to(scale_dtype).contiguous(), stored_zero, scheme
    )


def dequantize(quantized: Quantized) -> Float[Tensor, "E N K"]:
    """The float32 weights that the stored integers stand for."""
    scale = quantized.scale.float()[..., None]
    q = quantized.q.float().unflatten(-1, (scale.shape[-2], -1))
    if quantized.zero is not None:
        q = q - quantized.zero.float()[..., None]
    return rotate((q * scale).flatten(-2), quantized.scheme.rotation)
