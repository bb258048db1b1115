"""Unpacking is exact for every byte and zero point: the PTX, emulated, and its twin in Triton."""

import re

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from helpers import DEVICE
from ptx_emulator import halves_of, run, teach

from qmoe.kernels.device.unpack import ptx, unpack, zero_constant

# Field f of a byte; for three bits a low pair of one plane and a top bit of another.
FIELDS = [(b, f) for b, fields in ((2, 4), (3, 8), (4, 2), (8, 1)) for f in range(fields)]
NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}


def snippets(dtypes):
    """Every unpack: bits, field, dtype, asymmetric."""
    found = []
    for bits, field in FIELDS:
        for dtype in dtypes:
            for asymmetric in (False, True):
                name = f"{bits}-{field}-{NAMES[dtype]}-{'asym' if asymmetric else 'sym'}"
                found.append(pytest.param(bits, field, dtype, asymmetric, id=name))
    return found


def stored(plane, high, bits, field):
    """The unsigned integers that a field of these bytes holds."""
    if bits == 3:
        return (plane >> 2 * (field % 4) & 3) + 4 * (high >> field & 1)
    return plane >> bits * field & (1 << bits) - 1


def count_zeros(bits, dtype):
    """Unsigned zero points in use: 8 bits in bfloat16 have none above 128, the arena sees to it."""
    return 129 if (bits, dtype) == (8, torch.bfloat16) else 1 << bits


def lanes(values, step, modulus):
    """[*, 4]: four values for the lanes of each word, different, so that each lane meets all."""
    return (values[..., None] + step * np.arange(4)) % modulus


def words(byte_lanes):
    shifted = byte_lanes.astype(np.uint32) << np.arange(0, 32, 8, dtype=np.uint32)
    return shifted.sum(-1, dtype=np.uint32)


def row_constants(zero, bits, dtype):
    """The words that `unpack` hands over for zero points [*, 4]."""
    if dtype == torch.float16:
        kinds = [0x6400 | zero]
    elif bits < 8:
        kinds = [0xC300 | zero]
    else:  # -zero and -(128 + zero)
        kinds = [np.float32(-zero).view(np.uint32) >> 16, 0xC300 | zero]
    return [(k[..., i] | k[..., i + 1] << 16).astype(np.uint32) for k in kinds for i in (0, 2)]


@pytest.mark.parametrize(
    "bits, field, dtype, asymmetric", snippets((torch.float16, torch.bfloat16))
)
def test_ptx_is_exact_for_every_byte_and_zero_point(bits, field, dtype, asymmetric):
    """Different bytes and different zero points in the lanes of a word, all of them in each lane;
    for three bits all pairs of bytes."""
    at = np.arange(1 << (16 if bits == 3 else 8))[:, None]
    zeros = np.arange(count_zeros(bits, dtype) if asymmetric else 1)[None, :]
    plane, high = lanes(at & 255, 37, 256), lanes(at >> 8, 91, 256)
    zero = lanes(zeros, 5, zeros.size)
    plane, high, zero = np.broadcast_arrays(plane, high, zero)
    inputs = [words(plane)] + [words(high)] * (bits == 3)
    if asymmetric:
        inputs += row_constants(zero, bits, dtype)
    code = ptx(bits, field, NAMES[dtype], asymmetric)
    outputs = [half for word in run(code, *inputs) for half in halves_of(word, NAMES[dtype])]
    expected = stored(plane, high, bits, field) - (zero if asymmetric else 1 << (bits - 1))
    for lane, got in enumerate(outputs):
        np.testing.assert_array_equal(got, expected[..., lane], f"lane {lane}")
    operands = {int(n) for n in re.findall(r"\$(\d)", code)}
    assert operands == set(range(2 + len(inputs)))


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("bits, field", FIELDS)
def test_a_byte_changes_its_own_output_and_no_other(bits, field, dtype):
    code = ptx(bits, field, dtype, False)
    for lane in range(4):
        plane, high = np.zeros((2, 256, 4), dtype=np.int64)
        plane[:, lane], high[:, lane] = np.arange(256), np.arange(256)[::-1]
        inputs = [words(plane)] + [words(high)] * (bits == 3)
        outputs = [half for word in run(code, *inputs) for half in halves_of(word, dtype)]
        changed = [len(set(got)) > 1 for got in outputs]
        assert changed == [other == lane for other in range(4)]


def test_ptx_is_a_string_in_plain_python():
    assert isinstance(ptx(4, 1, "fp16", False), str)


@triton.jit
def unpack_kernel(
    plane_ptr, high_ptr, zero_ptr, out_ptr, stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BITS: tl.constexpr, FIELD: tl.constexpr,
    ZERO: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    at = tl.arange(0, ROWS)[:, None] * stride + columns[None, :]
    zero = tl.load(zero_ptr + tl.arange(0, ROWS))[:, None]
    plane, high = tl.load(plane_ptr + at), tl.load(high_ptr + at)
    w = unpack(plane, high, zero, BITS, FIELD, out_ptr.dtype.element_ty, ZERO, PTX)
    tl.store(out_ptr + at, w)


def check_unpack(bits, field, dtype, asymmetric, PTX):
    """`unpack` on all bytes (pairs of bytes) in columns, with a zero point per row."""
    at = torch.arange(1 << (16 if bits == 3 else 8))
    zero = torch.arange(1 << bits if asymmetric else 1).clamp(max=count_zeros(bits, dtype) - 1)
    plane, high = ((t % 256).repeat(len(zero), 1) for t in (at, at >> 8))
    out = torch.full(plane.shape, float("nan"), dtype=dtype)
    rows, width = plane.shape
    columns = width if DEVICE.type == "cpu" else 32  # the interpreter likes one large program
    unpack_kernel[(width // columns,)](
        plane.to(torch.uint8), high.to(torch.uint8), zero.to(torch.uint8), out, width,
        ROWS=rows, COLUMNS=columns, BITS=bits, FIELD=field, ZERO=asymmetric, PTX=PTX,
    )  # fmt: skip
    subtract = zero[:, None] if asymmetric else 1 << (bits - 1)
    assert torch.equal(out.double(), (stored(plane, high, bits, field) - subtract).double())


@pytest.mark.parametrize(
    "bits, field, dtype, asymmetric", snippets((torch.float16, torch.bfloat16))
)
def test_unpack_hands_the_ptx_what_it_wants(monkeypatch, bits, field, dtype, asymmetric):
    if DEVICE.type == "cpu":
        teach(monkeypatch)
    check_unpack(bits, field, dtype, asymmetric, True)


@pytest.mark.parametrize("bits, field, dtype, asymmetric", snippets((torch.float16, torch.float32)))
def test_the_twin_in_triton_is_exact(bits, field, dtype, asymmetric):
    check_unpack(bits, field, dtype, asymmetric, False)


@triton.jit
def constant_kernel(zero_ptr, out_ptr, COUNT: tl.constexpr):
    at = tl.arange(0, COUNT)
    tl.store(out_ptr + at, zero_constant(tl.load(zero_ptr + at), out_ptr.dtype.element_ty))


@pytest.mark.parametrize(
    "dtype, count, exact",
    [(torch.float16, 256, lambda z: 1024 + z), (torch.bfloat16, 128, lambda z: -(128 + z))],
    ids=["fp16", "bf16"],
)
def test_row_constants(dtype, count, exact):
    zero = torch.arange(count)
    out = torch.empty(count, dtype=dtype)
    constant_kernel[(1,)](zero.to(torch.uint8), out, COUNT=count)
    assert torch.equal(out.long(), exact(zero))


@pytest.mark.parametrize(
    "code, message",
    [
        ("{ .reg .b32 t; xor.b32 t,$2,$2; }", "xor.b32"),
        ("{ .reg .b32 t; and.u32 t,$2,$2; }", "unknown instruction and.u32"),
        ("{ .reg .b32 t; and.b32 t,$2; }", "and.b32 with 1 operands"),
        ("{ .reg .b32 t; mov.b32 u,$2; }", "u was not declared"),
        ("{ .reg .b32 t; mov.b32 $0,t; }", "t is read"),
        ("{ .reg .b32 t; mov.b32 $0,$3; }", r"\$3 is read"),
        ("{ .reg .b32 t; mov.b32 $0,$2; mov.b32 $1,$2; }", r"\$2 is read"),
        ("{ .reg .b32 t; shr.u32 t,$2,32; }", "shift by 32"),
        ("mov.b32 $0,$2;", "not a block"),
    ],
)
def test_the_emulator_refuses_what_it_does_not_know(code, message):
    with pytest.raises(ValueError, match=message):
        run(code, np.zeros(1, np.uint32))
