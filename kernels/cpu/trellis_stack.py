"""Matrices in EXL3's codes as a model on a CPU holds them: the checkpoint's bytes, and products
with them by the kernels in C (csrc/trellis_run.c).

Inputs are scaled and rotated, and rounded to 8 bits per token and 32 features; blocks of 16 outputs
are expanded to 8 bits for all rows of an expert at once. With `exact`, and without the kernels, the
matrix that is multiplied with is expanded in floating point, which is many times slower.
"""

import ctypes
from collections.abc import Callable, Sequence
from functools import cache

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from qmoe.format.exl3 import Codebook, codebook_values
from qmoe.format.trellis import BLOCK, Codes, Trellis
from qmoe.kernels.activation import Activation
from qmoe.kernels.cpu.layout import TYPES
from qmoe.kernels.cpu.library import library, tier
from qmoe.kernels.cpu.ops import ACTIVATIONS
from qmoe.kernels.moe import Biases, moe_forward

_I, _P, _F = ctypes.c_int64, ctypes.c_void_p, ctypes.c_float
TENSORS = ("trellis", "suh", "svh")


class CodedStruct(ctypes.Structure):
    """`Coded` of csrc/trellis_run.h."""

    _fields_ = [
        ("trellis", _P), ("suh", _P), ("svh", _P), ("table", _P), ("bias", _P),
        ("n", _I), ("k", _I), ("wide_n", _I), ("wide_k", _I), ("twice", _I), ("fast", _I),
        ("step", _F), ("offset", _F),
    ]  # fmt: skip


class CallStruct(ctypes.Structure):
    """`CodedCall` of csrc/trellis_run.h."""

    _fields_ = [
        ("x", _P), ("out", _P), ("ids", _P), ("gates", _P), ("tokens", _I), ("choices", _I),
        ("only", _I), ("type", _I), ("activation", _I), ("threads", _I), ("experts", _I),
        ("parts", _I), ("has_second", _I), ("alpha", _F), ("limit", _F),
        ("first", CodedStruct * 2), ("second", CodedStruct),
    ]  # fmt: skip


@cache
def code_table(codebook: Codebook) -> tuple[UInt8[Tensor, " 65536"], float, float]:
    """The 8-bit code of every state, and the step and offset of what codes stand for:
    step * (code - 128) + offset. For mul1 a code is (n + 2) / 4 of the byte sum n, rounded down."""
    values = codebook_values(codebook)
    if codebook == "mul1":
        # Values are k n + b; 4 codes - n is half a unit on average.
        k, b = 0.006767272949, 1024 * 0.006767272949 - 10.3828125
        total = ((values + 3.4530911) / k).round()
        code = ((total + 2) / 4).floor()
        return code.to(torch.uint8), 4 * k, 512 * k - 0.5 * k + b
    step = float(values.abs().max()) / 127
    return ((values / step).round() + 128).to(torch.uint8), step, 0.0


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
        self.kinds = [[(part.codebook, part.n, part.k) for part in s.parts] for s in stacks]
        self.shapes = [
            (len(s.scale), sum(part.n for part in s.parts), s.parts[0].k) for s in stacks
        ]
        for i, stack in enumerate(stacks):
            for p, part in enumerate(stack.parts):
                # Tiles that share their outputs one behind the other, as a product reads them.
                tensors = (part.trellis.transpose(1, 2), part.suh, part.svh)
                for name, tensor in zip(TENSORS, tensors, strict=True):
                    self.register_buffer(f"{name}{i}{p}", tensor.contiguous(), persistent=False)

    def _codes(self, i: int, p: int, e: int) -> Codes:
        """Part p of matrix e of stack i as it is stored."""
        trellis, suh, svh = (self.get_buffer(f"{name}{i}{p}")[e : e + 1] for name in TENSORS)
        return Codes(trellis.transpose(1, 2), suh, svh, *self.kinds[i][p])

    def _structs(self, i: int, bias: Tensor | None) -> list[CodedStruct]:
        """The matrices of stack i as C takes them."""
        out = []
        for p, (codebook, n, k) in enumerate(self.kinds[i]):
            trellis, suh, svh = (self.get_buffer(f"{name}{i}{p}") for name in TENSORS)
            table, step, offset = code_table(codebook)
            out.append(CodedStruct(
                trellis.data_ptr(), suh.data_ptr(), svh.data_ptr(), table.data_ptr(),
                None if bias is None else bias.data_ptr(), n, k, svh.shape[1], suh.shape[1],
                trellis.shape[-1] // 8, codebook == "mul1", step, offset,
            ))  # fmt: skip
        return out

    def experts(
        self,
        x: Float[Tensor, "T H"],
        ids: Int[Tensor, "T A"],
        gates: Float[Tensor, "T A"],
        activation: Callable[[Tensor], Tensor],
        biases: Biases = (None, None),
    ) -> Float[Tensor, "T H2"]:
        """The routed experts; `activation` is called if it could not be fused. biases: [E, N] and
        [E, H2]."""
        if self.exact or self.activation is None:
            first, second = _One(self, 0), _One(self, 1)
            return moe_forward(x, ids, gates, first, second, activation, biases)
        x, ids = x.contiguous(), ids.to(torch.int64).contiguous()
        gates, out = gates.float().contiguous(), x.new_empty(len(x), self.shapes[1][1])
        kept = [None if b is None else b.float().contiguous() for b in biases]
        call = CallStruct(
            x.data_ptr(), out.data_ptr(), ids.data_ptr(), gates.data_ptr(), *ids.shape, -1,
            TYPES[x.dtype], ACTIVATIONS.index(self.activation.name), torch.get_num_threads(),
            self.shapes[0][0], len(self.kinds[0]), 1, self.activation.alpha, self.activation.limit,
            (CodedStruct * 2)(*self._structs(0, kept[0])), self._structs(1, kept[1])[0],
        )  # fmt: skip
        _run(call)
        return out

    def matmul(self, x: Float[Tensor, "M K"], e: int, i: int = 0) -> Float[Tensor, "M N"]:
        """x times the transpose of matrix e of stack i, in the dtype of x."""
        if self.exact:
            return x @ self.expand(e, i).to(x.dtype).T
        x, (E, n, _) = x.contiguous(), self.shapes[i]
        out = x.new_empty(len(x), n)
        parts = self._structs(i, None)
        call = CallStruct(
            x.data_ptr(), out.data_ptr(), None, None, len(x), 1, e, TYPES[x.dtype], 0,
            torch.get_num_threads(), E, len(parts), 0, 0.0, 0.0, (CodedStruct * 2)(*parts),
        )  # fmt: skip
        _run(call)
        return out

    def expand(self, e: int, i: int = 0) -> Float[Tensor, "N K"]:
        """Matrix e of stack i in floating point."""
        parts = [self._codes(i, p, e) for p in range(len(self.kinds[i]))]
        return torch.cat([codes.dequantize()[0] for codes in parts]).to(self.dtype)

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


def _run(call: CallStruct) -> None:
    lib, number = library(), tier()
    assert lib is not None and number is not None
    lib.qmoe_run_coded.argtypes = [ctypes.c_int, ctypes.POINTER(CallStruct)]
    if lib.qmoe_run_coded(number, call):
        raise MemoryError("the CPU kernels could not allocate their buffers")


assert BLOCK == 128  # SPAN of csrc/trellis_run.c
