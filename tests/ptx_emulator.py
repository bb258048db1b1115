"""The few PTX instructions that kernels/device emits, on numpy words, bit for bit.

`run` executes one block; `teach` makes Triton's interpreter execute inline PTX with it, and compute
in bfloat16, so that whole kernels run as they are compiled for a GPU.

Anything else is an error: an instruction, modifier or operand it does not know, a register that was
not declared or not written, an input that is read after an output was written (the compiler may
give both the same register), a float result that would have to be rounded more than once.
"""

import re
from types import SimpleNamespace

import numpy as np
import pytest
import triton.language as tl
from numpy.typing import NDArray
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

Words = NDArray[np.uint32]
REGISTER = re.compile(r"[a-z]\w*")


def run(asm: str, *inputs: Words) -> tuple[Words, Words]:
    """$0 and $1 of one block of inline PTX; the inputs are $2, $3, ..., words of equal shape."""
    body = re.fullmatch(r"\{ \.reg \.b32 ([\w,]+);(.*)\}", asm)
    if body is None:
        raise ValueError(f"not a block with its registers: {asm}")
    shape = inputs[0].shape
    values: dict[str, Words] = {f"${i + 2}": word for i, word in enumerate(inputs)}
    writable = {*body[1].split(","), "$0", "$1"}

    def read(operand: str) -> Words:
        if operand in values:
            return values[operand]
        if operand.startswith("$") or REGISTER.fullmatch(operand):
            raise ValueError(f"{operand} is read but was never written: {asm}")
        return np.full(shape, int(operand, 0), np.uint32)

    for statement in filter(None, (s.strip() for s in body[2].split(";"))):
        name, _, rest = statement.partition(" ")
        target, *operands = (o.strip() for o in rest.split(","))
        if target not in writable:
            raise ValueError(f"{target} was not declared: {statement}")
        values[target] = _execute(name, [read(o) for o in operands])
        if target.startswith("$"):
            values = {n: v for n, v in values.items() if n in writable}
    return values["$0"], values["$1"]


def _execute(name: str, a: list[Words]) -> Words:
    wanted = {
        "mov": 1,
        "mul": 2,
        "mad": 3,
        "dp4a": 3,
        "add": 2,
        "shr": 2,
        "shl": 2,
        "and": 2,
        "sub": 2,
        "prmt": 3,
        "fma": 3,
        "lop3": 4,
    }
    if len(a) != wanted.get(name.partition(".")[0]):
        raise ValueError(f"{name} with {len(a)} operands")
    match name:
        case "mov.b32":
            return a[0].copy()
        case "shr.u32":
            return a[0] >> _below(32, a[1])
        case "shl.b32":
            return a[0] << _below(32, a[1])
        case "and.b32":
            return a[0] & a[1]
        case "lop3.b32":
            return _lop3(a[0], a[1], a[2], int(a[3].flat[0]))
        case "prmt.b32":
            return _prmt(a[0], a[1], int(a[2].flat[0]))
        case "mul.lo.u32":
            return a[0] * a[1]
        case "mad.lo.u32":
            return a[0] * a[1] + a[2]
        case "dp4a.u32.u32":
            bytes_of = [
                [word >> np.uint32(8 * i) & np.uint32(255) for i in range(4)] for word in a[:2]
            ]
            return sum((x * y for x, y in zip(*bytes_of, strict=True)), a[2].copy())
        case "add.f16x2":
            return _halves(lambda x, y: _to_fp16(_fp16(x) + _fp16(y)), a)
        case "fma.rn.f16x2":
            return _halves(lambda x, y, z: _to_fp16(_fp16(x) * _fp16(y) + _fp16(z)), a)
        case "sub.f16x2":
            return _halves(lambda x, y: _to_fp16(_fp16(x) - _fp16(y)), a)
        case "fma.rn.bf16x2":
            return _halves(lambda x, y, z: _to_bf16(_bf16(x) * _bf16(y) + _bf16(z)), a)
    raise ValueError(f"unknown instruction {name}")


def _below(limit: int, amount: Words) -> Words:
    if (amount >= limit).any():
        raise ValueError(f"shift by {amount.max()}")
    return amount


def _lop3(a: Words, b: Words, c: Words, table: int) -> Words:
    """Bit i of `table` is the result where the bits of a, b, c spell i."""
    result = np.zeros_like(a)
    for i in range(8):
        if table >> i & 1:
            term = (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
            result |= term
    return result


def _prmt(a: Words, b: Words, selector: int) -> Words:
    """Byte i of the result is the byte of b:a that nibble i names, or eight copies of its sign."""
    if selector >> 16:
        raise ValueError(f"prmt selector {selector:#x}")
    both = [word >> np.uint32(8 * i) & np.uint32(255) for word in (a, b) for i in range(4)]
    result = np.zeros_like(a)
    for i in range(4):
        nibble = selector >> 4 * i & 15
        byte = both[nibble & 7]
        if nibble & 8:
            byte = (byte >> np.uint32(7)) * np.uint32(255)
        result |= byte << np.uint32(8 * i)
    return result


def _halves(operation, words: list[Words]) -> Words:
    low = operation(*(w & np.uint32(0xFFFF) for w in words))
    high = operation(*(w >> np.uint32(16) for w in words))
    return low | high << np.uint32(16)


def halves_of(word: Words, dtype: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The two numbers in a word, the low half first."""
    convert = {"fp16": _fp16, "bf16": _bf16}[dtype]
    return convert(word & np.uint32(0xFFFF)), convert(word >> np.uint32(16))


def _fp16(bits: Words) -> NDArray[np.float64]:
    return bits.astype(np.uint16).view(np.float16).astype(np.float64)


def _bf16(bits: Words) -> NDArray[np.float64]:
    return (bits << np.uint32(16)).view(np.float32).astype(np.float64)


def _to_fp16(value: NDArray[np.float64]) -> Words:
    return value.astype(np.float16).view(np.uint16).astype(np.uint32)


def _to_bf16(value: NDArray[np.float64]) -> Words:
    """Rounded to nearest even, once: a value that float32 cannot hold is refused."""
    single = value.astype(np.float32)
    if (single.astype(np.float64) != value).any():
        raise ValueError("not exact in float32")
    bits = single.view(np.uint32)
    return bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1)) >> np.uint32(16)


def teach(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inline PTX in the interpreter; bfloat16 sums and products, which it takes for integers'."""

    def inline(self, code, constraints, values, types, pure, pack):
        assert pure and pack == 4
        inputs = [word for value in values for word in _words(value.data)]
        assert constraints == "=r,=r" + ",r" * len(inputs)
        low, high = run(code, *inputs)
        halves = [w >> np.uint32(s) & np.uint32(0xFFFF) for w in (low, high) for s in (0, 16)]
        bits = np.stack(halves, -1).astype(np.uint16).reshape(values[0].data.shape)
        scalar = types[0].scalar
        result = TensorHandle(bits.view(np.float16) if scalar == tl.float16 else bits, scalar)
        return SimpleNamespace(get_result=lambda i: result)

    def in_float32(original, back):
        def operation(self, a, b, *rest):
            if a.dtype.scalar != tl.bfloat16:
                return original(self, a, b, *rest)
            result = original(self, *(self.cast_impl(v, tl.float32) for v in (a, b)), *rest)
            return self.cast_impl(result, tl.bfloat16) if back else result

        return operation

    monkeypatch.setattr(InterpreterBuilder, "create_inline_asm", inline)
    for name in ("create_fadd", "create_fsub", "create_dot"):
        fixed = in_float32(getattr(InterpreterBuilder, name), back=name != "create_dot")
        monkeypatch.setattr(InterpreterBuilder, name, fixed)


def _words(data: NDArray) -> list[Words]:
    """The registers that four neighbours along the last axis arrive in."""
    fields = data.reshape(-1, 4).view(f"u{data.itemsize}").astype(np.uint32)
    per_word, shift = 4 // data.itemsize, 8 * data.itemsize
    return [
        sum(fields[:, at + i] << np.uint32(shift * i) for i in range(per_word))
        for at in range(0, 4, per_word)
    ]
