"""Packed experts against the definition of a MoE, on the weights the packed bytes stand for."""

import pytest
import torch
from helpers import assert_close, moe_inputs

from qmoe.config import Scheme
from qmoe.format.grid import dequantize
from qmoe.kernels.moe import _together, moe_forward
from qmoe.kernels.reference import moe_reference
from qmoe.kernels.stack import PackedStack, choose_form
from qmoe.solvers.rtn import rtn


def silu_gate(product: torch.Tensor) -> torch.Tensor:
    gate, up = product.chunk(2, -1)
    return torch.nn.functional.silu(gate) * up


CASES = [
    # T, A, E, H, I
    (9, 2, 6, 64, 32),  # one expert empty, one with a single token
    (1, 4, 8, 64, 32),  # one token: decode
    (40, 1, 5, 64, 96),  # top-1
    (5, 3, 3, 96, 32),  # every expert gets every token
    (300, 2, 4, 64, 32),  # many rows per expert: the dense int8 product
]


@pytest.mark.parametrize("T, A, E, H, I", CASES)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group, symmetric", [(32, True), (32, False), (-1, True), (-1, False)])
@pytest.mark.usefixtures("nan_empty")
def test_float32_equals_the_reference(T, A, E, H, I, bits, group, symmetric):  # noqa: E741
    x, ids, gates, first, second = moe_inputs(T, A, E, H, I)
    a, b = (rtn(w, Scheme(bits, group, symmetric), torch.float32) for w in (first, second))
    got = moe_forward(
        x, ids, gates, PackedStack(a, torch.float32), PackedStack(b, torch.float32), silu_gate
    )
    expected = moe_reference(x, ids, gates, dequantize(a), dequantize(b), silu_gate)
    assert_close(got, expected)


@pytest.mark.parametrize("T, A, E, H, I", CASES)
@pytest.mark.parametrize(
    "scheme, form",
    [
        (Scheme(4, 32, True), "int4"),
        (Scheme(4, 32, False), "int4"),
        (Scheme(4, -1, True), "int4"),  # one scale per channel, as groups of one scale
        (Scheme(8, -1, True), "int8"),
        (Scheme(2, 32, True), "plain"),
        (Scheme(3, 32, False), "plain"),
        (Scheme(8, 32, True), "plain"),
    ],
    ids=str,
)
@pytest.mark.usefixtures("nan_empty")
def test_bfloat16_forms_equal_the_reference(T, A, E, H, I, scheme, form):  # noqa: E741
    x, ids, gates, first, second = moe_inputs(T, A, E, H, I)
    x = x.bfloat16()
    a, b = (rtn(w, scheme, torch.bfloat16) for w in (first, second))
    stacks = [PackedStack(q, torch.bfloat16) for q in (a, b)]
    assert stacks[0].form == form
    got = moe_forward(x, ids, gates, *stacks, silu_gate)
    expected = moe_reference(x.float(), ids, gates, dequantize(a), dequantize(b), silu_gate)
    assert_close(got, expected, most=8e-2, rms=2e-2)  # bfloat16 keeps 8 bits


@pytest.mark.parametrize("rows", [1, 5, 1000])
@pytest.mark.parametrize("biased", [False, True])
def test_how_many_experts_are_computed_together_changes_nothing(monkeypatch, rows, biased):
    monkeypatch.setattr("qmoe.kernels.moe.ROWS", rows)
    x, ids, gates, first, second = moe_inputs(9, 2, 6, 64, 32)
    biases = (torch.randn(6, 64), torch.randn(6, 64)) if biased else (None, None)
    a, b = (rtn(w, Scheme(4, 32), torch.float32) for w in (first, second))
    stacks = [PackedStack(q, torch.float32) for q in (a, b)]
    got = moe_forward(x, ids, gates, *stacks, silu_gate, biases)
    expected = torch.zeros(9, 64)
    for t in range(9):
        for gate, e in zip(gates[t], ids[t].tolist(), strict=True):
            if e < 6:
                mid = dequantize(a)[e] @ x[t] + (biases[0][e] if biased else 0)
                y = dequantize(b)[e] @ silu_gate(mid) + (biases[1][e] if biased else 0)
                expected[t] += gate * y
    assert_close(got, expected)


@pytest.mark.parametrize(
    "ends, runs",
    [
        ([0, 0, 0], []),
        ([0, 2, 2, 4], [[(1, 0, 2), (3, 2, 4)]]),
        ([3, 5, 5, 9, 10], [[(0, 0, 3)], [(1, 3, 5)], [(3, 5, 9)], [(4, 9, 10)]]),
    ],
)
def test_runs_skip_empty_experts_and_stay_short(monkeypatch, ends, runs):
    monkeypatch.setattr("qmoe.kernels.moe.ROWS", 4)
    assert list(_together(ends)) == runs


def test_all_tokens_on_one_expert():
    x, ids, gates, first, second = moe_inputs(12, 1, 4, 64, 32)
    ids[:] = 2
    a, b = (rtn(w, Scheme(4, 32), torch.float32) for w in (first, second))
    stacks = [PackedStack(q, torch.float32) for q in (a, b)]
    got = moe_forward(x, ids, gates, *stacks, silu_gate)
    assert_close(got, moe_reference(x, ids, gates, dequantize(a), dequantize(b), silu_gate))


def test_sentinel_ids_go_to_no_expert():
    x, ids, gates, first, second = moe_inputs(6, 2, 4, 64, 32)
    ids[2] = 4  # transformers' sentinel is the number of experts
    ids[3, 0] = 4
    a, b = (rtn(w, Scheme(4, 32), torch.float32) for w in (first, second))
    stacks = [PackedStack(q, torch.float32) for q in (a, b)]
    got = moe_forward(x, ids, gates, *stacks, silu_gate)
    assert (got[2] == 0).all()
    assert_close(got, moe_reference(x, ids, gates, dequantize(a), dequantize(b), silu_gate))


def test_no_tokens_at_all():
    _, ids, gates, first, second = moe_inputs(2, 2, 4, 64, 32)
    stacks = [
        PackedStack(rtn(w, Scheme(4, 32), torch.float32), torch.float32) for w in (first, second)
    ]
    assert moe_forward(torch.empty(0, 64), ids[:0], gates[:0], *stacks, silu_gate).shape == (0, 64)


@pytest.mark.parametrize(
    "n, k, scheme, dtype, form",
    [
        (48, 64, Scheme(4, 32), torch.bfloat16, "int4"),
        (40, 64, Scheme(4, 32), torch.bfloat16, "plain"),  # N is no multiple of 16
        (48, 80, Scheme(4, -1), torch.bfloat16, "plain"),  # no kernel group divides K
        (48, 64, Scheme(4, 32), torch.float32, "plain"),  # torch's kernel is slow in float32
        (48, 64, Scheme(8, -1, False), torch.bfloat16, "plain"),  # zero points
    ],
)
def test_form_choice_and_product(n, k, scheme, dtype, form):
    quantized = rtn(torch.randn(2, n, k) * k**-0.5, scheme, dtype)
    assert choose_form(quantized, dtype, torch.device("cpu")) == form
    x = torch.randn(5, k).to(dtype)
    got = PackedStack(quantized, dtype).matmul(x, 1)
    most = 1e-4 if dtype == torch.float32 else 5e-2
    assert_close(got, x.float() @ dequantize(quantized)[1].T, most=most, rms=most / 4)


def test_packed_bytes_are_packed():
    for bits in (2, 3, 4, 8):
        stack = PackedStack(
            rtn(torch.randn(2, 64, 128), Scheme(bits, 128), torch.bfloat16), torch.bfloat16
        )
        assert stack.packed.nbytes == 2 * 64 * 128 * bits // 8
