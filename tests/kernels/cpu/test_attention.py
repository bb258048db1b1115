"""Attention and RMS norms in C against float64, every instruction set against the scalar one."""

import math

import pytest
import torch

from qmoe.kernels.cpu import attention as ops
from qmoe.kernels.cpu import library

lib = library.library()
pytestmark = pytest.mark.skipif(lib is None, reason="installed without a C compiler")


def number(name: str) -> int:
    return -1 if lib is None else int(lib.qmoe_find_tier(name.encode()))


TIERS = [name for name in library.NAMES if number(name) >= 0]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def reference(q, k, v, mask, scale, causal):
    group = q.shape[1] // k.shape[1]
    q, k, v = (x.double() for x in (q, k, v))
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = q @ k.mT * scale
    if causal:
        hidden = torch.ones(scores.shape[2:]).triu(1).bool()
        scores = scores.masked_fill(hidden, -math.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    return (scores.softmax(-1).nan_to_num() @ v).transpose(1, 2)


SIZES = [
    # B, H, key heads, T, S, D, V
    (1, 1, 1, 1, 1, 16, 16),
    (1, 2, 2, 1, 1, 7, 5),  # one key, odd widths
    (2, 6, 2, 3, 50, 40, 24),  # keys that end within a block
    (1, 8, 2, 37, 37, 16, 16),
    (1, 4, 4, 70, 70, 96, 64),  # several parts of queries
    (1, 4, 1, 1, 300, 32, 32),  # few queries: the keys are shared out
    (2, 5, 5, 8, 700, 192, 128),
    (1, 2, 1, 9, 300, 256, 256),  # the widest, one query too many to share keys out
]


def some(size, dtype=torch.float32):
    B, H, G, T, S, D, V = size
    made = torch.randn(B, H, T, D), torch.randn(B, G, S, D), torch.randn(B, G, S, V)
    return [x.to(dtype) for x in made]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("tier", TIERS)
def test_against_float64(monkeypatch, tier, size, dtype):
    B, H, G, T, S, D, V = size
    q, k, v = some(size, dtype)
    masks = {"all": None, "one for all heads": torch.rand(B, 1, T, S) > 0.5}
    masks["of each head"] = torch.rand(B, H, T, S) > 0.5
    monkeypatch.setattr(ops, "tier", lambda: number(tier))
    for name, mask in masks.items():
        for causal in (False, True) if T == S else (False,):
            wanted = reference(q, k, v, mask, D**-0.5, causal)
            y = ops.attention_now(q, k, v, mask, D**-0.5, causal)
            assert y.shape == (B, T, H, V) and y.dtype == dtype
            error = (y - wanted).abs().max() / wanted.abs().max().clamp_min(1e-9)
            assert error < (2e-6 if dtype == torch.float32 else 5e-3), (name, causal)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_instruction_sets_and_threads_change_no_bit(monkeypatch, size):
    q, k, v = some(size, torch.bfloat16)
    mask = torch.rand(size[0], 1, size[3], size[4]) > 0.2
    found = []
    for tier in TIERS:
        monkeypatch.setattr(ops, "tier", lambda tier=tier: number(tier))
        for threads in (1, 3):
            monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
            found.append(ops.attention_now(q, k, v, mask, 0.2, False))
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_any_strides():
    q = torch.randn(2, 5, 4, 16).transpose(1, 2)
    k = torch.randn(2, 2, 40, 16)[:, :, 3:20]
    v = torch.randn(2, 2, 16, 17).transpose(2, 3)  # the last dimension is not contiguous
    mask = (torch.rand(1, 1, 1, 17) > 0.3).expand(2, 1, 5, 17)
    y = ops.attention_now(q, k, v, mask, 0.25, False)
    torch.testing.assert_close(y, reference(q, k, v, mask, 0.25, False).float())


def test_a_query_that_sees_nothing_gets_zeros():
    for S in (4, 300):
        q, k, v = some((1, 2, 2, 2, S, 16, 16))
        mask = torch.ones(1, 1, 2, S, dtype=torch.bool)
        mask[:, :, 1] = False
        y = ops.attention_now(q, k, v, mask, 0.25, False)
        assert y[:, 1].abs().max() == 0 and y[:, 0].abs().min() > 0


def test_large_scores_and_values_that_are_not_finite():
    q, k, v = some((1, 1, 1, 2, 300, 16, 16))
    wanted = reference(1e4 * q, k, v, None, 1.0, False).float()
    torch.testing.assert_close(ops.attention_now(1e4 * q, k, v, None, 1.0, False), wanted)
    k[0, 0, 7, 3] = math.nan
    assert ops.attention_now(q, k, v, None, 0.25, False).isnan().all()


@pytest.mark.parametrize("early", [True, False])
@pytest.mark.parametrize("shift", [0.0, 1.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows, width", [(1, 1), (3, 7), (40, 128), (2, 2048), (5, 1000)])
def test_norms(monkeypatch, rows, width, dtype, shift, early):
    x = (3 * torch.randn(rows, width)).to(dtype)
    weight = torch.randn(width).to(dtype)
    kind = ops.RmsNorm(1e-5, shift, early)
    wide = x.double()
    wide = wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
    if early:
        wide = wide.to(dtype).double()
    wanted = wide * (shift + weight.double())
    found = []
    for tier in TIERS:
        monkeypatch.setattr(ops, "tier", lambda tier=tier: number(tier))
        found.append(ops.rms_norm_now(x, weight, kind))
    tolerance = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    torch.testing.assert_close(found[0].double(), wanted, rtol=tolerance, atol=tolerance / 10)
    assert found[0].dtype == dtype
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_schemas_and_fakes():
    q, k, v = some((1, 4, 2, 3, 5, 16, 8))
    mask = torch.ones(1, 1, 3, 5, dtype=torch.bool)
    torch.library.opcheck(torch.ops.qmoe.cpu_attention.default, (q, k, v, mask, 0.2, False))
    torch.library.opcheck(torch.ops.qmoe.cpu_attention.default, (q, k, v, None, 0.2, True))
    arguments = (torch.randn(3, 20), torch.randn(20), 1e-6, 1.0, False)
    torch.library.opcheck(torch.ops.qmoe.cpu_rms_norm.default, arguments)
