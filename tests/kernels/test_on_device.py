"""Layers of real sizes on a GPU, as users run them: bfloat16, every width, CUDA graphs, compiled
blocks, experts in slots. On a CPU the same at toy sizes in the interpreter, where that exists."""

import pytest
import torch
from helpers import DEVICE, assert_close, mostly_slow
from offline.roofline import LAYERS, Layer
from torch import nn

from qmoe.format.grid import dequantize
from qmoe.format.quantized import Quantized
from qmoe.kernels.activation import Activation
from qmoe.kernels.arena import build_arena
from qmoe.kernels.arena_stack import ArenaStack
from qmoe.kernels.hosted.slots import SlotStack
from qmoe.kernels.layer import device_table, linear, routed_experts
from qmoe.kernels.reference import check_layer, layer_reference, random_matrices

GPU = DEVICE.type == "cuda"
on_gpus = pytest.mark.skipif(not GPU, reason="needs a GPU: QMOE_TEST_DEVICE=cuda")
MIXED = (2, 3, 4, 8)
SILU = Activation("silu")
TOY = Layer("toy", 5, 2, 288, 96, 32)
DTYPE = torch.bfloat16 if GPU else torch.float32
REAL = [x for x in LAYERS if x.name != "DeepSeek-V3" and x.group != 64] if GPU else [TOY]
# A kernel for widths that differ holds those for one width each; those are compiled for one layer.
CELLS = [(layer, bits) for layer in REAL for bits in (4, MIXED)]
CELLS += [(layer, bits) for layer in REAL for bits in (2, 3, 8) if layer.name == "Qwen3-30B-A3B"]
# In turn: one program per assignment, its rows found in the ids; a schedule; expanded weights.
TOKENS = (1, 5, 33, 300, 2048) if GPU else (3, 140)


def make(layer, bits, symmetric=True):
    """A layer's arena, and the integers it was packed from."""
    shapes = ((2 * layer.I, layer.H), (layer.H, layer.I))
    stacks = [
        random_matrices(layer.E, *shape, bits, layer.group, DTYPE, DEVICE, symmetric)
        for shape in shapes
    ]
    order = device_table(DEVICE)[0].order
    return build_arena(stacks, DTYPE, order, DEVICE, paired=True), stacks


def stacked(matrices):
    """Matrices of one scheme as one stack."""
    q, scale = (torch.cat([getattr(m, name) for m in matrices]) for name in ("q", "scale"))
    return Quantized(q, scale, None, matrices[0].scheme)


def batch(layer, T):
    """Tokens, ids and gates. The last expert gets none; a token may name one twice, or nobody."""
    x = torch.randn(T, layer.H, device=DEVICE, dtype=DTYPE)
    ids = torch.stack([torch.randperm(layer.E - 1)[: layer.A] for _ in range(T)]).to(DEVICE)
    if T > 2:
        ids[1, 0], ids[2, 1] = layer.E + 1, ids[2, 0]
    return x, ids, torch.rand(T, layer.A, device=DEVICE) + 0.1


def poison():
    """Memory that was used before holds NaN: what nobody wrote is seen."""
    torch.full((1 << 26 if GPU else 1 << 16,), float("nan"), device=DEVICE)


@pytest.mark.parametrize(
    "layer, bits",
    mostly_slow(CELLS, lambda layer, bits: GPU or bits == 4),
    ids=lambda x: getattr(x, "name", str(x)),
)
def test_layers_of_real_sizes(layer, bits):
    arena, (first, second) = make(layer, bits, symmetric=bits != MIXED)
    for T in TOKENS:
        x, ids, gates = batch(layer, T)
        poison()
        y = routed_experts(x, ids, gates, arena, SILU)
        wanted = layer_reference(x, ids, gates, first, second, SILU)
        check_layer(y, wanted, DTYPE, f"{layer.name}, {bits} bits, {T} tokens")
        poison()
        assert torch.equal(y, routed_experts(x, ids, gates, arena, SILU)), "other bits twice"


@pytest.mark.parametrize("bits", MIXED if GPU else [4])
@pytest.mark.parametrize("n, k", [(4096, 2048), (151_936, 2048)] if GPU else [(130, 288)])
def test_linears_of_real_sizes(n, k, bits):
    stored = random_matrices(1, n, k, bits, -1, DTYPE, DEVICE)
    arena = build_arena([stored], DTYPE, device_table(DEVICE)[0].order, DEVICE, False)
    for M in (1, 7, 64, 512) if GPU else (1, 7):
        x = torch.randn(M, k, device=DEVICE, dtype=DTYPE)
        check_layer(linear(x, arena), x.float() @ dequantize(stored[0])[0].T, DTYPE, f"{M} rows")


@on_gpus
@pytest.mark.parametrize("bits", [4, MIXED], ids=str)
def test_a_cuda_graph_computes_what_its_launches_do(bits):
    layer = Layer("small", 16, 4, 1024, 512)
    arena, _ = make(layer, bits)
    for T in (1, 8, 100):
        x, ids, gates = batch(layer, T)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            routed_experts(x, ids, gates, arena, SILU)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = routed_experts(x, ids, gates, arena, SILU)
        for _ in range(3):
            for old, new in zip((x, ids, gates), batch(layer, T), strict=True):
                old.copy_(new)
            graph.replay()
            assert torch.equal(y, routed_experts(x, ids, gates, arena, SILU))


@on_gpus
@pytest.mark.parametrize("fused", [True, False])
def test_a_block_compiles_into_one_graph(fused):
    layer = Layer("small", 16, 4, 1024, 512)
    _, stacks = make(layer, 4)
    joined = [stacked(stack) for stack in stacks]
    known = SILU if fused else None

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.router = nn.Linear(layer.H, layer.E, device=DEVICE, dtype=DTYPE)
            self.experts = ArenaStack(joined, DTYPE, DEVICE, known, paired=True)

        def forward(self, x):
            gates, ids = self.router(x).softmax(-1).topk(layer.A)
            return x + self.experts.experts(x, ids, gates, SILU)

    block = Block().requires_grad_(False)
    compiled = torch.compile(block, fullgraph=True)
    for T in (1, 8):
        x = torch.randn(T, layer.H, device=DEVICE, dtype=DTYPE)
        assert_close(compiled(x).float(), block(x).float(), 5e-2, 5e-3)


@pytest.mark.slow
def test_slots_compute_what_everything_resident_does():
    """Copies on a stream of their own arrive before they are read, step after step."""
    layer = Layer("small", 16, 4, 1024, 512) if GPU else Layer("toy", 8, 2, 64, 32, 32)
    pairs, previous = [], None
    for _ in range(2):
        _, stacks = make(layer, 4)
        joined = [stacked(stack) for stack in stacks]
        host = torch.device("cpu")
        resident = ArenaStack(joined, DTYPE, DEVICE, SILU, paired=True)
        slow = SlotStack(ArenaStack(joined, DTYPE, DEVICE, SILU, True, home=host), 5, DEVICE)
        if previous is not None:
            previous.link(slow)
        previous = slow
        pairs.append((resident, slow))
    for step in range(100 if GPU else 6):
        T = 1 if step % 5 else 7
        for resident, slow in pairs:
            x, ids, gates = batch(layer, T)
            wanted = resident.experts(x, ids, gates, SILU)
            assert_close(slow.experts(x, ids, gates, SILU).float(), wanted.float(), 5e-2, 5e-3)
