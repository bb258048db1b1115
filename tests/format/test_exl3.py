"""EXL3's codes: bits, order and values against a slow reading of the format, and golden bytes."""

import hashlib
import math
import struct

import pytest
import torch

from qmoe.config import QuantConfig
from qmoe.format.exl3 import (
    CODEBOOKS,
    RATES,
    codebook_values,
    decode,
    from_tiles,
    states_of,
    tile_order,
    tiles_of,
    to_tiles,
)
from qmoe.format.exl3_checkpoint import coded_tensors, exl3_config, storage_table
from qmoe.format.trellis import Codes

GOLDEN = {
    "mul1": (
        "a9992f3e57d1",
        "00c08c2950d4",
        "e9479dce8b56",
        "d426ea5891b9",
        "b575b9f0eebd",
        "62274eb17873",
        "f5e351b812e5",
        "b3d974ff80af",
        "00b97b849d47",
        "042c11c873a8",
        "d8448319c9e3",
        "7774f1727d42",
        "23086a2747b5",
        "5f5c6bf7f6da",
        "05f8dcd35797",
    ),
    "mcg": (
        "87586c4c925e",
        "cc08cfeeec6a",
        "2555e1ae934f",
        "72e0bee00026",
        "f970e51e42d1",
        "0724f2481a47",
        "b56f19962048",
        "d5add82b7ef7",
        "17b6798e750f",
        "8a2c0cc06db9",
        "30febff22306",
        "b3b89453ea7a",
        "c8ec127b33c9",
        "c81d6934b09d",
        "6d27a2390aa7",
    ),
    "3inst": (
        "8b3e61c6a163",
        "c2308a8f2c27",
        "c49502a51cc5",
        "30f1c83e561b",
        "88ac4ad039fc",
        "fd12c06aa173",
        "5734595178b9",
        "540c467c77d9",
        "17f42ed84d10",
        "fe8444bee1cd",
        "5502325b3a9a",
        "91c734612703",
        "65af908d5c60",
        "a163be7e1ed5",
        "667c9fd3cb5b",
    ),
}  # of rates 1, 1.5, ... 8


def some_tile(rate):
    """A tile of fixed bytes."""
    raw = b"".join(hashlib.sha256(f"{rate} {i}".encode()).digest() for i in range(16))
    return torch.tensor(
        struct.unpack(f"<{int(16 * rate)}h", raw[: int(32 * rate)]), dtype=torch.int16
    )


def slow_states(tile, rate):
    """Bit by bit: words of 32 bits, highest first; windows that end where a position's bits do."""
    raw = struct.pack(f"<{len(tile)}h", *tile.tolist())
    words = struct.unpack(f"<{len(raw) // 4}I", raw)
    ring = "".join(f"{word:032b}" for word in words)
    out = []
    for position in range(256):
        end = math.floor((position + 1) * rate)
        out.append(int("".join(ring[(end - 16 + i) % len(ring)] for i in range(16)), 2))
    return out


def slow_value(state, codebook):
    def half(bits):
        return struct.unpack("<e", struct.pack("<H", bits))[0]

    def rounded(x):
        return struct.unpack("<e", struct.pack("<e", x))[0]

    if codebook == "mul1":
        word = state * 0x83DCD12D % 2**32
        return rounded((1024 + sum(word.to_bytes(4, "little"))) * half(0x1EEE) + half(0xC931))
    word = state * 0xCBAC1FED if codebook == "mcg" else state * 89226354 + 64248484
    word = (word & 0x8FFF8FFF) ^ 0x3B603B60
    return rounded(half(word & 0xFFFF) + half(word >> 16 & 0xFFFF))


@pytest.mark.parametrize("rate", RATES)
def test_states_are_the_windows_of_the_ring(rate):
    tile = some_tile(rate)
    states = states_of(tile)
    assert states.tolist() == slow_states(tile, rate)
    assert torch.equal(tiles_of(states, rate), tile)


@pytest.mark.parametrize("codebook", CODEBOOKS)
def test_values_are_those_of_the_codebook(codebook):
    values = codebook_values(codebook)
    some = [0, 1, 2, 255, 256, 4095, 32767, 32768, 65535, *range(100, 60000, 997)]
    assert [values[s].item() for s in some] == [slow_value(s, codebook) for s in some]


def test_the_order_of_a_tile_is_a_matrix_units():
    """Lane 5 holds column 1, rows 2, 3, 10 and 11, then column 9."""
    places = tile_order()[40:48].tolist()
    assert places == [16 * r + c for c in (1, 9) for r in (2, 3, 10, 11)]
    assert sorted(tile_order().tolist()) == list(range(256))
    matrix = torch.randn(2, 48, 32)
    assert torch.equal(from_tiles(to_tiles(matrix)), matrix)
    assert torch.equal(
        to_tiles(matrix)[1, 2, 1, 8:12], matrix[1, 32 + torch.tensor([2, 3, 10, 11]), 16]
    )


@pytest.mark.parametrize("codebook", CODEBOOKS)
@pytest.mark.parametrize("rate", RATES)
def test_golden_bytes(rate, codebook):
    values = decode(some_tile(rate)[None, None], codebook)
    digest = hashlib.sha256(values.half().numpy().tobytes()).hexdigest()[:12]
    assert digest == GOLDEN[codebook][RATES.index(rate)]


def test_scales_and_rotations_lie_around_the_codes():
    n, k = 200, 130  # filled up to 256
    trellis = torch.randint(-(1 << 15), 1 << 15, (2, 16, 16, 48)).to(torch.int16)
    suh, svh = torch.randn(2, 256).half(), torch.randn(2, 256).half()
    found = Codes(trellis, suh, svh, "mul1", n, k).dequantize()
    signs = torch.tensor([[(-1.0) ** (i & j).bit_count() for i in range(128)] for j in range(128)])
    turn = torch.block_diag(signs, signs).double() / 128**0.5
    for e in range(2):
        whole = turn @ decode(trellis[e], "mul1").double() @ turn
        wanted = suh[e].double()[:, None] * whole * svh[e].double()
        torch.testing.assert_close(found[e].double(), wanted[:k, :n].T, rtol=1e-4, atol=1e-5)


def test_metadata_is_the_converters():
    """Field by field what exllamav3 1.6.5 writes (conversion/compile.py and quant_config.py) for a
    linear of 2.5 bits [130, 200] in mul1, one of 3 bits in mcg, and a norm."""
    config = QuantConfig.preset(
        "fast", format="exl3", experts={"bits": 2.5}, lm_head={"bits": 6},
        calibration={"samples": 100, "self_samples": 28, "seqlen": 512},
    )  # fmt: skip
    assert exl3_config(config) == {
        "quant_method": "exl3",
        "version": "1.6.5",
        "bits": 2.5,
        "head_bits": 6,
        "calibration": {"rows": 128, "cols": 512},
        "out_scales": "always",
        "codebook": "mul1",
    }
    scales = torch.zeros(1, 256).half(), torch.zeros(1, 256).half()
    one, other = (torch.zeros(1, 16, 16, w, dtype=torch.int16) for w in (40, 48))
    tensors = {"m.norm.weight": torch.zeros(200, dtype=torch.bfloat16)}
    tensors |= coded_tensors("m.up.weight", Codes(one, *scales, "mul1", 130, 200), 0)
    tensors |= coded_tensors("m.q.weight", Codes(other, *scales, "mcg", 130, 200), 0)
    assert tensors["m.up.mul1"].item() & 0xFFFFFFFF == 2212286765
    stored = {n: (str(t.dtype), list(t.shape), t.nbytes) for n, t in tensors.items()}

    def tensor(dtype, n_bytes, *shape):
        return {"shape": list(shape), "n_bytes": n_bytes, "dtype": f"torch.{dtype}"}

    assert storage_table(stored) == {
        "m.norm": {"stored_tensors": {"m.norm.weight": tensor("bfloat16", 400, 200)}},
        "m.up": {
            "stored_tensors": {
                "m.up.trellis": tensor("int16", 20480, 16, 16, 40),
                "m.up.suh": tensor("float16", 512, 256),
                "m.up.svh": tensor("float16", 512, 256),
                "m.up.mul1": tensor("int32", 4),
            },
            "quant_format": "exl3",
            "bits_per_weight": 2.5,
            "mul1_multiplier": 2212286765,
        },
        "m.q": {
            "stored_tensors": {
                "m.q.trellis": tensor("int16", 24576, 16, 16, 48),
                "m.q.suh": tensor("float16", 512, 256),
                "m.q.svh": tensor("float16", 512, 256),
                "m.q.mcg": tensor("int32", 4),
            },
            "quant_format": "exl3",
            "bits_per_weight": 3,
            "mcg_multiplier": 3417055213,
        },
    }
