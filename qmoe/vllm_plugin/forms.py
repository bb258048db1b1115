"""What a layer of vLLM holds when its weights are loaded: packed stacks for the C kernels on a CPU,
or for the Triton kernels on a GPU, and the activations between experts' two products. No vLLM.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qmoe.errors import UnsupportedModelError
from qmoe.format.hadamard import rotate
from qmoe.format.packing import StoredWords
from qmoe.format.quantized import Quantized, common
from qmoe.kernels import uses_arena
from qmoe.kernels.activation import Activation
from qmoe.kernels.cpu.stack import CpuStack, uses_cpu_kernels
from qmoe.runtime.stored import scale_to_run

# By vLLM's names. The first ones are computed on gate and up (and fused with the products).
GATED = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_tanh"}
CLAMPED = "swigluoai_uninterleave"
# vLLM's for gate and up rows in turns, which are stored one after the other here. Its parameters
# are gpt-oss's, which vLLM has in its kernel.
GPT_OSS = "swigluoai"
UNGATED: dict[str, Callable[[Tensor], Tensor]] = {
    "silu_no_mul": F.silu,
    "gelu_no_mul": F.gelu,
    "gelu_tanh_no_mul": lambda x: F.gelu(x, approximate="tanh"),
    "relu2_no_mul": lambda x: F.relu(x).square(),
}


class Piece(nn.Module):
    """The rows of a linear that are one packed matrix; weights: [1, N, K]."""

    def __init__(self, weights: StoredWords, rotation: int, dtype: torch.dtype, where: str):
        super().__init__()
        self.rotation = rotation
        self.stack: Any = packed([[weights]], dtype, None, where)

    def forward(self, x: Tensor) -> Tensor:
        """[M, K] to [M, N]."""
        y: Tensor = self.stack.matmul(rotate(x, self.rotation), 0)
        return y


class PlainPiece(nn.Module):
    """The rows of a linear that are not quantized; weight [N, K]."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.register_buffer("kept", weight, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """[M, K] to [M, N]."""
        return F.linear(x, self.get_buffer("kept"))


def packed(
    stacks: Sequence[Sequence[StoredWords]],
    dtype: torch.dtype,
    activation: Activation | None,
    where: str,
) -> nn.Module:
    """The packed form of experts (first and second matrices, each a list with one stack [1, N, K]
    per expert) or of a linear (one list of one), on the device of their words.

    UnsupportedModelError on a CPU without C kernels.
    """
    stacks = [[_to_run(one, dtype, where) for one in each] for each in stacks]
    device = stacks[0][0].words.device
    if uses_arena(device):
        # Only machines that have Triton can import it.
        from qmoe.kernels.arena_stack import ArenaStack

        arena = [_as_one(each) for each in stacks]
        return ArenaStack(arena, dtype, device, activation, activation is not None)
    if not uses_cpu_kernels(device):
        raise UnsupportedModelError(
            f"{where}: in vLLM qmoe needs its C kernels on {device}, and this installation has "
            "none that run here; install qmoe again on a machine with a C compiler, or unset "
            "QMOE_CPU_KERNELS"
        )
    return CpuStack(stacks, dtype, activation)


def _to_run(stored: StoredWords, dtype: torch.dtype, where: str) -> StoredWords:
    if stored.scale.dtype == dtype:
        return stored
    return replace(stored, scale=scale_to_run(stored, dtype, where))


def _as_one(each: Sequence[StoredWords]) -> Quantized:
    """A stack of all experts; widths of its matrices are its own where they differ."""
    alone = [one.unpack() for one in each]
    scheme, widths = common(alone[0].scheme, [one.scheme.bits for one in each])
    zeros = [one.zero for one in alone if one.zero is not None]
    return Quantized(
        torch.cat([one.q for one in alone]),
        torch.cat([one.scale for one in alone]),
        torch.cat(zeros) if zeros else None,
        scheme,
        widths,
    )


def activation_of(
    name: str, alpha: float | None, beta: float | None, limit: float | None, where: str
) -> Activation | Callable[[Tensor], Tensor]:
    """What lies between an expert's two products, by vLLM's name and parameters: an Activation that
    kernels can fuse (gate rows before up rows), or a function of the ungated product.

    UnsupportedModelError for one that qmoe does not have.
    """
    if name in GATED and limit is None:
        return Activation(GATED[name])
    if name in UNGATED:
        return UNGATED[name]
    if name == GPT_OSS and (alpha, beta, limit) == (None, None, None):
        return Activation("clamped_swiglu", 1.702, 7.0)
    if name == CLAMPED and beta in (None, 1.0) and alpha is not None and limit is not None:
        return Activation("clamped_swiglu", alpha, limit)
    clamped = "" if limit is None else f" with limit {limit}, alpha {alpha}, beta {beta}"
    raise UnsupportedModelError(
        f"{where}: qmoe has no activation {name!r}{clamped} in vLLM; run the model with `qmoe.load`"
    )
