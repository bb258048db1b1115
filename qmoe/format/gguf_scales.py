"""Scales that llama.cpp's block types hold exactly (`Scheme.gguf`).

Its K types store one float16 number d for a super-block of 256 inputs, and for parts of it small
whole multiples: at 2 bits (Q2_K) 0 to 15 for the scales, and the same for the minima, zero * scale,
with a float16 number of their own; at 3 bits (Q3_K) up to 31 and no minima. A grid whose scales are
free has no such d. Here every super-block chooses one, and its scales become multiples of it,
before integers are chosen for them: nothing is rounded again when the matrix is exported.

All other types have a float16 scale per 32 inputs, so scales are only kept where float16 has all of
their digits.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from qmoe.config import Scheme

SUPER = 256  # inputs of a super-block
MOST = {2: 15, 3: 31}  # the largest multiple, by bits
LARGEST = 65280.0  # of bfloat16 in the range of float16
DIGITS = {torch.bfloat16: 8, torch.float16: 11, torch.float32: 11}  # binary, of a scale


def gguf_scales(
    scale: Float[Tensor, "*any G"],
    zero: Float[Tensor, "*any G"],
    bits: int,
    group: int,
    dtype: torch.dtype,
) -> Float[Tensor, "*any G"]:
    """The nearest scales that a block type holds, numbers of `dtype` still. zero: zero points, as
    stored (0 without them). group: inputs of a group; rows that are not made of super-blocks keep
    their scales within float16's range, and so do grids that have no K type (4 and 8 bits, and 3
    bits with zero points)."""
    digits = DIGITS[dtype]
    scale = scale.clamp(_least(digits), LARGEST).half().float()
    G = scale.shape[-1]
    zeros = bool((zero != 0).any())
    if bits not in MOST or (G * group) % SUPER or (bits == 3 and zeros):
        return scale
    count = max(SUPER // group, 1)
    if count == 1:
        return scale
    parts = scale.unflatten(-1, (-1, count))
    offsets = zero.unflatten(-1, (-1, count)) + (1 << (bits - 1))
    most = MOST[bits]
    digits -= most.bit_length()
    largest = parts.amax(-1, keepdim=True)
    best = torch.empty_like(parts)
    least = torch.full_like(largest, torch.inf)
    # Of what the largest scale may be a multiple. Twice as many units are half as large and leave
    # no scale further away, but minima may then have no unit.
    for multiple in range(1 if zeros else (most + 1) // 2, most + 1):
        unit = _with_digits(largest / multiple, digits).clamp(min=_least(digits))
        multiples = (parts / unit).round().clamp(1, most)
        error = (multiples * unit - parts).square().sum(-1, keepdim=True)
        if bits == 2:
            error = torch.where(_minima_fit(multiples * offsets, most), error, torch.inf)
        best = torch.where(error < least, multiples * unit, best)
        least = torch.minimum(error, least)
    return best.flatten(-2)


def widest_bits(scheme: Scheme, inputs: int) -> int:
    """The most bits that a matrix of this many inputs may have for the bytes of its own. No K type
    holds rows that are not made of super-blocks. Q4_0 then does, 2 and 3 bits like 4; but zero
    points need Q4_1 at 4 bits, which is larger."""
    bits: int = scheme.bits
    if inputs % SUPER == 0 or bits not in MOST:
        return bits
    return 4 if scheme.symmetric else 3


def _least(digits: int) -> float:
    """The smallest number from which on float16, whose last place is 2^-24, has so many digits."""
    return 2.0 ** (digits - 25)


def _with_digits(values: Tensor, digits: int) -> Tensor:
    """The nearest numbers with so many binary digits."""
    mantissa, exponent = torch.frexp(values)
    return torch.ldexp((mantissa * 2**digits).round(), exponent - digits)


def _minima_fit(minima: Tensor, most: int) -> Tensor:
    """Whether minima [*, P] are multiples up to `most` of one number: [*, 1]."""
    whole = minima.long()
    unit = whole[..., :1]
    for i in range(1, whole.shape[-1]):
        unit = torch.gcd(unit, whole[..., i : i + 1])
    return whole.amax(-1, keepdim=True) <= most * unit
