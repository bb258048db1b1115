"""Heads normalised and rotated in C against torch's own operations, for every instruction set."""

import pytest
import torch

from qmoe.kernels.cpu import attention as attention_ops
from qmoe.kernels.cpu import library
from qmoe.kernels.cpu import rotary as ops
from qmoe.kernels.cpu.attention import RmsNorm, rms_norm_now
from qmoe.kernels.cpu.rotary import HeadNorm, turn_now

lib = library.library()
pytestmark = pytest.mark.skipif(lib is None, reason="installed without a C compiler")
TIERS = [
    int(lib.qmoe_find_tier(name.encode()))
    for name in library.NAMES
    if lib is not None and lib.qmoe_find_tier(name.encode()) >= 0
]
KIND = RmsNorm(1e-6, 0.0, True)


def rotated(x, cos, sin):
    """As families write it: x [T, H, D], cos and sin [T, R]."""
    cos, sin = cos[:, None], sin[:, None]
    turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    first, second = turned.chunk(2, -1)
    return torch.cat([turned * cos + torch.cat((-second, first), -1) * sin, rest], -1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "T, P, heads, D, R", [(1, 1, 32, 128, 128), (6, 3, 3, 20, 10), (400, 400, 5, 64, 32)]
)
def test_same_bits_as_torch(monkeypatch, T, P, heads, D, R, dtype):
    angles = torch.randn(P, R)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    each = torch.arange(T) % P
    queries, keys = torch.randn(T, heads, D).to(dtype), torch.randn(T, 2, D).to(dtype)
    norm = HeadNorm(torch.randn(D).to(dtype), KIND)
    for tier in TIERS:
        monkeypatch.setattr(ops, "tier", lambda tier=tier: tier)
        monkeypatch.setattr(attention_ops, "tier", lambda tier=tier: tier)
        normed = rms_norm_now(keys, norm.weight, norm.kind)
        q, k = queries.clone(), keys.clone()
        turn_now([(q, None), (k, norm)], cos, sin)
        assert q.equal(rotated(queries, cos[each], sin[each]))
        assert k.equal(rotated(normed, cos[each], sin[each]))
