"""Products with EXL3's codes by the kernels in C (csrc/trellis_run.c), and the same as torch custom
ops, so that torch.compile keeps a model in codes in one graph.

A stack travels as its tensors, three of every part (trellis, suh, svh), and three integers of every
part (`describe`). Without the kernels, and where it is asked for (exact), the matrix that is
multiplied with is expanded in floating point.
"""

import ctypes
from collections.abc import Sequence
from functools import cache

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from qmoe.format.exl3 import CODEBOOKS, Codebook, codebook_values
from qmoe.format.trellis import BLOCK, Codes
from qmoe.kernels.activation import Activation
from qmoe.kernels.cpu.layout import TYPES
from qmoe.kernels.cpu.library import library, tier
from qmoe.kernels.cpu.ops import ACTIVATIONS, define
from qmoe.kernels.moe import Biases

_I, _P, _F = ctypes.c_int64, ctypes.c_void_p, ctypes.c_float
FIELDS = 3  # tensors of a part, and integers
Coded = tuple[Sequence[Tensor], Sequence[int]]  # tensors and integers of a stack's parts


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


def describe(n: int, k: int, codebook: Codebook) -> list[int]:
    """The integers of a part."""
    return [n, k, CODEBOOKS.index(codebook)]


def rows_of(numbers: Sequence[int]) -> int:
    """Rows of the matrices of a stack."""
    return sum(numbers[::FIELDS])


def stored(stack: Coded, e: int) -> list[Codes]:
    """The parts of matrix e as they are stored."""
    tensors, numbers = stack
    found = []
    for at in range(0, len(numbers), FIELDS):
        trellis, suh, svh = (tensor[e : e + 1] for tensor in tensors[at : at + FIELDS])
        n, k, codebook = numbers[at : at + FIELDS]
        found.append(Codes(trellis.transpose(1, 2), suh, svh, CODEBOOKS[codebook], n, k))
    return found


def expanded(stack: Coded, e: int) -> Float[Tensor, "N K"]:
    """Matrix e in float32."""
    return torch.cat([codes.dequantize()[0] for codes in stored(stack, e)])


def routed_experts_now(
    x: Float[Tensor, "T H"],
    ids: Int[Tensor, "T A"],
    gates: Float[Tensor, "T A"],
    first: Coded,
    second: Coded,
    between: Activation,
    biases: Biases,
) -> Float[Tensor, "T H2"]:
    """y[t] = sum over a of gates[t, a] * second[e] @ between(first[e] @ x[t]), e = ids[t, a]; ids
    outside of [0, E) are no expert. biases: [E, N] and [E, H2]. MemoryError."""
    x, ids = x.contiguous(), ids.to(torch.int64).contiguous()
    gates, out = gates.float().contiguous(), x.new_empty(len(x), rows_of(second[1]))
    kept = [None if b is None else b.float().contiguous() for b in biases]
    parts = _structs(first, kept[0])
    call = CallStruct(
        x.data_ptr(), out.data_ptr(), ids.data_ptr(), gates.data_ptr(), *ids.shape, -1,
        TYPES[x.dtype], ACTIVATIONS.index(between.name), torch.get_num_threads(),
        len(first[0][0]), len(parts), 1, between.alpha, between.limit,
        (CodedStruct * 2)(*parts), _structs(second, kept[1])[0],
    )  # fmt: skip
    _run(call)
    return out


def linear_now(x: Float[Tensor, "M K"], e: int, stack: Coded, exact: bool) -> Tensor:
    """x times the transpose of matrix e, in the dtype of x."""
    if exact:
        return x @ expanded(stack, e).to(x.dtype).T
    x = x.contiguous()
    out, parts = x.new_empty(len(x), rows_of(stack[1])), _structs(stack, None)
    call = CallStruct(
        x.data_ptr(), out.data_ptr(), None, None, len(x), 1, e, TYPES[x.dtype], 0,
        torch.get_num_threads(), len(stack[0][0]), len(parts), 0, 0.0, 0.0,
        (CodedStruct * 2)(*parts),
    )  # fmt: skip
    _run(call)
    return out


def each_now(
    x: Float[Tensor, "P K"], ids: Int[Tensor, " P"], stack: Coded, exact: bool
) -> Float[Tensor, "P N"]:
    """Every row times the matrix of its own expert; zeros where there is none."""
    out = x.new_zeros(len(x), rows_of(stack[1]))
    for e in ids.unique().tolist():
        if 0 <= e < len(stack[0][0]):
            rows = torch.where(ids == e)[0]
            out[rows] = linear_now(x[rows], e, stack, exact)
    return out


def _structs(stack: Coded, bias: Tensor | None) -> list[CodedStruct]:
    """The parts of a stack as C takes them, valid as long as its tensors are."""
    tensors, numbers = stack
    out = []
    for at in range(0, len(numbers), FIELDS):
        trellis, suh, svh = tensors[at : at + FIELDS]
        n, k, codebook = numbers[at : at + FIELDS]
        table, step, offset = code_table(CODEBOOKS[codebook])
        out.append(CodedStruct(
            trellis.data_ptr(), suh.data_ptr(), svh.data_ptr(), table.data_ptr(),
            None if bias is None else bias.data_ptr(), n, k, svh.shape[1], suh.shape[1],
            trellis.shape[-1] // 8, CODEBOOKS[codebook] == "mul1", step, offset,
        ))  # fmt: skip
    return out


def _run(call: CallStruct) -> None:
    lib, number = library(), tier()
    assert lib is not None and number is not None
    lib.qmoe_run_coded.argtypes = [ctypes.c_int, ctypes.POINTER(CallStruct)]
    if lib.qmoe_run_coded(number, call):
        raise MemoryError("the CPU kernels could not allocate their buffers")


define(
    "cpu_coded_experts",
    "Tensor x, Tensor ids, Tensor gates, Tensor[] first, int[] first_numbers, Tensor[] second, "
    "int[] second_numbers, str activation, float alpha, float limit, Tensor? first_bias, "
    "Tensor? second_bias",
    lambda x, ids, gates, a, a_numbers, b, b_numbers, name, alpha, limit, *biases:
        routed_experts_now(
            x, ids, gates, (a, a_numbers), (b, b_numbers), Activation(name, alpha, limit), biases
        ),
    lambda x, ids, gates, a, a_numbers, b, b_numbers, *rest:
        x.new_empty(x.shape[0], rows_of(b_numbers)),
)  # fmt: skip
define(
    "cpu_coded_linear",
    "Tensor x, int e, Tensor[] stack, int[] numbers, bool exact",
    lambda x, e, stack, numbers, exact: linear_now(x, e, (stack, numbers), exact),
    lambda x, e, stack, numbers, exact: x.new_empty(x.shape[0], rows_of(numbers)),
)
define(
    "cpu_coded_each",
    "Tensor x, Tensor ids, Tensor[] stack, int[] numbers, bool exact",
    lambda x, ids, stack, numbers, exact: each_now(x, ids, (stack, numbers), exact),
    lambda x, ids, stack, numbers, exact: x.new_empty(x.shape[0], rows_of(numbers)),
)
routed_experts = torch.ops.qmoe.cpu_coded_experts.default
linear = torch.ops.qmoe.cpu_coded_linear.default
each = torch.ops.qmoe.cpu_coded_each.default

assert BLOCK == 128  # SPAN of csrc/trellis_run.c
