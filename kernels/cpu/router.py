"""Routers on a CPU: logits, probabilities and the choice of experts as one operation.

For the few tokens of a decoding step, where torch's six operations take longer to start than to
compute. A custom op like those of ops.py.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from qmoe.kernels.cpu.layout import TYPES
from qmoe.kernels.cpu.library import RouterStruct, route, tier
from qmoe.kernels.cpu.ops import define

FEW = 8  # tokens that the kernel takes
Routed = tuple[Float[Tensor, "T E"], Float[Tensor, "T A"], Int[Tensor, "T A"]]


@dataclass(frozen=True)
class Routing:
    """How a family writes its router. choices: experts per token (A).

    normed: scores are probabilities among the chosen experts (a softmax over their logits, or over
    all and divided by their sum, which is the same), instead of among all. wide: they are float32,
    instead of in the dtype of x.
    """

    choices: int
    normed: bool
    wide: bool


def routed_now(
    x: Float[Tensor, "T K"],
    weight: Float[Tensor, "E K"],
    bias: Float[Tensor, " E"] | None,
    kind: Routing,
) -> Routed:
    """Logits x weight^T + bias [T, E] in the dtype of x, scores [T, A], and ids [T, A] of the
    experts with the largest ones, the largest first (of equal ones the first).

    T up to FEW; weight and bias in the dtype of x. Sums in float32. MemoryError.
    """
    number = tier()
    assert number is not None
    x, weight = x.contiguous(), weight.contiguous()
    (T, K), E, A = x.shape, len(weight), kind.choices
    logits = x.new_empty(T, E)
    scores = x.new_empty(T, A, dtype=torch.float32 if kind.wide else x.dtype)
    ids = torch.empty(T, A, dtype=torch.int64)
    router = RouterStruct(
        x.data_ptr(), weight.data_ptr(), None if bias is None else bias.data_ptr(),
        logits.data_ptr(), scores.data_ptr(), ids.data_ptr(), T, E, K, A, TYPES[x.dtype],
        TYPES[scores.dtype], kind.normed, torch.get_num_threads(),
    )  # fmt: skip
    route(number, router)
    return logits, scores, ids


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, A: int, *kind: bool) -> Routed:
    scores = x.new_empty(len(x), A, dtype=torch.float32 if kind[1] else x.dtype)
    return x.new_empty(len(x), len(weight)), scores, x.new_empty(len(x), A, dtype=torch.int64)


define(
    "cpu_routed",
    "Tensor x, Tensor weight, Tensor? bias, int choices, bool normed, bool wide",
    lambda x, weight, bias, *kind: routed_now(x, weight, bias, Routing(*kind)),
    _fake,
    "(Tensor, Tensor, Tensor)",
)


def routed(x: Tensor, weight: Tensor, bias: Tensor | None, kind: Routing) -> Routed:
    """`routed_now`, seen by torch.compile as one op."""
    if torch.compiler.is_compiling():
        return torch.ops.qmoe.cpu_routed.default(  # type: ignore[no-any-return]
            x, weight, bias, kind.choices, kind.normed, kind.wide
        )
    return routed_now(x, weight, bias, kind)
