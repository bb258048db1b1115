"""The packed forms that layers of vLLM hold compute what the dequantized matrices do."""

import pytest
import torch
from helpers import stored, weight
from torch.nn import functional as F

from qmoe.errors import UnsupportedModelError
from qmoe.format.hadamard import rotate
from qmoe.kernels.activation import Activation
from qmoe.kernels.cpu.library import OFF, VARIABLE, tier
from qmoe.vllm_plugin.forms import Piece, PlainPiece, activation_of, packed
from qmoe.vllm_plugin.matrices import join_rows, read

needs_kernels = pytest.mark.skipif(tier() is None, reason="no C kernels here")


@needs_kernels
@pytest.mark.parametrize("rotation", [0, 64])
def test_a_piece_is_the_product_with_its_rows(rotation):
    matrix = read(stored(3, 32, symmetric=False), "w")
    x = torch.randn(5, 256)
    y = Piece(matrix, rotation, torch.float32, "w")(x)
    assert torch.allclose(y, rotate(x, rotation) @ weight(matrix).T, rtol=1e-4, atol=1e-4)
    assert torch.equal(PlainPiece(weight(matrix))(x), x @ weight(matrix).T)


@needs_kernels
@pytest.mark.parametrize("name", ["silu", "relu2_no_mul"])
def test_experts_of_several_widths(name):
    """Experts of 2, 3, 4 and 8 bits, one without tokens, and ids of other processes' experts."""
    gated = name == "silu"
    first, second = [], []
    for e, bits in enumerate((2, 3, 4, 8, 4)):
        rows = [read(stored(bits, 64, n=64, seed=10 * e + i), "w") for i in range(1 + gated)]
        first += join_rows(rows)
        second.append(read(stored(bits, 32, n=256, k=64, seed=10 * e + 5), "w"))
    between = activation_of(name, None, None, None, "w")
    fused = between if isinstance(between, Activation) else None
    stack = packed([first, second], torch.float32, fused, "w")
    x, gates = torch.randn(4, 256), torch.rand(4, 2)
    ids = torch.tensor([[0, 1], [2, 3], [3, 5], [5, 5]])
    y = stack.experts(x, ids, gates, between)
    expected = torch.zeros(4, 256)
    for t in range(4):
        for gate, e in zip(gates[t], ids[t].tolist(), strict=True):
            if e < 5:
                mid = x[t] @ weight(first[e]).T
                mid = F.silu(mid[:64]) * mid[64:] if gated else F.relu(mid) ** 2
                expected[t] += gate * (mid @ weight(second[e]).T)
    assert torch.allclose(y, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())
    assert not y[3].any()


def test_activations_by_vllms_names():
    assert activation_of("gelu_tanh", None, None, None, "w") == Activation("gelu_tanh")
    found = activation_of("swigluoai_uninterleave", 1.5, 1.0, 6.0, "w")
    assert found == Activation("clamped_swiglu", 1.5, 6.0)
    assert activation_of("swigluoai", None, None, None, "w") == Activation("clamped_swiglu")
    for name, limit in (("swigluoai", 5.0), ("silu", 7.0), ("situ", None)):
        with pytest.raises(UnsupportedModelError, match=f"w: qmoe has no activation '{name}'"):
            activation_of(name, None, None, limit, "w")


def test_without_c_kernels_vllm_is_refused(monkeypatch):
    monkeypatch.setenv(VARIABLE, OFF)
    tier.cache_clear()
    try:
        with pytest.raises(UnsupportedModelError, match="needs its C kernels"):
            Piece(read(stored(), "w"), 0, torch.float32, "layers.0.o_proj")
    finally:
        tier.cache_clear()
