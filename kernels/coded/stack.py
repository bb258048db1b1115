"""EXL3's codes inside a model on a GPU: what experts modules and linears hold there."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from qmoe.format.trellis import Trellis
from qmoe.kernels.activation import Activation
from qmoe.kernels.coded import ops
from qmoe.kernels.coded.arena import CodedArena, build_coded_arena, experts_of, stored_codes
from qmoe.kernels.layer import device_table
from qmoe.kernels.moe import Biases


class CodedStack(nn.Module):
    """Matrices in codes on one device, computed by the Triton kernels. Buffers only. Takes the
    place of an ArenaStack (kernels/arena_stack.py)."""

    buffer: Tensor
    table: Tensor

    def __init__(
        self,
        stacks: Sequence[Trellis],
        dtype: torch.dtype,
        device: torch.device,
        activation: Activation | None = None,
        home: torch.device | None = None,
    ):
        """stacks: the matrices of an experts module [E, N, K], first and second, or the one of a
        linear (E = 1). activation: the one between them, fused if gate and up are two matrices;
        None for one that no kernel knows. device: where it is computed; home: where the bytes are
        for now, if elsewhere. Raises ValueError for a device without kernels, and for gate and up
        in different codebooks."""
        super().__init__()
        device_table(device)
        each = [experts_of(part) for stack in stacks for part in stack.parts]
        arena = build_coded_arena(each, len(stacks[0].parts), dtype, home or device)
        self.scheme, self.dtype = stacks[0].scheme, dtype
        self.activation = activation if arena.first == 2 else None
        self.matrices, self.first = arena.matrices, arena.first
        self.register_buffer("buffer", arena.buffer, persistent=False)
        self.register_buffer("table", arena.table, persistent=False)
        self.numbers = ops.describe(arena)

    @property
    def arena(self) -> CodedArena:
        """The arena, wherever the buffers are now."""
        return CodedArena(self.matrices, self.first, self.buffer, self.table, self.dtype)

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
            return ops.coded_experts(  # type: ignore[no-any-return]
                x, ids, gates, buffer, table, self.numbers,
                known.name, known.alpha, known.limit, *biases,
            )  # fmt: skip
        mid = activation(ops.coded_first(x, ids, buffer, table, self.numbers, biases[0]))
        return ops.coded_second(mid, ids, gates, buffer, table, self.numbers, biases[1])  # type: ignore[no-any-return]

    def matmul(self, x: Float[Tensor, "M K"], e: int) -> Float[Tensor, "M N"]:
        """x times the transpose of the only matrix (e = 0)."""
        return ops.coded_linear(x, self.buffer, self.table, self.numbers)  # type: ignore[no-any-return]

    def expand(self, e: int, i: int = 0) -> Float[Tensor, "N K"]:
        """Matrix i (first, second) of expert e in floating point; decoded by the CPU."""
        which = range(self.first) if i == 0 else (self.first,)
        with torch.device("cpu"):  # also where another device is torch's default
            parts = [stored_codes(self.arena, j, e).dequantize()[0] for j in which]
        return torch.cat(parts).to(self.buffer.device, self.dtype)

    def packed_bytes(self) -> int:
        """Bytes of the codes and their scales."""
        return int(self.buffer.nbytes)

    def nbytes(self) -> int:
        return self.arena.nbytes()

    def extra_repr(self) -> str:
        return str(self.arena)
