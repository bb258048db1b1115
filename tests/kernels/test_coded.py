"""EXL3's codes through the Triton kernels, in the interpreter or on a GPU: layers against the
definition on the matrices that the codes stand for, and every value that PTX decodes."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import DEVICE, assert_close, mostly_slow, slow
from ptx_emulator import halves_of, run, teach

from qmoe.config import CHANNEL, Scheme
from qmoe.format.exl3 import CODEBOOKS, RATES, codebook_values
from qmoe.format.trellis import Codes, Trellis, padded
from qmoe.kernels.activation import Activation
from qmoe.kernels.coded import layer, ops, tiles
from qmoe.kernels.coded.arena import build_coded_arena, stored_codes
from qmoe.kernels.coded.stack import CodedStack
from qmoe.kernels.device.trellis import one_start, ptx, run_of, start_of
from qmoe.kernels.hosted.slots import SlotStack
from qmoe.kernels.layout import ORDERS
from qmoe.kernels.reference import moe_reference

SILU = Activation("silu")
HOST = torch.device("cpu")
# Products are multiplied in float16, and rotations round to it.
CLOSE = {torch.float32: (1e-4, 2e-5), torch.float16: (2e-2, 3e-3), torch.bfloat16: (8e-2, 2e-2)}
HALF = torch.bfloat16 if DEVICE.type == "cuda" else torch.float16


def codes(n, k, rate, codebook="mul1", E=1):
    """Any bits are codes. Outputs are of the size of inputs."""
    shape = (E, padded(k) // 16, padded(n) // 16, int(16 * rate))
    trellis = torch.randint(-(1 << 15), 1 << 15, shape, device=HOST).to(torch.int16)
    suh = torch.randn(E, padded(k), device=HOST).half()
    svh = (torch.randn(E, padded(n), device=HOST) / k**0.5).half()
    return Codes(trellis, suh, svh, codebook, n, k)


def dense(given):
    """The matrices of codes, which are decoded in host memory."""
    with HOST:
        return given.dequantize().to(DEVICE)


def make(E, H, I, rates, codebook="mul1", dtype=torch.float32):  # noqa: E741
    """An arena of experts whose rates take turns, and their two matrices in float32."""
    matrices = [
        [codes(n, k, rates[(e + j) % len(rates)], codebook) for e in range(E)]
        for j, (n, k) in enumerate(((I, H), (I, H), (H, I)))
    ]
    gate, up, down = (torch.cat([dense(c) for c in stack]) for stack in matrices)
    arena = build_coded_arena(matrices, 2, dtype, DEVICE)
    return arena, torch.cat((gate, up), 1), down


def reference(x, ids, gates, first, second, between, b1=None, b2=None):
    y = torch.zeros(len(x), second.shape[1])
    for t, chosen in enumerate(ids.tolist()):
        for a, e in enumerate(chosen):
            if 0 <= e < len(first):
                mid = first[e] @ x[t].float() + (0 if b1 is None else b1[e].float())
                out = second[e] @ between(mid) + (0 if b2 is None else b2[e].float())
                y[t] += gates[t, a].float() * out
    return y


def check(arena, first, second, ids, dtype=torch.float32, close=None):
    T, A = ids.shape
    x, gates = torch.randn(T, first.shape[2]).to(dtype), torch.rand(T, A)
    got = layer.routed_experts(x, ids, gates, arena, SILU)
    wanted = moe_reference(x.float().cpu(), ids.cpu(), gates.cpu(), first.cpu(), second.cpu(),
                           SILU)  # fmt: skip
    assert_close(got.float().cpu(), wanted, *(close or CLOSE[dtype]))


@pytest.mark.parametrize("rate", range(2, 17))
def test_runs_lie_in_two_words(rate):
    """Of every rate in half bits: each bit of a window is in the pair that its run loads."""
    run_length = run_of(rate)
    starts = set()
    for p in range(0, 256, run_length):
        start = start_of(p, rate)
        starts.add(start % 32)
        for j in range(run_length):
            end = (p + j + 1) * rate // 2 - ((p + 1) * rate // 2 - 16)
            assert 16 <= end <= 64 - start % 32
    assert one_start(rate) == (starts.pop() if len(starts) == 1 else -1)


@pytest.mark.parametrize("codebook", CODEBOOKS)
def test_ptx_decodes_every_state(codebook):
    states = np.arange(1 << 16, dtype=np.uint32).reshape(-1, 4)
    found = run(ptx(codebook), *states.T.copy())
    with HOST:
        wanted = codebook_values(codebook).double().numpy()
    values = np.stack([half for word in found for half in halves_of(word, "fp16")], -1)
    assert np.array_equal(values.reshape(-1), wanted)


@pytest.mark.parametrize(
    "rate, codebook",
    mostly_slow(
        [(r, c) for r in RATES for c in CODEBOOKS],
        lambda r, c: c == CODEBOOKS[int(2 * r) % 3],
    ),
)
def test_linears_of_every_rate_and_codebook(rate, codebook):
    given = codes(130, 100, rate, codebook)
    arena = build_coded_arena([[given]], 1, torch.float32, DEVICE)
    x, bias = torch.randn(3, 100), torch.randn(130)
    weight = dense(given)[0]
    assert_close(layer.linear(x, arena, bias), x @ weight.T + bias, *CLOSE[torch.float32])
    assert torch.equal(stored_codes(arena, 0, 0).trellis, given.trellis)


@pytest.mark.parametrize("M", [1, 7, 65, slow(300)])
def test_linears_of_many_rows(M):
    given = codes(300, 70, 4)
    arena = build_coded_arena([[given]], 1, HALF, DEVICE)
    x = torch.randn(70, M).to(HALF).T  # not contiguous
    weight = dense(given)[0]
    assert_close(layer.linear(x, arena).float(), x.float() @ weight.T, *CLOSE[HALF])
    assert layer.linear(x[:0], arena).shape == (0, 300)


EDGES = {
    "one token": torch.tensor([[2, 0]]),
    "a token for one expert, the rest for another": torch.tensor([[0]] + [[3]] * 9),
    "all tokens on one expert": torch.full((21, 1), 1),
    "sentinels, an empty expert": torch.tensor([[4, 0], [2, 9], [0, 2]]),
    "only sentinels": torch.full((3, 2), 4),
    "the same expert twice": torch.tensor([[1, 1], [1, 3]]),
    "more choices than a power of two": torch.arange(3).repeat(2, 1),
    "more than the ids are searched for": torch.arange(260).view(130, 2) % 5,
}  # fmt: skip


@pytest.mark.parametrize("name", EDGES)
@pytest.mark.usefixtures("nan_empty")
def test_edges_of_routing(name):
    arena, first, second = make(4, 100, 72, (2, 3, 4))
    check(arena, first, second, EDGES[name].to(DEVICE))


@pytest.mark.parametrize(
    "rates, codebook, dtype",
    [((2, 2.5, 4, 6), "mul1", HALF), ((3,), "mcg", HALF), ((1, 8), "3inst", torch.float32)],
)
def test_rates_that_differ_go_in_one_launch(rates, codebook, dtype):
    arena, first, second = make(5, 90, 130, rates, codebook, dtype)
    assert arena.matrices[0].rates == sum(1 << int(2 * r) for r in rates)
    ids = torch.stack([torch.randperm(5)[:3] for _ in range(6)])
    check(arena, first, second, ids, dtype)


@pytest.mark.parametrize("order", ORDERS)
def test_every_order_of_k(order, monkeypatch):
    table = layer.device_table(DEVICE)
    changed = type(table[0])(**{**vars(table[0]), "order": order})
    monkeypatch.setattr(layer, "device_table", lambda device: (changed, table[1]))
    arena, first, second = make(3, 128, 130, (3,))
    check(arena, first, second, torch.tensor([[0, 2], [1, 2]]))


@pytest.mark.parametrize("split", [2, 4])
def test_shares_of_k_biases_and_odd_gates(monkeypatch, split):
    monkeypatch.setattr(layer.launch, "choose_split", lambda *shapes: split)
    E, H, I = 3, 290, 40  # noqa: E741
    arena, first, second = make(E, H, I, (2,))
    x, ids, gates = torch.randn(5, H), torch.randint(E + 1, (5, 2)), torch.rand(2, 5).T
    b1, b2 = torch.randn(E, 2 * I), torch.randn(E, H)
    got = layer.routed_experts(x, ids, gates, arena, SILU, b1, b2)
    assert_close(got, reference(x, ids, gates, first, second, SILU, b1, b2))


@pytest.mark.parametrize("T", [4, 129])
def test_the_products_apart(T):
    """For activations that are not fused, of matrices that have no gate."""
    E, H, I = 4, 100, 72  # noqa: E741
    scheme = Scheme(3, CHANNEL, codebook="mul1")
    up, down = codes(I, H, 3, E=E), codes(H, I, 4, E=E)
    stack = CodedStack([Trellis((up,), scheme), Trellis((down,), scheme)], torch.float32, DEVICE)
    x, ids, gates = torch.randn(T, H), torch.randint(E + 2, (T, 2)), torch.rand(T, 2)
    b1, b2 = torch.randn(E, I), torch.randn(E, H)

    def relu2(product):
        return product.relu().square()

    got = stack.experts(x, ids, gates, relu2, (b1, b2))
    first, second = (dense(c) for c in (up, down))
    assert_close(got, reference(x, ids, gates, first, second, relu2, b1, b2))
    assert_close(stack.expand(2, 0), first[2])
    assert_close(stack.expand(1, 1), second[1])
    assert stack.experts(x[:0], ids[:0], gates[:0], relu2, (b1, b2)).shape == (0, H)


def test_the_same_bits_twice_and_no_tokens():
    arena, first, _ = make(4, 100, 40, (2, 4), dtype=HALF)
    x, ids, gates = torch.randn(9, 100).to(HALF), torch.randint(5, (9, 2)), torch.rand(9, 2)
    once, again = (layer.routed_experts(x, ids, gates, arena, SILU) for _ in range(2))
    assert torch.equal(once, again) and once.abs().sum() > 0
    assert layer.routed_experts(x[:0], ids[:0], gates[:0], arena, SILU).shape == (0, 100)


@pytest.mark.parametrize("codebook", CODEBOOKS)
def test_a_layer_as_compiled_for_a_gpu(monkeypatch, codebook):
    """The PTX of the decoding, emulated inside the kernel."""
    if DEVICE.type == "cuda":
        pytest.skip("runs the PTX itself")
    teach(monkeypatch)
    table = layer.device_table(DEVICE)
    changed = type(table[0])(**{**vars(table[0]), "ptx": True})
    monkeypatch.setattr(layer, "device_table", lambda device: (changed, table[1]))
    arena, first, second = make(3, 130, 40, (2, 3), codebook, torch.float16)
    check(arena, first, second, torch.tensor([[0, 2], [1, 2]]), torch.float16)


def test_many_contributions_are_kept_in_bfloat16(monkeypatch):
    monkeypatch.setattr(layer, "FLOAT32_ASSIGNMENTS", 0)
    arena, first, second = make(3, 130, 40, (3,), dtype=HALF)
    ids = torch.tensor([[0, 2], [1, 2], [3, 0]])
    check(arena, first, second, ids, HALF, close=CLOSE[torch.bfloat16])


def test_experts_in_slots_compute_what_resident_ones_do():
    scheme = Scheme(2, CHANNEL, codebook="mul1")
    stacks = [
        Trellis((codes(40, 130, 2, E=6), codes(40, 130, 3, E=6)), scheme),
        Trellis((codes(130, 40, 4, E=6),), scheme),
    ]
    resident = CodedStack(stacks, torch.float32, DEVICE, SILU)
    slots = SlotStack(CodedStack(stacks, torch.float32, DEVICE, SILU, home=HOST), 3, DEVICE)
    for _ in range(4):
        x, ids, gates = torch.randn(3, 130), torch.randint(6, (3, 2)), torch.rand(3, 2)
        wanted = resident.experts(x, ids, gates, SILU)
        assert_close(slots.experts(x, ids, gates, SILU), wanted)
    assert slots.nbytes() > resident.nbytes() == resident.arena.nbytes()


def test_matrices_that_do_not_go_together_are_refused():
    one, other = codes(40, 130, 2), codes(40, 140, 2)
    with pytest.raises(ValueError, match="one shape and codebook"):
        build_coded_arena([[one, other]], 1, torch.float32, DEVICE)
    with pytest.raises(ValueError, match="gate and up of one module need one codebook"):
        build_coded_arena([[one], [codes(40, 130, 2, "mcg")]], 2, torch.float32, DEVICE)


def test_tiles_hold_the_mean_experts_rows():
    table = layer.device_table(DEVICE)[0]
    assert tiles.choose(table, 8, 64).BM == 8
    assert tiles.choose(table, 64 * 20, 64).BM == 32
    largest = tiles.choose(table, 10**6, 64)
    assert max(tiles.tiles_for(table)) == largest.BM


CHECKS = ("test_schema", "test_faketensor")


def test_schemas_and_fakes():
    E, H, I = 3, 90, 40  # noqa: E741
    arena, *_ = make(E, H, I, (2, 3))
    x, ids, gates = torch.randn(3, H), torch.randint(E, (3, 2)), torch.rand(3, 2)
    packed = (arena.buffer, arena.table, ops.describe(arena))
    whole = (x, ids, gates, *packed, "silu", 1.702, 7.0, None, None)
    torch.library.opcheck(ops.coded_experts, whole, test_utils=CHECKS)
    torch.library.opcheck(ops.coded_first, (x, ids, *packed, None), test_utils=CHECKS)
    mid = torch.randn(6, I)
    torch.library.opcheck(ops.coded_second, (mid, ids, gates, *packed, None), test_utils=CHECKS)
    one = build_coded_arena([[codes(40, H, 2)]], 1, torch.float32, DEVICE)
    dense = (x, one.buffer, one.table, ops.describe(one))
    torch.library.opcheck(ops.coded_linear, dense, test_utils=CHECKS)


BLOCK = """
import os
import torch
from torch import nn
from qmoe.config import CHANNEL, Scheme
from qmoe.format.trellis import Codes, Trellis
from qmoe.kernels.activation import Activation
from qmoe.kernels.coded.stack import CodedStack
from qmoe.kernels.cpu.trellis_stack import TrellisStack

SILU, DEVICE = Activation("silu"), torch.device(os.environ.get("QMOE_TEST_DEVICE", "cpu"))


def codes(n, k, rate):
    tiles = torch.randint(-(1 << 15), 1 << 15, (4, 8, 8, 16 * rate)).to(torch.int16)
    return Codes(tiles, torch.randn(4, 128).half(), torch.randn(4, 128).half(), "mul1", n, k)


class Block(nn.Module):
    def __init__(self, experts, linear):
        super().__init__()
        self.router = nn.Linear(90, 4, device=DEVICE)
        self.experts, self.linear = experts, linear

    def forward(self, x):
        gates, ids = self.router(x).softmax(-1).topk(2)
        return x + self.experts.experts(x, ids, gates, SILU) + self.linear.matmul(x, 0)


scheme = Scheme(2, CHANNEL, codebook="mul1")
first, second = (codes(40, 90, 2), codes(40, 90, 3)), (codes(90, 40, 4),)
stacks = [Trellis(first, scheme), Trellis(second, scheme)]
dense = [Trellis((codes(90, 90, 6),), scheme)]
for fused in (SILU, None):
    forms = [(CodedStack(stacks, torch.float32, DEVICE, fused),
              CodedStack(dense, torch.float32, DEVICE))]
    if DEVICE.type == "cpu":  # rounded to 8 bits by the kernels in C, and exact
        for kind in (torch.bfloat16, torch.float32):
            forms.append((TrellisStack(stacks, kind, fused), TrellisStack(dense, kind)))
    for experts, linear in forms:
        block, x = Block(experts, linear).requires_grad_(False), torch.randn(3, 90, device=DEVICE)
        compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), block(x), rtol=1e-4, atol=1e-3)
        print("one graph")
"""


def test_blocks_are_one_graph():
    """On a GPU and on a CPU, with an activation that is fused and without. In a process of its own,
    since torch.compile does not see through the checks of types."""
    done = subprocess.run([sys.executable, "-P", "-c", BLOCK], capture_output=True, text=True)
    forms = 6 if DEVICE.type == "cpu" else 2
    assert done.stdout.split("\n")[:-1] == ["one graph"] * forms, done.stderr[-3000:]
