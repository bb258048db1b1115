"""A stack of matrices in EXL3's codes as a model on a CPU holds it."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from qmoe.format.trellis import Codes, Trellis


class TrellisStack(nn.Module):
    """Coded matrices [E, N, K]. Buffers only: the checkpoint's bytes. A product decodes the matrix
    that it is with."""

    def __init__(self, stack: Trellis, dtype: torch.dtype):
        """dtype: in which matrices are expanded."""
        super().__init__()
        self.scheme, self.dtype = stack.scheme, dtype
        self.kinds = [(part.codebook, part.n, part.k) for part in stack.parts]
        for p, part in enumerate(stack.parts):
            for name, tensor in zip(("trellis", "suh", "svh"), part.tensors(), strict=True):
                self.register_buffer(f"{name}{p}", tensor, persistent=False)
        rows = sum(part.n for part in stack.parts)
        self.shape = (len(stack.scale), rows, stack.parts[0].k)

    def codes(self, e: int) -> list[Codes]:
        """The matrices of expert e, one of each part."""
        found = []
        for p, kind in enumerate(self.kinds):
            tensors = (
                self.get_buffer(f"{name}{p}")[e : e + 1] for name in ("trellis", "suh", "svh")
            )
            found.append(Codes(*tensors, *kind))
        return found

    def matmul(self, x: Float[Tensor, "M K"], e: int) -> Float[Tensor, "M N"]:
        """x times the transpose of matrix e, in the dtype of x."""
        return x @ self.expand(e).to(x.dtype).T

    def expand(self, e: int) -> Float[Tensor, "N K"]:
        """Matrix e in floating point."""
        return torch.cat([codes.dequantize()[0] for codes in self.codes(e)]).to(self.dtype)

    def packed_bytes(self) -> int:
        """Bytes of the codes alone."""
        return sum(b.nbytes for name, b in self.named_buffers() if name.startswith("trellis"))

    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in self.buffers())

    def extra_repr(self) -> str:
        return f"{list(self.shape)}, {self.scheme}"
