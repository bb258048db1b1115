"""Solved experts on disk: the same when they come back, or refused."""

import pytest
import torch

from qmoe.config import Scheme
from qmoe.errors import OutputError
from qmoe.solved.solved_cache import SolvedCache, SolvedExperts
from qmoe.solvers.rtn import rtn
from qmoe.solvers.solve import Solved

NAME = "model.layers.0.mlp.experts"


def some(symmetric, fitted):
    solved = [
        Solved(
            rtn(torch.randn(3, *size), Scheme(4, 32, symmetric), torch.bfloat16),
            [0.1, 0.2, 0.3], {1: 0.05}, [2], {0: 4},
        )
        for size in ((10, 64), (64, 32))
    ]  # fmt: skip
    return SolvedExperts(solved, [1], torch.randn(3, 64, 32) if fitted else None)


@pytest.mark.parametrize("symmetric, fitted", [(True, False), (False, True)])
def test_what_comes_back_is_what_was_saved(tmp_path, symmetric, fitted):
    saved, cache = some(symmetric, fitted), SolvedCache(tmp_path)
    assert not cache.any()
    cache.save(NAME, 3, 6, saved)
    assert cache.any()
    found = cache.load(NAME, 3, 6)
    assert found is not None and found.borrowed == saved.borrowed
    for a, b in zip(found.solved, saved.solved, strict=True):
        assert torch.equal(a.quantized.q, b.quantized.q)
        assert torch.equal(a.quantized.scale, b.quantized.scale)
        assert (a.quantized.zero is None) == symmetric
        assert symmetric or torch.equal(a.quantized.zero, b.quantized.zero)
        assert (a.error, a.damped, a.rounded) == (b.error, b.damped, b.rounded)
        assert a.bounded == b.bounded
    assert (found.refitted is None) != fitted
    assert not fitted or torch.equal(found.refitted, saved.refitted)


def test_other_experts_and_other_modules_are_not_there(tmp_path):
    cache = SolvedCache(tmp_path)
    cache.save(NAME, 3, 6, some(True, False))
    assert cache.load(NAME, 0, 3) is None
    assert cache.load(NAME.replace("0", "1"), 3, 6) is None
    cache.clear()
    assert not cache.any() and cache.load(NAME, 3, 6) is None


@pytest.mark.parametrize("damage", [lambda b: b[:-9], lambda b: b[:-1] + bytes([b[-1] ^ 1])])
def test_damage_is_found(tmp_path, damage):
    cache = SolvedCache(tmp_path)
    cache.save(NAME, 0, 3, some(True, True))
    (file,) = tmp_path.iterdir()
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(OutputError, match="unfinished work is damaged .*; remove it"):
        cache.load(NAME, 0, 3)
