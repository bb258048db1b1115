"""A stack of packed matrices as it lives in memory at run time, and the product with one of them.

This is the seam between the model and the kernels: everything above calls `matmul`, everything
below picks how. Three forms, all of them packed:

    int4     torch's own CPU int4 kernel: 4 bits, bfloat16, groups of 32-256, N a multiple of 16
    int8     torch's own CPU int8 kernel: 8 bits, symmetric, one scale per channel, bfloat16
    plain    the checkpoint's bytes; one matrix at a time is expanded when it is used

torch's kernels run in scalar code for float32 and float16 activations on CPUs, 20 to 80 times
slower than expanding and multiplying, so those dtypes take the plain form.
"""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from qmoe.format.packing import pack_rows
from qmoe.format.quantized import Quantized
from qmoe.kernels.unpack import unpack_bytes

Form = Literal["int4", "int8", "plain"]
INT4_GROUPS = (256, 128, 64, 32)
# Rows from which converting int8 weights once and using the dense product beats the int8 kernel.
INT8_DENSE_ROWS = 16


def choose_form(quantized: Quantized, dtype: torch.dtype, device: torch.device) -> Form:
    """The fastest form that can hold this stack's integers as they are."""
    scheme, (_, n, k) = quantized.scheme, quantized.q.shape
    if device.type != "cpu" or dtype != torch.bfloat16:
        return "plain"
    if scheme.bits == 4 and n % 16 == 0 and _int4_group(k, quantized.scale.shape[-1]):
        return "int4"
    # torch's int8 kernel reads past the end of rows that are no multiple of 16 long.
    if scheme.bits == 8 and scheme.symmetric and quantized.scale.shape[-1] == 1 and k % 16 == 0:
        return "int8"
    return "plain"


def _int4_group(k: int, groups: int) -> int:
    """Largest group the int4 kernel takes that divides the stack's own group; 0 if none does."""
    return next((g for g in INT4_GROUPS if (k // groups) % g == 0), 0)


class PackedStack(nn.Module):
    """Packed matrices [E, N, K]. Buffers only; nothing here is ever trained or saved."""

    packed: Tensor
    scale: Tensor
    zero: Tensor | None

    def __init__(self, quantized: Quantized, dtype: torch.dtype):
        super().__init__()
        self.scheme = quantized.scheme
        self.shape = tuple(quantized.q.shape)
        self.form: Form = choose_form(quantized, dtype, quantized.q.device)
        scale, zero = quantized.scale.to(dtype), quantized.zero
        if self.form == "int4":
            self.group = _int4_group(self.shape[2], scale.shape[-1])
            self._keep("packed", _int4pack(quantized.q))
            self._keep("scale", _scale_and_offset(quantized, self.group, dtype))
        elif self.form == "int8":
            self._keep("packed", quantized.q)
            self._keep("scale", scale[..., 0].contiguous())
        else:
            self._keep("packed", pack_rows(quantized.q, self.scheme.bits).view(torch.uint8))
            self._keep("scale", scale)
            self._keep("zero", zero)

    def _keep(self, name: str, tensor: Tensor | None) -> None:
        self.register_buffer(name, tensor, persistent=False)

    def matmul(self, x: Float[Tensor, "M K"], e: int) -> Float[Tensor, "M N"]:
        """x @ W[e].T, in the dtype of x (the one the stack was made for)."""
        if self.form == "int4":
            return torch.ops.aten._weight_int4pack_mm_for_cpu(  # type: ignore[no-any-return]
                x.contiguous(), self.packed[e], self.group, self.scale[e]
            )
        if self.form == "int8" and len(x) < INT8_DENSE_ROWS:
            return torch.ops.aten._weight_int8pack_mm(x, self.packed[e], self.scale[e])  # type: ignore[no-any-return]
        if self.form == "int8":
            return (x @ self.packed[e].to(x.dtype).T) * self.scale[e]
        return x @ self.expand(e).T

    def expand(self, e: int) -> Float[Tensor, "N K"]:
        """Matrix e in the floating dtype of the scales."""
        if self.form == "int8":
            return self.packed[e].to(self.scale.dtype) * self.scale[e][:, None]
        if self.form == "int4":
            # The packed order is torch's secret: multiply by the identity to see the weights.
            return self.matmul(torch.eye(self.shape[2], dtype=self.scale.dtype), e).T
        q = unpack_bytes(self.packed[e], self.scheme.bits, self.shape[2]).to(self.scale.dtype)
        q = q.unflatten(-1, (self.scale.shape[-1], -1))
        if self.zero is not None:
            q = q - self.zero[e][..., None]
        weight: Tensor = (q * self.scale[e][..., None]).flatten(-2)
        return weight

    def packed_bytes(self) -> int:
        """Bytes of the packed integers alone."""
        return self.packed.nbytes

    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in self.buffers())

    def extra_repr(self) -> str:
        return f"{list(self.shape)}, {self.scheme}, form={self.form}"


class MixedStack(nn.Module):
    """Packed matrices [E, N, K] of different widths: each in the form that suits it."""

    def __init__(self, quantized: Quantized, dtype: torch.dtype):
        super().__init__()
        self.scheme, self.shape = quantized.scheme, tuple(quantized.q.shape)
        self.each = nn.ModuleList(PackedStack(one, dtype) for one in quantized.matrices())

    def matmul(self, x: Float[Tensor, "M K"], e: int) -> Float[Tensor, "M N"]:
        """x times the transpose of matrix e."""
        return self.each[e].matmul(x, 0)  # type: ignore[operator, no-any-return]

    def expand(self, e: int) -> Float[Tensor, "N K"]:
        """Matrix e in the floating dtype of the scales."""
        return self.each[e].expand(0)  # type: ignore[operator, no-any-return]

    def packed_bytes(self) -> int:
        """Bytes of the packed integers alone."""
        return sum(one.packed_bytes() for one in self.each)  # type: ignore[operator]

    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in self.buffers())


def packed_stack(quantized: Quantized, dtype: torch.dtype) -> PackedStack | MixedStack:
    """The form of a stack that may be mixed."""
    return MixedStack(quantized, dtype) if quantized.widths else PackedStack(quantized, dtype)


def _int4pack(q: Tensor) -> Tensor:
    """[E, N, K/2] in the order torch's int4 kernel wants (it depends on the CPU)."""
    convert = torch.ops.aten._convert_weight_to_int4pack_for_cpu
    return torch.stack([convert((matrix + 8).to(torch.int32), 1) for matrix in q])


def _scale_and_offset(quantized: Quantized, group: int, dtype: torch.dtype) -> Tensor:
    """[E, K/group, N, 2]: the kernel computes q * scale + offset, so offset = -zero * scale."""
    scale = quantized.scale.float()
    zero = quantized.zero.float() if quantized.zero is not None else torch.zeros_like(scale)
    pair = torch.stack((scale, -zero * scale), dim=-1)  # [E, N, G, 2]
    repeat = quantized.q.shape[2] // scale.shape[-1] // group
    return pair.repeat_interleave(repeat, dim=2).transpose(1, 2).contiguous().to(dtype)
