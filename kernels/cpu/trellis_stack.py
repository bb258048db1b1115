"""Matrices in EXL3's codes as a model on a CPU holds them: the checkpoint's bytes, and products
with them by the kernels in C (trellis_ops.py).

Inputs are scaled and rotated, and rounded to 8 bits per token and 32 features; blocks of 16 outputs
are expanded to 8 bits for all rows of an expert at once. With `exact`, and without the kernels, the
matrix that is multiplied with is expanded in floating point, which is many times slower.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from qmoe.format.trellis import Trellis
from qmoe.kernels.activation import Activation
from qmoe.kernels.cpu import trellis_ops as ops
from qmoe.kernels.cpu.library import tier
from qmoe.kernels.moe import Biases, moe_forward

TENSORS = ("trellis", "suh", "svh")


class TrellisStack(nn.Module):
    """The coded matrices of an experts module, first and second [E, N, K], or the one of a linear
    (E = 1). Buffers only."""

    def __init__(
        self,
        stacks: Sequence[Trellis],
        dtype: torch.dtype,
        activation: Activation | None = None,
        exact: bool = False,
    ):
        """dtype: that the model runs in. activation: the one that is fused between the two."""
        super().__init__()
        self.scheme, self.dtype, self.activation = stacks[0].scheme, dtype, activation
        self.exact = exact or dtype == torch.float32 or tier() is None
        self.numbers = [
            [number for part in s.parts for number in ops.describe(part.n, part.k, part.codebook)]
            for s in stacks
        ]
        self.shapes = [
            (len(s.scale), sum(part.n for part in s.parts), s.parts[0].k) for s in stacks
        ]
        for i, stack in enumerate(stacks):
            for p, part in enumerate(stack.parts):
                # Tiles that share their outputs one behind the other, as a product reads them.
                tensors = (part.trellis.transpose(1, 2), part.suh, part.svh)
                for name, tensor in zip(TENSORS, tensors, strict=True):
                    self.register_buffer(f"{name}{i}{p}", tensor.contiguous(), persistent=False)

    def _coded(self, i: int) -> ops.Coded:
        """Stack i as the products take it."""
        parts = range(len(self.numbers[i]) // ops.FIELDS)
        return [self.get_buffer(f"{name}{i}{p}") for p in parts for name in TENSORS], self.numbers[
            i
        ]

    def experts(
        self,
        x: Float[Tensor, "T H"],
        ids: Int[Tensor, "T A"],
        gates: Float[Tensor, "T A"],
        activation: Callable[[Tensor], Tensor],
        biases: Biases = (None, None),
    ) -> Float[Tensor, "T H2"]:
        """As moe.Experts."""
        known, compiling = self.activation, torch.compiler.is_compiling()
        if known is not None and not self.exact:
            first, second = self._coded(0), self._coded(1)
            if not compiling:
                return ops.routed_experts_now(x, ids, gates, first, second, known, biases)
            return ops.routed_experts(  # type: ignore[no-any-return]
                x, ids, gates, *first, *second, known.name, known.alpha, known.limit, *biases
            )
        if compiling:
            return self._each(x, ids, gates, activation, biases)
        return moe_forward(x, ids, gates, _One(self, 0), _One(self, 1), activation, biases)

    def _each(
        self,
        x: Tensor,
        ids: Tensor,
        gates: Tensor,
        activation: Callable[[Tensor], Tensor],
        biases: Biases,
    ) -> Tensor:
        """`moe_forward` as operations whose shapes do not depend on the ids."""
        T, A = ids.shape
        E, flat = self.shapes[0][0], ids.reshape(-1)
        here = (flat >= 0) & (flat < E)
        expert = torch.where(here, flat, 0)
        y = x.repeat_interleave(A, 0)
        for i, bias in enumerate(biases):
            y = ops.each(y, flat, *self._coded(i), self.exact)
            y = y if bias is None else y + bias[expert]
            y = activation(y) if i == 0 else y
        weight = torch.where(here, gates.reshape(-1).float(), 0.0)
        return (y.float() * weight[:, None]).view(T, A, -1).sum(1).to(x.dtype)

    def matmul(self, x: Float[Tensor, "M K"], e: int, i: int = 0) -> Float[Tensor, "M N"]:
        """x times the transpose of matrix e of stack i, in the dtype of x."""
        if torch.compiler.is_compiling():
            return ops.linear(x, e, *self._coded(i), self.exact)  # type: ignore[no-any-return]
        return ops.linear_now(x, e, self._coded(i), self.exact)

    def expand(self, e: int, i: int = 0) -> Float[Tensor, "N K"]:
        """Matrix e of stack i in floating point."""
        return ops.expanded(self._coded(i), e).to(self.dtype)

    def packed_bytes(self) -> int:
        """Bytes of the codes alone."""
        return sum(b.nbytes for name, b in self.named_buffers() if name.startswith("trellis"))

    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in self.buffers())

    def extra_repr(self) -> str:
        sizes = ", ".join(str(list(shape)) for shape in self.shapes)
        return f"{sizes}, {self.scheme}, {'exact' if self.exact else 'int8 activations'}"


class _One:
    """One of the two stacks of an experts module, for `moe_forward`."""

    def __init__(self, both: TrellisStack, i: int):
        self.both, self.i, self.shape = both, i, both.shapes[i]

    def matmul(self, x: Tensor, e: int) -> Tensor:
        return self.both.matmul(x, e, self.i)
