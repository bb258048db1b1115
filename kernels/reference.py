"""What the kernels compute, slow and obvious; random layers; and when a result is wrong.

For tests, and for benchmarks and tuners, which compare before a clock starts.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from qmoe.config import Scheme
from qmoe.format.grid import dequantize, limits
from qmoe.format.quantized import Quantized


def moe_reference(
    x: Float[Tensor, "T H"],
    expert_ids: Int[Tensor, "T A"],
    gates: Float[Tensor, "T A"],
    first: Float[Tensor, "E N H"],
    second: Float[Tensor, "E H2 I"],
    activation: Callable[[Tensor], Tensor],
) -> Float[Tensor, "T H2"]:
    """The definition of `moe_forward`, one token and one expert at a time."""
    out = torch.zeros(x.shape[0], second.shape[1], dtype=x.dtype)
    for t in range(x.shape[0]):
        for a in range(expert_ids.shape[1]):
            e = int(expert_ids[t, a])
            if e < first.shape[0]:
                out[t] += gates[t, a] * (second[e] @ activation(first[e] @ x[t]))
    return out


def random_matrices(
    E: int,
    n: int,
    k: int,
    bits: int | tuple[int, ...],
    group: int,
    dtype: torch.dtype,
    device: torch.device,
    symmetric: bool = True,
) -> list[Quantized]:
    """E matrices [1, n, k] of random integers, of weight-like size; several widths take turns."""
    widths = bits if isinstance(bits, tuple) else (bits,)
    made = []
    for e in range(E):
        scheme = Scheme(widths[e % len(widths)], group, symmetric)
        low, high = limits(scheme.bits)
        q = torch.randint(low, high + 1, (1, n, k), dtype=torch.int8, device=device)
        # Uniform integers have a deviation of their range / sqrt(12).
        size = 12**0.5 / (high - low) * k**-0.5
        spread = 0.5 + torch.rand(1, n, scheme.groups(k), device=device)
        zero = None
        if not symmetric:
            zero = torch.randint(low // 2, high // 2 + 1, spread.shape, device=device).to(
                torch.int8
            )
        made.append(Quantized(q, (spread * size).to(dtype), zero, scheme))
    return made


def layer_reference(
    x: Float[Tensor, "T H"],
    ids: Int[Tensor, "T A"],
    gates: Float[Tensor, "T A"],
    first: Sequence[Quantized],
    second: Sequence[Quantized],
    activation: Callable[[Tensor], Tensor],
) -> Float[Tensor, "T H2"]:
    """The same from stored integers, an expert at a time, in float32 but for one rounding: what
    lies between the products is kept in the dtype of x, as the kernels keep it."""
    y = torch.zeros(len(x), second[0].q.shape[1], device=x.device)
    for e, (a, b) in enumerate(zip(first, second, strict=True)):
        token, slot = torch.where(ids == e)
        if len(token):
            mid = activation(x[token].float() @ dequantize(a)[0].T).to(x.dtype).float()
            y.index_add_(0, token, mid @ dequantize(b)[0].T * gates[token, slot, None].float())
    return y


def worst_block(y: Float[Tensor, "T N"], wanted: Float[Tensor, "T N"]) -> float:
    """The largest error of 128 neighbouring outputs of a token, RMS relative to theirs: a wrong
    tile shows, however many others are right. Blocks of 0 must be 0; NaN gives infinity."""
    if not y.isfinite().all():
        return float("inf")
    worst = 0.0
    for got, right in zip(y.float().split(128, 1), wanted.split(128, 1), strict=True):
        error, size = (t.square().mean(1).sqrt() for t in (got - right, right))
        worst = max(worst, float((error / size.clamp(min=1e-30)).max()))
    return worst


# What rounding alone leaves of the worst block of 128 among tens of thousands: of the output, of
# contributions in large batches, of expanded weights. On an H100 bfloat16 left 0.9 % at most; a
# wrong tile leaves about 100 %.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 1e-3, torch.bfloat16: 1.5e-2}


def check_layer(
    y: Float[Tensor, "T N"], wanted: Float[Tensor, "T N"], dtype: torch.dtype, what: str
) -> float:
    """`worst_block`; raises ArithmeticError, naming `what`, if rounding does not explain it."""
    error = worst_block(y, wanted)
    if error > TOLERANCE[dtype]:
        raise ArithmeticError(
            f"{what}: a block of 128 outputs is off by {error:.2g} of its size, rounding to "
            f"{dtype} explains {TOLERANCE[dtype]:.2g}"
        )
    return error
