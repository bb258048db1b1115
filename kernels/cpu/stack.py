"""Packed matrices inside a model on a CPU: what experts modules and packed linears hold there if
the C kernels are installed."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from qmoe.config import Scheme
from qmoe.format.grid import dequantize
from qmoe.format.packing import StoredWords
from qmoe.format.quantized import Quantized
from qmoe.kernels.activation import Activation
from qmoe.kernels.cpu import ops
from qmoe.kernels.cpu.layout import Packed, Shape, code_bytes, pack, scheme_of, unpack
from qmoe.kernels.cpu.library import StackStruct, tier
from qmoe.kernels.moe import Biases

Matrices = Quantized | StoredWords | Sequence[Quantized | StoredWords]


def uses_cpu_kernels(device: torch.device) -> bool:
    """Whether packed weights on this device go through the C kernels. Says so once, on standard
    error, if they would but are not installed. ConfigError: see library.tier."""
    return device.type == "cpu" and tier() is not None


class CpuStack(nn.Module):
    """The matrices of an experts module, or the one of a linear, for the C kernels. Buffers only.

    Activations are rounded to 8 bits per token and 32 features; with `exact` they are taken as
    they are and summed in float32. Models in float32 are exact: who asks for float32 asks for that.
    """

    def __init__(
        self,
        stacks: Sequence[Matrices | Packed],
        dtype: torch.dtype,
        activation: Activation | None = None,
        exact: bool | None = None,
    ):
        """stacks: the matrices of an experts module [E, N, K], first and second, or the one of a
        linear (E = 1); each may be a list of stacks of fewer experts, whose bits may differ, or
        packed already (the first one paired if an activation is fused).
        activation: the fused one between them, None for the unfused path."""
        super().__init__()
        self.activation = activation
        self.exact = dtype == torch.float32 if exact is None else exact
        self.scheme = _scheme(stacks[0])
        self.shapes: list[Shape] = []
        for i, stack in enumerate(stacks):
            packed = _packed(stack, dtype, paired=activation is not None and i == 0)
            self.shapes.append(packed.shape)
            self.register_buffer(f"buffer{i}", packed.buffer, persistent=False)
            self.register_buffer(f"table{i}", packed.table, persistent=False)
        self.numbers = [shape.numbers() for shape in self.shapes]
        self._known: tuple[Tensor, Tensor, StackStruct] | None = None

    def matrix(self, i: int) -> tuple[Tensor, Tensor, list[int]]:
        """Matrix i (first, second) of all experts as the ops take it: buffer, table, numbers."""
        return self._buffers[f"buffer{i}"], self._buffers[f"table{i}"], self.numbers[i]  # type: ignore[return-value]

    def packed(self, i: int) -> Packed:
        """Matrix i (first, second) of all experts."""
        buffer, table, _ = self.matrix(i)
        return Packed(self.shapes[i], buffer, table)

    def experts(
        self,
        x: Float[Tensor, "T H"],
        ids: Int[Tensor, "T A"],
        gates: Float[Tensor, "T A"],
        activation: Callable[[Tensor], Tensor],
        biases: Biases = (None, None),
    ) -> Float[Tensor, "T H2"]:
        """As moe.Experts."""
        first, second, known = self.matrix(0), self.matrix(1), self.activation
        if not torch.compiler.is_compiling():
            if known is not None:
                return ops.routed_experts_now(
                    x, ids, gates, first, second, known, biases, self.exact
                )
            mid = activation(ops.first_product_now(x, ids, first, biases[0], self.exact))
            return ops.second_product_now(mid, ids, gates, second, biases[1], self.exact)
        if known is not None:
            return ops.routed_experts(  # type: ignore[no-any-return]
                x, ids, gates, *first, *second, known.name, known.alpha, known.limit, *biases,
                self.exact,
            )  # fmt: skip
        mid = activation(ops.first_product(x, ids, *first, biases[0], self.exact))
        return ops.second_product(mid, ids, gates, *second, biases[1], self.exact)  # type: ignore[no-any-return]

    def matmul(self, x: Float[Tensor, "M K"], e: int) -> Float[Tensor, "M N"]:
        """x times the transpose of matrix e of the only stack."""
        if torch.compiler.is_compiling():
            return ops.linear(x, e, *self.matrix(0), self.exact)  # type: ignore[no-any-return]
        return ops.linear_now(x, e, self.only(), self.exact)

    def only(self) -> StackStruct:
        """The only stack as C takes it, made anew when other tensors have taken its place."""
        buffer, table, numbers = self.matrix(0)
        if self._known is None or self._known[0] is not buffer or self._known[1] is not table:
            self._known = buffer, table, ops.stack_struct(buffer, table, numbers)
        return self._known[2]

    def __getstate__(self) -> dict[str, Any]:
        """Without addresses, which a copy must not have."""
        return {**self.__dict__, "_known": None}

    def expand(self, e: int, i: int = 0) -> Float[Tensor, "N K"]:
        """Matrix i (first, second) of expert e in floating point."""
        weight: Tensor = dequantize(unpack(self.packed(i), e))[0]
        return weight.to(self.shapes[i].dtype)

    def packed_bytes(self) -> int:
        """Bytes of packed integers, padding to whole blocks included."""
        return sum(code_bytes(self.packed(i)) for i in range(len(self.shapes)))

    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in self.buffers())

    def extra_repr(self) -> str:
        experts = len(self.matrix(0)[1])
        sizes = ", ".join(f"[{experts}, {s.n}, {s.k}]" for s in self.shapes)
        return f"{sizes}, {'exact' if self.exact else 'int8 activations'}"


def _packed(stack: Matrices | Packed, dtype: torch.dtype, paired: bool) -> Packed:
    if isinstance(stack, Packed):
        return stack
    return pack([stack] if isinstance(stack, Quantized | StoredWords) else stack, dtype, paired)


def _scheme(stack: Matrices | Packed) -> Scheme:
    """Of the first matrix."""
    if isinstance(stack, Packed):
        return scheme_of(stack, 0)
    return stack.scheme if isinstance(stack, Quantized | StoredWords) else stack[0].scheme
