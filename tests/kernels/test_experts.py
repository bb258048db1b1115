"""Routed experts and linears through Triton's interpreter, against the definition on the weights
that the packed bytes stand for. Every buffer the kernels write lies between canaries and starts as
NaN, so a store outside, or an element nobody wrote, is found."""

from collections.abc import Iterator
from itertools import product as every

import pytest
import torch
from helpers import DEVICE, assert_close, mostly_slow, slow

from qmoe.config import Scheme
from qmoe.format.grid import dequantize
from qmoe.kernels import grouped, layer
from qmoe.kernels.activation import NONE, Activation
from qmoe.kernels.arena import build_arena
from qmoe.kernels.device.activation import FUSED
from qmoe.kernels.grouped import Epilogue, every_row, product, sum_parts
from qmoe.kernels.launch import Tile
from qmoe.kernels.reference import moe_reference
from qmoe.solvers.rtn import rtn

SILU = Activation("silu")
# float16 products are summed in float32 here and there; what differs is where they are rounded.
CLOSE = {
    torch.float32: (1e-4, 2e-5), torch.float16: (2e-2, 2e-3), torch.bfloat16: (1.6e-1, 1.6e-2),
}  # fmt: skip
# The interpreter takes bfloat16 for integers; a GPU does not.
DTYPES = [(True, torch.float16), (False, torch.float32)]
if DEVICE.type == "cuda":
    DTYPES += [(True, torch.bfloat16), (False, torch.bfloat16)]
HALF = torch.bfloat16 if DEVICE.type == "cuda" else torch.float16
TABLE = layer.device_table(DEVICE)[0]
MARGIN = 64


@pytest.fixture(autouse=True)
def canaries(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Buffers made by torch.empty and new_empty are NaN inside and guarded on both sides."""
    original, made = torch.empty, []

    def guarded(*size, dtype=None, device=None, **rest):
        shape = size[0] if len(size) == 1 and not isinstance(size[0], int) else size
        count = int(torch.tensor(list(shape)).prod())
        dtype = dtype or torch.get_default_dtype()
        whole = original(count + 2 * MARGIN, dtype=dtype)
        whole.fill_(float("nan") if dtype.is_floating_point else -77)
        pattern = torch.arange(MARGIN).to(dtype)
        whole[:MARGIN], whole[-MARGIN:] = pattern, pattern
        made.append((whole, pattern))
        return whole[MARGIN : MARGIN + count].view(*shape)

    monkeypatch.setattr(torch, "empty", guarded)
    monkeypatch.setattr(
        torch.Tensor, "new_empty",
        lambda self, *size, dtype=None, device=None: guarded(*size, dtype=dtype or self.dtype),
    )  # fmt: skip
    yield
    for whole, pattern in made:
        assert torch.equal(whole[:MARGIN], pattern), "written before the buffer"
        assert torch.equal(whole[-MARGIN:], pattern), "written behind the buffer"


def make(E, H, I, schemes, dtype, order="mma"):  # noqa: E741
    """An arena of E experts (schemes repeat over them) and its two weights in float32."""
    first, second, weights = [], [], ([], [])
    for e in range(E):
        scheme = schemes[e % len(schemes)]
        group = scheme.group_size if I % max(scheme.group_size, 1) == 0 else -1
        inner = Scheme(scheme.bits, group, scheme.symmetric)
        a = rtn(torch.randn(1, 2 * I, H) * H**-0.5, scheme, dtype)
        b = rtn(torch.randn(1, H, I) * I**-0.5, inner, dtype)
        first.append(a)
        second.append(b)
        weights[0].append(dequantize(a)[0].float())
        weights[1].append(dequantize(b)[0].float())
    arena = build_arena([first, second], dtype, order, DEVICE, paired=True)
    return arena, torch.stack(weights[0]), torch.stack(weights[1])


def check(arena, first, second, ids, dtype, activation=SILU):
    T, A = ids.shape
    x, gates = torch.randn(T, first.shape[2]).to(dtype), torch.rand(T, A)
    before = x.clone()
    got = layer.routed_experts(x, ids, gates, arena, activation)
    wanted = moe_reference(x.float(), ids, gates, first, second, activation)
    assert_close(got.float(), wanted, *CLOSE[dtype])
    assert torch.equal(x, before)


def some_ids(T, A, E):
    """Expert E-1 gets nothing; sentinels E and beyond appear."""
    ids = torch.stack([torch.randperm(max(E - 1, A))[:A] for _ in range(T)])
    if T > 2:
        ids[1, 0], ids[2, -1] = E, E + 3
    return ids


WIDTHS = [
    (2, 32, 288, 96, "plain"),
    (3, 32, 320, 64, "wgmma"),
    (4, 32, 64, 160, "mma"),
    (8, 32, 288, 32, "wgmma"),
    (2, 64, 320, 64, "mma"),
    (3, 64, 64, 192, "plain"),
    (4, 64, 576, 64, "wgmma"),
    (8, 64, 320, 64, "mma"),
    (2, 128, 384, 128, "wgmma"),
    (3, 128, 128, 128, "mma"),
    (4, 128, 384, 128, "plain"),
    (8, 128, 128, 128, "plain"),
    (2, -1, 77, 33, "plain"),
    (3, -1, 300, 17, "mma"),
    (4, -1, 41, 90, "wgmma"),
    (8, -1, 270, 5, "mma"),
]


def one_kind(bits, group, H, I, order, symmetric, dtype):  # noqa: E741
    """Every width and every group twice, once of each kind."""
    place = (32, 64, 128, -1).index(group) - (2, 3, 4, 8).index(bits)
    return place % 4 < 2 and symmetric == (place % 4 == 0)


@pytest.mark.parametrize(
    "bits, group, H, I, order, symmetric, dtype",
    mostly_slow([(*w, *kind) for w, kind in every(WIDTHS, DTYPES)], one_kind),
)
def test_every_width_and_group(bits, group, H, I, order, symmetric, dtype):  # noqa: E741
    E = 4
    arena, first, second = make(E, H, I, [Scheme(bits, group, symmetric)], dtype, order)
    check(arena, first, second, some_ids(5, 2, E), dtype)


@pytest.mark.parametrize(
    "group, symmetric",
    mostly_slow([*every((32, 64, -1), (True, False))], lambda g, s: s == (g != 64)),
)
def test_experts_of_all_widths_in_one_launch(group, symmetric):
    schemes = [Scheme(bits, group, symmetric) for bits in (2, 3, 4, 8)]
    arena, first, second = make(5, 320, 64, schemes, torch.float32)
    assert arena.matrices[0].bits == 0
    check(arena, first, second, some_ids(6, 3, 5), torch.float32)


EDGES = {
    "one token": torch.tensor([[2, 0]]),
    "all tokens on one expert": torch.full((21, 1), 1),
    "a token for one expert, the rest for another": torch.tensor([[0]] + [[3]] * 9),
    "only sentinels": torch.full((3, 2), 4),
    "top-1": torch.tensor([[3], [0], [3]]),
    "every expert for every token": torch.arange(4).repeat(3, 1),
    "more assignments than the ids are searched for": some_ids(129, 2, 4),
    "a schedule of several blocks": some_ids(257, 2, 4),
}


@pytest.mark.parametrize("T", [3, slow(70)])
@pytest.mark.parametrize("dtype", [slow(torch.float32), torch.float16])
def test_the_same_bits_twice(T, dtype):
    """Also where several assignments of a token, and several shares of K, are summed."""
    schemes = [Scheme(bits, 32) for bits in (2, 3, 4, 8)]
    arena, *_ = make(4, 96, 32, schemes, dtype)
    x, ids, gates = torch.randn(T, 96).to(dtype), some_ids(T, 2, 4), torch.rand(T, 2)
    once, again = (layer.routed_experts(x, ids, gates, arena, SILU) for _ in range(2))
    assert torch.equal(once, again) and once.abs().sum() > 0


@pytest.mark.parametrize(
    "name", mostly_slow([(name,) for name in EDGES], lambda name: EDGES[name].numel() < 50)
)
def test_edges_of_routing(name):
    arena, first, second = make(4, 64, 32, [Scheme(4, 32)], torch.float32)
    check(arena, first, second, EDGES[name], torch.float32)


def test_no_tokens():
    arena, _, _ = make(4, 64, 32, [Scheme(4, 32)], torch.float32)
    y = layer.routed_experts(
        torch.zeros(0, 64), torch.zeros(0, 2, dtype=torch.long), torch.zeros(0, 2), arena, SILU
    )
    assert y.shape == (0, 64)


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("I", [40, 33])
def test_fused_activations(name, I):  # noqa: E741
    arena, first, second = make(3, 96, I, [Scheme(4, -1)], torch.float32)
    activation = Activation(name, 1.5, 0.7)  # a limit that clamps
    check(arena, first, second, torch.tensor([[0, 1], [1, 2]]), torch.float32, activation)


@pytest.mark.parametrize("T", [3, 200])
def test_biases_and_gates(T):
    E, H, I = 3, 96, 40  # noqa: E741
    arena, first, second = make(E, H, I, [Scheme(4, -1, False)], torch.float32)
    x, ids, gates = torch.randn(T, H), torch.randint(E, (T, 2)), torch.rand(T, 2)
    b1, b2 = torch.randn(E, 2 * I), torch.randn(E, H)
    got = layer.routed_experts(x, ids, gates, arena, SILU, b1, b2)
    wanted = torch.zeros(T, H)
    for t in range(T):
        for a in range(2):
            e = int(ids[t, a])
            mid = SILU(first[e] @ x[t] + b1[e])
            wanted[t] += gates[t, a] * (second[e] @ mid + b2[e])
    assert_close(got, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_batches_expand_in_chunks(dtype, monkeypatch):
    monkeypatch.setattr(layer, "DENSE_CHUNK", 2 * 64 * 64 * dtype.itemsize)
    schemes = [Scheme(4, 32, False), Scheme(8, 32, False), Scheme(3, 32, False)]
    arena, first, second = make(5, 64, 32, schemes, dtype)
    ids = some_ids(9, 2, 5)
    x, gates = torch.randn(9, 64).to(dtype), torch.rand(9, 2)
    b1, b2 = torch.randn(5, 64).to(dtype), torch.randn(5, 64).to(dtype)
    got = layer._by_expanding(x, ids, gates, arena, SILU, b1, b2)
    if dtype == torch.float32:
        assert_close(got, layer.routed_experts(x, ids, gates, arena, SILU, b1, b2))
    else:
        wanted = torch.zeros(9, 64)
        for t in range(9):
            for a in range(2):
                e = int(ids[t, a])
                if e < 5:
                    mid = SILU(first[e] @ x[t].float() + b1[e].float())
                    wanted[t] += gates[t, a] * (second[e] @ mid + b2[e].float())
        assert_close(got.float(), wanted, 0.2, 2e-2)


@pytest.mark.parametrize("split", [1, 2, 4])
@pytest.mark.parametrize("K", [64, 256, 600, 1024])
def test_shares_of_k_add_up(split, K):
    """Also more shares than there are K tiles: some of them hold nothing but zeros."""
    stored = rtn(torch.randn(1, 50, K), Scheme(4, -1, False), torch.float32)
    arena = build_arena([[stored]], torch.float32, "mma", DEVICE, paired=False)
    x, bias, y = torch.randn(3, K), torch.randn(1, 50), torch.empty(3, 50)
    parts = torch.empty(split, 3, 50)
    tile = Tile(8, 128, 4, 1)
    product(x, every_row(x, 8), arena, 0, tile, TABLE, parts, Epilogue(bias=bias))
    sum_parts(parts, None, y, 1, layer.INTERPRETER)
    assert_close(y, x @ dequantize(stored)[0].T + bias[0])


@pytest.mark.parametrize("M", [1, 7, 65, 300])
def test_linears(M):
    stored = rtn(torch.randn(1, 130, 96), Scheme(3, 32), torch.float32)
    arena = build_arena([[stored]], torch.float32, "mma", DEVICE, paired=False)
    x, bias = torch.randn(M, 96), torch.randn(130)
    assert_close(layer.linear(x, arena, bias), x @ dequantize(stored)[0].T + bias)
    assert layer.linear(x[:0], arena).shape == (0, 130)


@pytest.mark.parametrize("N", [200, 300])
@pytest.mark.parametrize("BN", [32, 64, 256])
def test_parts_of_a_tile_and_more_than_one(BN, N):
    stored = rtn(torch.randn(1, N, 96), Scheme(4, 32), torch.float32)
    arena = build_arena([[stored]], torch.float32, "mma", DEVICE, paired=False)
    x, out = torch.randn(5, 96), torch.empty(1, 5, N)
    tile = Tile(16, BN, 4, 1)
    product(x, every_row(x, 16), arena, 0, tile, TABLE, out, Epilogue(NONE))
    assert_close(out[0], x @ dequantize(stored)[0].T)


COUNTS = [(1, 1), (5, 3), (257, 128), (512, 3), (513, 3), (1025, 3)]
KINDS = ["random", "one expert", "no expert"]
SCHEDULES = [(*count, BM, kind) for count, BM, kind in every(COUNTS, (8, 16), KINDS)]


def quick(P, E, BM, kind):
    """Both heights and all kinds."""
    if P != 5:
        return False
    return (BM == 8) == (kind != "one expert")


@pytest.mark.parametrize("P, E, BM, kind", mostly_slow(SCHEDULES, quick))
def test_schedules_hold_every_assignment_once(P, E, BM, kind):
    ids = torch.randint(E + 1, (P,))  # E is nobody
    if kind != "random":
        ids[:] = 0 if kind == "one expert" else E
    most = grouped.launch.most_tiles(P, E, BM)
    order, tiles = grouped.place(ids, E, BM, most)
    at = 0
    for e in range(E):
        mine = torch.where(ids == e)[0].int()
        padded = -(-len(mine) // BM) * BM
        assert torch.equal(order[at : at + len(mine)], mine)
        assert (order[at + len(mine) : at + padded] == P).all()
        assert (tiles[1 + at // BM : 1 + (at + padded) // BM] == e).all()
        at += padded
    assert tiles[0] * BM == at
    order, inverse, ends = grouped.sort(ids, E)
    wanted = torch.argsort(ids, stable=True)[: int((ids < E).sum())]
    assert torch.equal(order[: len(wanted)], wanted.int())
    assert torch.equal(inverse[wanted], torch.arange(len(wanted)).int())
    assert torch.equal(ends, torch.bincount(ids, minlength=E + 1)[:E].cumsum(0).int())
