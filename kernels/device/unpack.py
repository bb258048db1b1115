"""Packed bytes to floating point, in registers. Every unpack exists twice: PTX and pure Triton.

A byte plane holds `fields` values a byte; field f of a byte belongs to K sub-tile f of the plane,
so one loaded byte feeds one dot after another and nothing is ever interleaved (layout.py).

    bits  planes of a 256-wide K tile      fields of a byte
    2     2                                4
    3     1 of top bits + 2 of low pairs   8 top bits, 4 low pairs
    4     4                                2
    8     8                                1

The PTX is byte-safe: `prmt` puts byte i of the word into output i, so it does not matter which
four elements the compiler groups into a word. Integers become floats by being written into the
mantissa of 2^10 (fp16) or 2^7 (bf16), and 2^10 + zero is taken off again: exact, one instruction
for two weights, and the zero point of asymmetric groups costs nothing but its load. bfloat16 has
too few mantissa bits for that at 8 bits: see `_ptx_bf16_bytes`.
Source of the mantissa trick: Kim et al., "Who Says Elephants Can't Run" (2022), section 3.
"""

import triton
import triton.language as tl


@triton.constexpr_function
def _field(bits: int, field: int, source: str, high: str) -> str:
    """t = four bytes, each the stored (unsigned) integer of one weight."""
    mask = ((1 << bits) - 1) * 0x01010101
    if bits == 8:
        return f"mov.b32 t,{source}; "
    if bits == 3:  # low pair from one plane, top bit from the other
        shift = field - 2
        top = f"shr.u32 p,{high},{shift}; " if shift > 0 else f"shl.b32 p,{high},{-shift}; "
        low = f"shr.u32 t,{source},{2 * (field % 4)}; and.b32 t,t,0x03030303; "
        return low + top + "lop3.b32 t,p,0x04040404,t,0xea; "
    return f"shr.u32 t,{source},{bits * field}; and.b32 t,t,0x{mask:08x}; "


@triton.constexpr_function
def ptx(bits: int, field: int, dtype: str, zero: bool) -> str:
    """The PTX that turns four packed bytes into four values of `dtype` ("fp16" or "bf16").

    Operands: two outputs of two values, the plane, for 3 bits the plane of top bits, and with
    `zero` two words of row constants (`zero_constant`).
    """
    inputs = 2 if bits == 3 else 1
    body = "{ .reg .b32 t,p,u,v,m,o,y,z; " + _field(bits, field, "$2", "$3")
    if zero:
        first = 2 + inputs
        body += f"mov.b32 y,${first}; mov.b32 z,${first + 1}; "
    if dtype == "bf16" and bits == 8:
        return body + _ptx_bf16_bytes(zero) + "}"
    offset = 1 << (bits - 1)
    if dtype == "fp16":
        if not zero:
            body += f"mov.b32 y,0x{(0x6400 + offset) * 0x10001:08x}; mov.b32 z,y; "
        return body + (
            "mov.b32 m,0x64646464; prmt.b32 u,t,m,0x4140; prmt.b32 v,t,m,0x4342; "
            "sub.f16x2 $0,u,y; sub.f16x2 $1,v,z; }"
        )
    if not zero:
        body += f"mov.b32 y,0x{(0xC300 + offset) * 0x10001:08x}; mov.b32 z,y; "
    # bf16x2 has fma but no sub before sm_90.
    return body + (
        "mov.b32 m,0x43434343; mov.b32 o,0x3f803f80; prmt.b32 u,t,m,0x4140; "
        "prmt.b32 v,t,m,0x4342; fma.rn.bf16x2 $0,u,o,y; fma.rn.bf16x2 $1,v,o,z; }"
    )


@triton.constexpr_function
def _ptx_bf16_bytes(zero: bool) -> str:
    """q in 0..255 as bfloat16: 128 + the low seven bits, minus what the top bit asks for.

    Symmetric: minus 128 with the top bit and 256 without, both one `prmt` away. Asymmetric: minus
    zero with the top bit and 128 + zero without, chosen by a mask; exact for zeros up to 128, which
    layout.py sees to.
    """
    low = "and.b32 t,$2,0x7f7f7f7f; mov.b32 m,0x43434343; "
    low += "prmt.b32 u,t,m,0x4140; prmt.b32 v,t,m,0x4342; "
    if not zero:
        return low + (
            "mov.b32 o,0xbf80bf80; lop3.b32 p,$2,0x80808080,0,0x0c; prmt.b32 y,p,m,0x4140; "
            "prmt.b32 z,p,m,0x4342; fma.rn.bf16x2 $0,y,o,u; fma.rn.bf16x2 $1,z,o,v; "
        )
    return low + (
        "mov.b32 o,0x3f803f80; prmt.b32 p,$2,0,0x9988; lop3.b32 y,p,$3,$5,0xca; "
        "prmt.b32 p,$2,0,0xbbaa; lop3.b32 z,p,$4,$6,0xca; "
        "fma.rn.bf16x2 $0,u,o,y; fma.rn.bf16x2 $1,v,o,z; "
    )


@triton.constexpr_function
def _registers(count):
    return "=r,=r" + ",r" * count


@triton.jit
def unpack(
    plane,
    high,
    zero,
    BITS: tl.constexpr,
    FIELD: tl.constexpr,
    DT: tl.constexpr,
    ZERO: tl.constexpr,
    PTX: tl.constexpr,
):
    """Field FIELD of byte planes [N, 32], minus its zero point, as DT [N, 32].

    plane: uint8. high: for 3 bits the plane of top bits, uint8. zero: [N, 1] uint8, the unsigned
    zero point of each row (ignored unless ZERO; symmetric weights have it at 2^(BITS-1)).
    """
    if PTX:
        asm: tl.constexpr = ptx(BITS, FIELD, DT.name, ZERO)
        if ZERO:
            big = zero_constant(zero, DT)
            if BITS == 8 and DT == tl.bfloat16:
                return _inline(asm, 5, (plane, big + 128.0, big), DT)
            elif BITS == 3:
                return _inline(asm, 4, (plane, high, big), DT)
            else:
                return _inline(asm, 3, (plane, big), DT)
        elif BITS == 3:
            return _inline(asm, 2, (plane, high), DT)
        else:
            return _inline(asm, 1, (plane,), DT)
    else:
        return _unpack_plain(plane, high, zero, BITS, FIELD, DT, ZERO)


@triton.jit
def zero_constant(zero, DT: tl.constexpr):
    """What the PTX adds or subtracts for a zero point: 1024 + zero, or for bf16 -(128 + zero)."""
    if DT == tl.float16:
        return (zero.to(tl.uint16) | 0x6400).to(tl.float16, bitcast=True)
    else:
        return (zero.to(tl.uint16) | 0xC300).to(tl.bfloat16, bitcast=True)


@triton.jit
def _inline(asm: tl.constexpr, words: tl.constexpr, args, DT: tl.constexpr):
    # The element type has to be a literal here.
    if DT == tl.float16:
        return tl.inline_asm_elementwise(
            asm, _registers(words), args, dtype=tl.float16, is_pure=True, pack=4
        )
    else:
        return tl.inline_asm_elementwise(
            asm, _registers(words), args, dtype=tl.bfloat16, is_pure=True, pack=4
        )


@triton.jit
def _unpack_plain(
    plane,
    high,
    zero,
    BITS: tl.constexpr,
    FIELD: tl.constexpr,
    DT: tl.constexpr,
    ZERO: tl.constexpr,
):
    """The same in Triton alone: for AMD, for float32, and for the interpreter."""
    if BITS == 3:
        q = ((plane >> (2 * (FIELD % 4))) & 3) | (((high >> FIELD) & 1) << 2)
    elif BITS == 8:
        q = plane
    else:
        q = (plane >> (BITS * FIELD)) & ((1 << BITS) - 1)
    if ZERO:
        offset = zero
    else:
        offset = tl.full([1, 1], 1 << (BITS - 1), tl.uint8)
    if DT == tl.float16:
        w = (q.to(tl.uint16) | 0x6400).to(tl.float16, bitcast=True)
        return w - (offset.to(tl.uint16) | 0x6400).to(tl.float16, bitcast=True)
    elif DT == tl.bfloat16 and BITS < 8:
        w = (q.to(tl.uint16) | 0x4300).to(tl.bfloat16, bitcast=True)
        return w - (offset.to(tl.uint16) | 0x4300).to(tl.bfloat16, bitcast=True)
    else:
        return (q.to(tl.int32) - offset.to(tl.int32)).to(DT)
