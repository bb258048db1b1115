"""Beside test_experts.py: launches one by one, with inputs and outputs fenced in, so that a read or
store outside of either is found; and whole layers with the PTX that GPUs run, emulated."""

from dataclasses import replace
from itertools import product as every

import pytest
import torch
from helpers import DEVICE, assert_close, mostly_slow, slow
from ptx_emulator import teach
from torch.nn import functional as F

from qmoe.config import Scheme
from qmoe.format.grid import dequantize
from qmoe.kernels import layer
from qmoe.kernels.activation import Activation
from qmoe.kernels.arena import Arena, build_arena
from qmoe.kernels.arena_stack import ArenaStack
from qmoe.kernels.grouped import Epilogue, expanded, product, schedule
from qmoe.kernels.launch import Tile
from qmoe.kernels.layout import ORDERS
from qmoe.solvers.rtn import rtn

SILU = Activation("silu")
CLOSE = {torch.float32: (1e-4, 2e-5), torch.float16: (1e-2, 1e-3), torch.bfloat16: (8e-2, 1e-2)}
MIXED = (2, 3, 4, 8)
WIDTHS = (*MIXED, MIXED)
FENCE = 128


def silu(product):
    gate, up = product.chunk(2, -1)
    return F.silu(gate) * up


def relu2(product):
    return product.relu().square()


def matrices(E, n, k, bits, group=-1, symmetric=True, dtype=torch.float32):
    """E experts, of widths that repeat, and the weights they stand for [E, n, k]."""
    widths = bits if isinstance(bits, tuple) else (bits,)
    stack = [
        rtn(
            torch.randn(1, n, k) * k**-0.5, Scheme(widths[e % len(widths)], group, symmetric), dtype
        )
        for e in range(E)
    ]
    return stack, torch.cat([dequantize(q) for q in stack])


def build(first, second, dtype=torch.float32, order="mma", paired=True):
    return build_arena([first, second], dtype, order, DEVICE, paired)


def reference(x, ids, gates, first, second, activation, first_bias=None, second_bias=None):
    """One assignment at a time."""
    x, y = x.float(), torch.zeros(len(x), second.shape[1])
    for t, chosen in enumerate(ids.tolist()):
        for a, e in enumerate(chosen):
            if e < len(first):
                mid = first[e] @ x[t] + (0 if first_bias is None else first_bias[e].float())
                out = second[e] @ activation(mid)
                out = out + (0 if second_bias is None else second_bias[e].float())
                y[t] += gates[t, a].float() * out
    return y


class Fence:
    """Tensors inside larger ones of which nothing else may be read or written. Around floats and
    bytes lie NaNs (0xff), so that what is read there shows."""

    def __init__(self):
        self.whole = []

    def around(self, tensor, fixed=True):
        size = tensor.numel() * tensor.itemsize
        whole = torch.full((size + 2 * FENCE,), 0xFF, dtype=torch.uint8)
        inside = whole[FENCE : FENCE + size].view(tensor.dtype).view(tensor.shape)
        inside.copy_(tensor)
        self.whole.append((whole, whole.clone(), fixed))
        return inside

    def check(self):
        for now, before, fixed in self.whole:
            if fixed:
                assert torch.equal(now, before), "an input was written"
            assert (now[:FENCE] == 0xFF).all() and (now[-FENCE:] == 0xFF).all(), "written outside"


@pytest.fixture
def fence(monkeypatch):
    """`around` fences inputs in; what torch.empty and new_empty give is fenced, and NaN."""
    made, full = Fence(), torch.full

    def empty(*size, dtype=None, device=None):
        shape = torch.Size(size) if all(isinstance(s, int) for s in size) else torch.Size(*size)
        dtype = dtype or torch.get_default_dtype()
        filler = float("nan") if dtype.is_floating_point else 0x55
        inside = full(shape, filler, dtype=dtype)
        return made.around(inside, fixed=False) if inside.numel() else inside

    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(
        torch.Tensor,
        "new_empty",
        lambda self, *size, dtype=None, device=None: empty(*size, dtype=dtype or self.dtype),
    )
    yield made
    made.check()


@pytest.mark.parametrize("bits", WIDTHS, ids=str)
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize(
    "dtype, H, I, group, order",
    [(torch.bfloat16, 288, 32, 32, "mma"), (torch.float16, 320, 64, 64, "wgmma")],
    ids=["bf16", "fp16"],
)
def test_with_the_ptx_of_gpus(monkeypatch, bits, symmetric, dtype, H, I, group, order):  # noqa: E741
    if DEVICE.type == "cpu":
        teach(monkeypatch)
        table = replace(layer.INTERPRETER, ptx=True)
        monkeypatch.setattr(layer, "device_table", lambda device: (table, 1))
    E = 4 if bits == MIXED else 2
    a, first = matrices(E, 2 * I, H, bits, group, symmetric, dtype)
    b, second = matrices(E, 40, I, bits, group, symmetric, dtype)
    x, gates = torch.randn(3, H).to(dtype), torch.rand(3, 2).to(dtype)
    ids = torch.tensor([[0, 1], [E, 1], [E - 1, 0]])
    got = layer.routed_experts(x, ids, gates, build(a, b, dtype, order), SILU)
    assert_close(got.float(), reference(x, ids, gates, first, second, silu), *CLOSE[dtype])


SHAPES = [  # K, group, symmetric, dtype
    (288, 32, True, torch.float32),
    (320, 64, False, torch.float16),
    (384, 128, False, torch.float32),
    (301, -1, True, torch.float16),
    (77, -1, False, torch.float32),
]


@pytest.mark.parametrize(
    "bits, order, shape",
    mostly_slow(
        [(b, o, SHAPES[(i + j) % 5]) for i, b in enumerate(WIDTHS) for j, o in enumerate(ORDERS)],
        lambda bits, order, shape: ORDERS.index(order) == WIDTHS.index(bits) % len(ORDERS),
    ),
    ids=str,
)
def test_expanded_weights_are_exact(bits, order, shape, fence):
    k, group, symmetric, dtype = shape
    a, first = matrices(4, 2 * 33, k, bits, group, symmetric, dtype)
    b, second = matrices(4, 130, k, bits, group, symmetric, dtype)
    arena = build(a, b, dtype, order)
    fenced = replace(arena, buffer=fence.around(arena.buffer), table=fence.around(arena.table))
    assert torch.equal(expanded(fenced, 0, 0, 4), first.to(dtype))
    assert torch.equal(expanded(fenced, 1, 1, 3), second[1:3].to(dtype))


@pytest.mark.parametrize(
    "T, paired, biased",
    mostly_slow(
        [*every((4, 129), (True, False), (True, False))], lambda T, p, b: p == b == (T == 4)
    ),
)
def test_the_products_apart(T, paired, biased, fence):
    """For activations that are not fused. Rows of no expert stay unwritten and are not read."""
    E, H, N = 5, 40, 34
    dtype = torch.float16 if T == 4 else torch.float32  # rows found in the ids, or sorted
    between, width = (silu, N // 2) if paired else (relu2, N)
    a, first = matrices(E, N, H, (3, 8), dtype=dtype, symmetric=False)
    b, second = matrices(E, 41, width, 4, dtype=dtype)
    x, gates = fence.around(torch.randn(T, H).to(dtype)), fence.around(torch.rand(T, 2))
    ids = torch.randint(E - 1, (T, 2), dtype=torch.int32)
    ids[1, 0], ids[3] = E, E + 5
    b1 = fence.around(torch.randn(E, N).to(dtype)) if biased else None
    b2 = fence.around(torch.randn(E, 41).to(dtype)) if biased else None
    arena = build(a, b, dtype, paired=paired)
    mid = layer.first_product(x, ids, arena, b1)
    used = (ids < E).flatten()
    assert mid.isfinite().all(1).equal(used) and mid[~used].isnan().all()
    got = layer.second_product(between(mid), ids, gates, arena, b2)
    expected = reference(x, ids, gates, first, second, between, b1, b2)
    assert (got[3] == 0).all()
    assert_close(got.float(), expected, *CLOSE[dtype])


@pytest.mark.parametrize(
    "split, T, kept",
    mostly_slow(
        [(s, *c) for s, c in every((2, 4), [(3, 4096), (3, 0), (130, 4096)])],
        lambda split, T, kept: (split == 4) == (T == 3) and (T == 130 or kept == 0),
    ),
)
def test_shares_of_k_under_gates_and_biases(monkeypatch, split, T, kept, fence):
    """kept: above that many assignments contributions are kept in the model's dtype."""
    monkeypatch.setattr(layer.launch, "choose_split", lambda *shapes: split)
    monkeypatch.setattr(layer, "FLOAT32_ASSIGNMENTS", kept)
    E, H, I = 3, 40, 600 if T == 3 else 40  # noqa: E741
    a, first = matrices(E, 2 * I, H, 4)
    b, second = matrices(E, H, I, (2, 4, 8), symmetric=False)
    x, gates, ids = torch.randn(T, H), torch.rand(T, 2), torch.randint(E + 1, (T, 2))
    b1, b2 = torch.randn(E, 2 * I), torch.randn(E, H)
    got = layer.routed_experts(x, ids, gates, build(a, b), SILU, b1, b2)
    assert_close(got, reference(x, ids, gates, first, second, silu, b1, b2))


def test_contributions_in_the_models_dtype(monkeypatch):
    monkeypatch.setattr(layer, "FLOAT32_ASSIGNMENTS", 0)
    a, first = matrices(3, 64, 40, 4, dtype=torch.float16)
    b, second = matrices(3, 40, 32, 4, dtype=torch.float16)
    x, gates, ids = torch.randn(5, 40).half(), torch.rand(5, 2).half(), torch.randint(3, (5, 2))
    got = layer.routed_experts(x, ids, gates, build(a, b, torch.float16), SILU)
    expected = reference(x, ids, gates, first, second, silu)
    assert_close(got.float(), expected, *CLOSE[torch.float16])


@pytest.mark.parametrize("split", [1, 4])
@pytest.mark.parametrize("bits", MIXED)
def test_linears_of_every_width(monkeypatch, split, bits, fence):
    monkeypatch.setattr(layer.launch, "choose_split", lambda *shapes: split)
    stack, weight = matrices(1, 131, 288, bits, 32, False, torch.float16)
    arena = build_arena([stack], torch.float16, "wgmma", DEVICE, False)
    x = torch.randn(288, 3).half().T  # not contiguous
    got = layer.linear(x, arena, torch.ones(131).half())
    assert_close(got.float(), x.float() @ weight[0].T + 1, *CLOSE[torch.float16])


@pytest.mark.parametrize("bits", [4, MIXED], ids=str)
def test_no_byte_outside_is_read_or_written(bits, fence):
    E, H, I = 4, 301, 21  # noqa: E741
    a, first = matrices(E, 2 * I, H, bits, symmetric=False)
    b, second = matrices(E, 131, I, bits, symmetric=False)
    packed = build(a, b)
    buffer, table = fence.around(packed.buffer), fence.around(packed.table)
    arena = Arena(packed.matrices, buffer, table, packed.order, packed.dtype)
    for T in (1, 5, 129):
        x, ids = fence.around(torch.randn(T, H)), fence.around(torch.randint(E + 2, (T, 2)))
        gates = fence.around(torch.rand(2, T)).T  # not contiguous
        b1, b2 = fence.around(torch.randn(E, 2 * I)), fence.around(torch.randn(E, 131))
        got = layer.routed_experts(x, ids, gates, arena, SILU, b1, b2)
        assert_close(got, reference(x, ids, gates, first, second, silu, b1, b2))


@pytest.mark.parametrize(
    "BM, BN, P",
    mostly_slow(
        [*every((8, 64, 128), (64, 128), (70, 260))],  # P: found in the ids, or sorted
        lambda BM, BN, P: (BM, BN, P) in ((8, 64, 70), (64, 128, 260)),
    ),
)
def test_every_tile(BM, BN, P, fence):
    """Rows of one expert that fill several tiles, and of one that fill none."""
    E, H, I = 3, 40, 70  # noqa: E741
    a, first = matrices(E, 2 * I, H, 3)
    b, _ = matrices(E, H, I, 3)
    arena, x = build(a, b), torch.randn(P, H)
    ids = torch.where(torch.arange(P) % 23 == 7, 2, 1)
    out = torch.empty(1, P, I)
    plan, tile = schedule(ids[:, None], E, BM, 256), Tile(BM, BN, 4, 1)
    product(x, plan, arena, 0, tile, layer.device_table(DEVICE)[0], out, Epilogue(SILU))
    assert_close(out[0], silu((first[ids] @ x[..., None])[..., 0]))


@pytest.mark.parametrize(
    "H, I, dtype",
    [slow(66, 32, torch.float32), slow(64, 36, torch.float16)],
    ids=str,
)
def test_large_batches_of_odd_sizes(H, I, dtype):  # noqa: E741
    a, first = matrices(1, 2 * I, H, 4, dtype=dtype)
    b, second = matrices(1, H, I, 4, dtype=dtype)
    x, ids, gates = torch.randn(256, H).to(dtype), torch.zeros(256, 1).long(), torch.rand(256, 1)
    got = layer.routed_experts(x, ids, gates, build(a, b, dtype), SILU)
    assert_close(got.float(), reference(x, ids, gates, first, second, silu), *CLOSE[dtype])


def test_no_tokens_through_an_unfused_activation():
    stored = [
        rtn(torch.randn(3, *size), Scheme(4, -1), torch.float32) for size in ((64, 40), (40, 32))
    ]
    stack = ArenaStack(stored, torch.float32, DEVICE, None, paired=True)
    y = stack.experts(torch.zeros(0, 40), torch.zeros(0, 2).long(), torch.zeros(0, 2), silu)
    assert y.shape == (0, 40)
