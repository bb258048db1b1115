"""An arena inside a model: what experts modules and packed linears hold on a GPU."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from qmoe.format.quantized import Quantized
from qmoe.kernels import ops
from qmoe.kernels.activation import Activation
from qmoe.kernels.arena import BITS, Arena, build_arena
from qmoe.kernels.grouped import expanded
from qmoe.kernels.layer import device_table
from qmoe.kernels.moe import Biases


class ArenaStack(nn.Module):
    """Packed matrices on one device, computed by the Triton kernels. Buffers only."""

    buffer: Tensor
    table: Tensor

    def __init__(
        self,
        stacks: Sequence[Quantized],
        dtype: torch.dtype,
        device: torch.device,
        activation: Activation | None = None,
        paired: bool = False,
        home: torch.device | None = None,
        only: Sequence[int] | None = None,
    ):
        """stacks: the matrices of an experts module [E, N, K], first and second, or the one of a
        linear (E = 1). activation: the fused one between them, None for the unfused path. device:
        where it is computed; home: where the bytes are for now, if elsewhere (hosted/). only:
        the experts that are taken, all if None."""
        super().__init__()
        order = device_table(device)[0].order
        each = [stack.matrices() for stack in stacks]
        if only is not None:
            each = [[stack[e] for e in only] for stack in each]
        arena = build_arena(each, dtype, order, home or device, paired)
        self.scheme, self.activation = stacks[0].scheme, activation
        # Not the arena itself: its buffer would stay in the old memory when this module is moved.
        self.matrices, self.order, self.dtype = arena.matrices, arena.order, arena.dtype
        self.register_buffer("buffer", arena.buffer, persistent=False)
        self.register_buffer("table", arena.table, persistent=False)
        self.numbers = ops.describe(arena)

    @property
    def arena(self) -> Arena:
        """The arena, wherever the buffers are now."""
        return Arena(self.matrices, self.buffer, self.table, self.order, self.dtype)

    def experts(
        self,
        x: Float[Tensor, "T H"],
        ids: Int[Tensor, "T A"],
        gates: Float[Tensor, "T A"],
        activation: Callable[[Tensor], Tensor],
        biases: Biases = (None, None),
    ) -> Float[Tensor, "T H2"]:
        """As moe.Experts."""
        return self.run(self.buffer, self.table, x, ids, gates, activation, biases)

    def run(
        self,
        buffer: Tensor,
        table: Tensor,
        x: Tensor,
        ids: Tensor,
        gates: Tensor,
        activation: Callable[[Tensor], Tensor],
        biases: Biases = (None, None),
    ) -> Tensor:
        """`experts`, with their bytes in `buffer` where `table` says (hosted/slots.py)."""
        known = self.activation
        if known is not None:
            return ops.routed_experts(  # type: ignore[no-any-return]
                x, ids, gates, buffer, table, self.numbers,
                known.name, known.alpha, known.limit, *biases,
            )  # fmt: skip
        mid = ops.first_product(x, ids, buffer, table, self.numbers, biases[0])
        mid = activation(mid)
        return ops.second_product(  # type: ignore[no-any-return]
            mid, ids, gates, buffer, table, self.numbers, biases[1]
        )

    def matmul(self, x: Float[Tensor, "M K"], e: int) -> Float[Tensor, "M N"]:
        """x times the transpose of the only matrix (e = 0)."""
        return ops.linear(x, self.buffer, self.table, self.numbers, None)  # type: ignore[no-any-return]

    def expand(self, e: int, i: int = 0) -> Float[Tensor, "N K"]:
        """Matrix i (first, second) of expert e in floating point."""
        return expanded(self.arena, i, e, e + 1)[0]

    def packed_bytes(self) -> int:
        """Bytes of packed integers, padding to whole tiles included."""
        arena = self.arena
        return sum(
            matrix.weight_bytes(int(bits))
            for j, matrix in enumerate(arena.matrices)
            for bits in arena.table[j, :, BITS].tolist()
        )

    def nbytes(self) -> int:
        return self.arena.nbytes()

    def extra_repr(self) -> str:
        return f"{self.arena}, {self.order} order"
