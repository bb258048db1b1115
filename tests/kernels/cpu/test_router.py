"""Routers in C against float64, every instruction set against the scalar one."""

import math

import pytest
import torch

from qmoe.kernels.cpu import library
from qmoe.kernels.cpu import router as ops
from qmoe.kernels.cpu.router import FEW, Routing

lib = library.library()
pytestmark = pytest.mark.skipif(lib is None, reason="installed without a C compiler")
TIERS = [
    int(lib.qmoe_find_tier(name.encode()))
    for name in library.NAMES
    if lib is not None and lib.qmoe_find_tier(name.encode()) >= 0
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def reference(logits, kind):
    """Scores in float64, and ids: of equal logits the first."""
    values, ids = logits.double().sort(dim=-1, descending=True, stable=True)
    values, ids = values[:, : kind.choices], ids[:, : kind.choices]
    return values.softmax(-1) if kind.normed else logits.double().softmax(-1).gather(1, ids), ids


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(
    "T, E, K, A", [(1, 1, 7, 1), (1, 128, 2048, 8), (3, 17, 600, 17), (FEW, 60, 33, 4)]
)
def test_against_float64(monkeypatch, T, E, K, A, normed, dtype):
    x, weight = torch.randn(T, K).to(dtype), (torch.randn(E, K) / K**0.5).to(dtype)
    found = []
    for bias in (None, torch.randn(E).to(dtype)):
        for wide in (False, True):
            kind = Routing(A, normed, wide)
            for tier in TIERS:
                monkeypatch.setattr(ops, "tier", lambda tier=tier: tier)
                found.append(ops.routed_now(x, weight, bias, kind))
            logits, scores, ids = found[-1]
            wanted = x.double() @ weight.double().T + (0 if bias is None else bias.double())
            close = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
            torch.testing.assert_close(logits.double(), wanted, rtol=close, atol=close)
            assert logits.dtype == dtype and scores.dtype == (torch.float32 if wide else dtype)
            right, chosen = reference(logits, kind)
            assert torch.equal(ids, chosen)
            close = 1e-5 if wide else close
            torch.testing.assert_close(scores.double(), right, rtol=close, atol=close / 10)
            for other in found[-len(TIERS) : -1]:
                assert all(a.equal(b) for a, b in zip(found[-1], other, strict=True))


def test_of_equal_experts_the_first(monkeypatch):
    weight = torch.ones(9, 16)
    _, scores, ids = ops.routed_now(torch.ones(2, 16), weight, None, Routing(4, True, True))
    assert ids.tolist() == [[0, 1, 2, 3]] * 2 and (scores == 0.25).all()


def test_what_is_not_finite_is_passed_on():
    x = torch.ones(1, 8)
    x[0, 3] = math.nan
    _, scores, ids = ops.routed_now(x, torch.ones(5, 8), None, Routing(2, True, True))
    assert scores.isnan().all() and sorted(ids[0].tolist()) == [0, 1]
    # One expert's logit alone: it counts as the largest, as in torch.topk.
    weight = torch.ones(5, 8)
    weight[3, 0] = math.nan
    _, scores, ids = ops.routed_now(torch.ones(1, 8), weight, None, Routing(2, True, True))
    assert ids[0, 0] == 3 and scores.isnan().all()


def test_threads_change_no_bit(monkeypatch):
    x, weight, kind = torch.randn(5, 300), torch.randn(70, 300), Routing(6, True, True)
    found = []
    for threads in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        found.append(ops.routed_now(x, weight, None, kind))
    assert all(a.equal(b) for a, b in zip(*found, strict=True))


def test_schema_and_fake():
    arguments = (torch.randn(2, 20), torch.randn(7, 20), torch.randn(7), 3, True, False)
    torch.library.opcheck(torch.ops.qmoe.cpu_routed.default, arguments)
