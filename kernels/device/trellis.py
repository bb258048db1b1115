"""EXL3's codes to floating point, in registers (qmoe/format/exl3.py has the format).

A value follows from the 16 bits of a tile's ring that end at its position. Neighbouring positions
are cut from the same two words: a run of 8 of them wherever those hold all its bits, of 4 or 2 at
the higher rates. The 8 positions of a lane are its values of a matrix unit's left operand [16, 16]
(outputs, inputs), so that what is decoded is multiplied where it is.

`rate` counts half bits here: 2 to 16 are 1 to 8 bits a weight.
"""

import triton
import triton.language as tl


@triton.constexpr_function
def run_of(rate):
    """Positions that are cut from one pair of words, a power of two: the most of which none starts
    so late in the first word that they end behind the second."""
    run = 8
    while run > 2 and any(
        (((p + 1) * rate // 2 - 16) % 32) + 16 + (p + run) * rate // 2 - (p + 1) * rate // 2 > 64
        for p in range(0, 256, run)
    ):
        run //= 2
    return run


@triton.constexpr_function
def start_of(position, rate):
    """The first bit of the window that ends where the bits of a position do."""
    return ((position + 1) * rate // 2 - 16) % (128 * rate)


@triton.constexpr_function
def one_start(rate):
    """Where in its first word every run starts, if that is the same for all; else -1."""
    starts = {start_of(p, rate) % 32 for p in range(0, 256, run_of(rate))}
    return starts.pop() if len(starts) == 1 else -1


@triton.jit
def load_runs(codes, starts, NT: tl.constexpr, KT: tl.constexpr, RATE: tl.constexpr):
    """The pairs of words [NT, KT, 256 / run] of tiles as 64 bits that start where the run's first
    window does. codes: pointer to the tiles [NT, KT] of 4 RATE words. starts: `starts_of`."""
    RUN: tl.constexpr = run_of(RATE)
    first = tl.arange(0, 256 // RUN) * RUN
    word = (((first + 1) * RATE // 2 + 128 * RATE - 16) % (128 * RATE)) // 32
    tile = tl.arange(0, NT)[:, None, None] * KT + tl.arange(0, KT)[None, :, None]
    tile *= 4 * RATE
    high = tl.load(codes + (tile + word), eviction_policy="evict_first")
    low = tl.load(codes + (tile + (word + 1) % (4 * RATE)), eviction_policy="evict_first")
    both = high.to(tl.uint64) << 32 | low.to(tl.uint32, bitcast=True).to(tl.uint64)
    if one_start(RATE) < 0:
        return both << starts
    else:
        return both << one_start(RATE)


@triton.jit
def starts_of(table, RATE: tl.constexpr):
    """Where in its first word each run starts [1, 1, 256 / run], read from `table` [17, 128]: what
    is decoded keeps a matrix unit's layout only if all of it is loaded, and nothing counted."""
    RUN: tl.constexpr = run_of(RATE)
    at = tl.arange(0, 256 // RUN)
    return tl.load(table + RATE * 128 + at).to(tl.uint64)[None, None, :]


@triton.jit
def _state(runs, RATE: tl.constexpr, j: tl.constexpr):
    """The 16 bits of position j of every run, as uint32."""
    return (runs >> (48 - ((j + 1) * RATE // 2 - RATE // 2))).to(tl.uint32) & 0xFFFF


@triton.jit
def states_of(runs, RATE: tl.constexpr):
    """The 16 bits that belong to every position: runs [*, R] to [*, R, ...], a run in twos."""
    RUN: tl.constexpr = run_of(RATE)
    if RUN == 2:
        return tl.join(_state(runs, RATE, 0), _state(runs, RATE, 1))
    elif RUN == 4:
        even = tl.join(_state(runs, RATE, 0), _state(runs, RATE, 2))
        return tl.join(even, tl.join(_state(runs, RATE, 1), _state(runs, RATE, 3)))
    else:
        a = tl.join(_state(runs, RATE, 0), _state(runs, RATE, 4))
        b = tl.join(_state(runs, RATE, 2), _state(runs, RATE, 6))
        c = tl.join(_state(runs, RATE, 1), _state(runs, RATE, 5))
        d = tl.join(_state(runs, RATE, 3), _state(runs, RATE, 7))
        return tl.join(tl.join(a, b), tl.join(c, d))


@triton.jit
def tiles(
    codes, starts, NT: tl.constexpr, KT: tl.constexpr, RATE: tl.constexpr,
    CODEBOOK: tl.constexpr, DT: tl.constexpr, PTX: tl.constexpr, ORDER: tl.constexpr,
):  # fmt: skip
    """Decoded tiles [16 NT, 16 KT] (outputs, inputs). codes, starts: `load_runs`."""
    values = decode(states_of(load_runs(codes, starts, NT, KT, RATE), RATE), CODEBOOK, DT, PTX)
    # Of a position: lane (output % 8, pair of inputs), then outputs + 8, inputs + 8, the input.
    values = values.reshape(NT, KT, 8, 4, 2, 2, 2)
    if ORDER == "mma":
        values = values.trans(0, 4, 2, 1, 3, 5, 6)
    else:
        values = values.trans(0, 4, 2, 1, 5, 3, 6)
    return values.reshape(16 * NT, 16 * KT)


@triton.constexpr_function
def ptx(codebook: str) -> str:
    """The PTX that turns four states into four float16 values. Operands: two outputs of two values,
    four states."""
    body = "{ .reg .b32 a,b,c,d,k,o; "
    if codebook == "mul1":
        # 0x6400 plus the sum of bytes is 1024 + sum as float16.
        for name, state in zip("abcd", ("$2", "$3", "$4", "$5"), strict=True):
            body += f"mul.lo.u32 {name},{state},0x83dcd12d; "
            body += f"dp4a.u32.u32 {name},{name},0x01010101,0x6400; "
        return body + (
            "prmt.b32 a,a,b,0x5410; prmt.b32 c,c,d,0x5410; mov.b32 k,0x1eee1eee; "
            "mov.b32 o,0xc931c931; fma.rn.f16x2 $0,a,k,o; fma.rn.f16x2 $1,c,k,o; }"
        )
    factor, more = (0xCBAC1FED, 0) if codebook == "mcg" else (89226354, 64248484)
    for name, state in zip("abcd", ("$2", "$3", "$4", "$5"), strict=True):
        body += f"mad.lo.u32 {name},{state},0x{factor:08x},0x{more:08x}; "
        body += f"lop3.b32 {name},{name},0x8fff8fff,0x3b603b60,0x6a; "
    return body + (
        "prmt.b32 k,a,b,0x5410; prmt.b32 o,a,b,0x7632; add.f16x2 a,k,o; "
        "prmt.b32 k,c,d,0x5410; prmt.b32 o,c,d,0x7632; add.f16x2 $1,k,o; mov.b32 $0,a; }"
    )


@triton.jit
def decode(states, CODEBOOK: tl.constexpr, DT: tl.constexpr, PTX: tl.constexpr):
    """The values of 16-bit states (uint32) as DT: exact in float16, the format's own."""
    if PTX:
        asm: tl.constexpr = ptx(CODEBOOK)
        return tl.inline_asm_elementwise(
            asm, "=r,=r,r,r,r,r", [states], dtype=tl.float16, is_pure=True, pack=4
        ).to(DT)
    else:
        return _decode_plain(states, CODEBOOK).to(DT)


@triton.jit
def _decode_plain(states, CODEBOOK: tl.constexpr):
    """The same in Triton alone: for AMD, for float32, and for the interpreter."""
    if CODEBOOK == "mul1":
        word = states * 0x83DCD12D
        word = (word & 0x00FF00FF) + (word >> 8 & 0x00FF00FF)
        total = (word + (word >> 16)) & 0xFFFF
        # 0x1EEE and 0xC931; exact in float32, and rounded once.
        value = (1024 + total).to(tl.float32) * 0.006767272949 - 10.3828125
        return value.to(tl.float16)
    if CODEBOOK == "mcg":
        word = states * 0xCBAC1FED
    else:
        word = states * 89226354 + 64248484
    word = (word & 0x8FFF8FFF) ^ 0x3B603B60
    low = (word & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True)
    return low + (word >> 16).to(tl.uint16).to(tl.float16, bitcast=True)
