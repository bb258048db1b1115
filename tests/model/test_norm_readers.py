"""Which modules read a norm, found while they run."""

import torch
from torch import nn

from qmoe.model.norm_readers import NormReaders, find_norm_readers, with_weights


class Norm(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x):
        return x * self.weight


class Block(nn.Module):
    """`first` is read by q and k, `second` by a router and an MLP, `third` by a convolution."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = Norm(8), Norm(8), Norm(8)
        self.q, self.k = nn.Linear(8, 4), nn.Linear(8, 4)
        self.o, self.router = nn.Linear(4, 8), nn.Linear(8, 3, bias=False)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
        self.mix = nn.Conv1d(8, 8, 1)

    def forward(self, x):
        h = self.first(x)
        x = x + self.o(self.q(h) * self.k(h))
        h = self.second(x)
        x = x + self.mlp(h) * self.router(h).sum(-1, keepdim=True)
        return self.mix(self.third(x).mT).mT


def test_all_readers_of_a_norm_are_found():
    block = Block().requires_grad_(False)
    modules = with_weights(block, "layers.0")
    assert "layers.0.mlp.1" not in modules  # it has no weights
    found = find_norm_readers(modules, lambda: block(torch.randn(2, 5, 8)))
    assert found == [
        NormReaders("layers.0.first", ["layers.0.q", "layers.0.k"]),
        NormReaders("layers.0.second", ["layers.0.mlp.0", "layers.0.router"]),
    ]


def test_hooks_are_gone_afterwards_also_after_an_error():
    block = Block().requires_grad_(False)
    modules = with_weights(block, "")
    try:
        find_norm_readers(modules, lambda: block(torch.randn(2, 5, 7)))
    except RuntimeError:
        pass
    else:
        raise AssertionError("rows of 7 went through a norm of 8")
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in block.modules())
