"""What surrounds the packed products of a decoder layer on a CPU: attention and RMS norms.

Custom ops like those of ops.py, with functions that end in _now for calls without torch's
dispatcher.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from qmoe.kernels.cpu.layout import TYPES
from qmoe.kernels.cpu.library import AttentionStruct, NormStruct, attend, norm, tier
from qmoe.kernels.cpu.ops import define

WIDEST = 256  # values of a head


def attention_now(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B G S D"],
    v: Float[Tensor, "B G S V"],
    mask: Bool[Tensor, "B H0 T S"] | None,
    scale: float,
    causal: bool,
) -> Float[Tensor, "B T H V"]:
    """softmax(scale * q k^T) v, as in FlashAttention (Dao et al. 2022, algorithm 1), in float32.

    q, k and v in float32, bfloat16 or float16; each of G key heads serves H / G heads; D and V up
    to 256. mask: where a query sees a key, for all heads (H0 = 1) or each. causal: query t sees
    keys 0 to t. A query that sees no key gets zeros. MemoryError.
    """
    number = tier()
    assert number is not None
    (B, H, T, D), (G, S), V = q.shape, k.shape[1:3], v.shape[3]
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    mask = None if mask is None else mask.expand(B, H, T, S)
    out = q.new_empty(B, T, H, V)
    call = AttentionStruct(
        q.data_ptr(), k.data_ptr(), v.data_ptr(), None if mask is None else mask.data_ptr(),
        out.data_ptr(), B, H, G, T, S, D, V, TYPES[q.dtype], causal, torch.get_num_threads(),
        q.stride()[:3], k.stride()[:3], v.stride()[:3],
        (0, 0, 0, 0) if mask is None else mask.stride(), scale,
    )  # fmt: skip
    attend(number, call)
    return out


@dataclass(frozen=True)
class RmsNorm:
    """How a family writes its norm: x / sqrt(mean(x^2) + epsilon) * (shift + weight).

    early: the first product is rounded to the type of x before the second one.
    """

    epsilon: float
    shift: float
    early: bool


def rms_norm_now(
    x: Float[Tensor, "*batch K"], weight: Float[Tensor, " K"], kind: RmsNorm
) -> Float[Tensor, "*batch K"]:
    """The norm of every row, in the dtype of x; sums and products in float32."""
    number = tier()
    assert number is not None
    x, weight = x.contiguous(), weight.contiguous()
    out, width = torch.empty_like(x), x.shape[-1]
    call = NormStruct(
        x.data_ptr(), weight.data_ptr(), out.data_ptr(), x.numel() // width, width, TYPES[x.dtype],
        TYPES[weight.dtype], kind.early, torch.get_num_threads(), kind.epsilon, kind.shift,
    )  # fmt: skip
    norm(number, call)
    return out


define(
    "cpu_attention",
    "Tensor q, Tensor k, Tensor v, Tensor? mask, float scale, bool causal",
    attention_now,
    lambda q, k, v, mask, scale, causal: q.new_empty(
        q.shape[0], q.shape[2], q.shape[1], v.shape[3]
    ),
)
define(
    "cpu_rms_norm",
    "Tensor x, Tensor weight, float epsilon, float shift, bool early",
    lambda x, weight, *kind: rms_norm_now(x, weight, RmsNorm(*kind)),
    lambda x, weight, *kind: torch.empty_like(x, memory_format=torch.contiguous_format),
)


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, causal: bool
) -> Tensor:
    """`attention_now`, seen by torch.compile as one op."""
    if torch.compiler.is_compiling():
        return torch.ops.qmoe.cpu_attention.default(q, k, v, mask, scale, causal)  # type: ignore[no-any-return]
    return attention_now(q, k, v, mask, scale, causal)


def rms_norm(x: Tensor, weight: Tensor, kind: RmsNorm) -> Tensor:
    """`rms_norm_now`, seen by torch.compile as one op."""
    if torch.compiler.is_compiling():
        return torch.ops.qmoe.cpu_rms_norm.default(  # type: ignore[no-any-return]
            x, weight, kind.epsilon, kind.shift, kind.early
        )
    return rms_norm_now(x, weight, kind)
