"""Solved matrices that are found again by what they were made from."""

from dataclasses import replace

import pytest
import torch

from qmoe.config import Scheme
from qmoe.errors import OutputError
from qmoe.solved.kept_matrices import KeptMatrices
from qmoe.solvers.rtn import rtn
from qmoe.solvers.solve import Solved

SCHEME = Scheme(3, 32, symmetric=False)


@pytest.fixture
def given():
    torch.manual_seed(0)
    return torch.randn(5, 8, 64), torch.randn(5, 64, 64)


class Solver:
    """Rounds to nearest, and notes how many matrices it was given."""

    def __init__(self, scheme=SCHEME):
        self.scheme, self.counts = scheme, []

    def __call__(self, weight, hessian):
        self.counts.append(len(weight))
        errors = [float(w.abs().sum()) for w in weight]
        made = rtn(weight, self.scheme, torch.bfloat16)
        return Solved(made, errors, {1: 0.5} if len(weight) > 1 else {}, [0], {0: 3})


def test_only_what_is_new_is_solved(tmp_path, given):
    (weight, hessian), make = given, Solver()
    kept = KeptMatrices(tmp_path)
    first = kept.solve(weight[:3], hessian[:3], SCHEME, "gptq", make)
    # Another process, other company, another order.
    order = [4, 1, 0, 3]
    second = KeptMatrices(tmp_path).solve(weight[order], hessian[order], SCHEME, "gptq", make)
    assert make.counts == [3, 2]
    plain = rtn(weight, SCHEME, torch.bfloat16)
    for found, places in ((first, [0, 1, 2]), (second, order)):
        assert torch.equal(found.quantized.q, plain.q[places])
        assert torch.equal(found.quantized.scale, plain.scale[places])
        assert torch.equal(found.quantized.zero, plain.zero[places])
        assert found.quantized.scheme == SCHEME
        assert found.error == [float(weight[e].abs().sum()) for e in places]
    assert first.damped == {1: 0.5} and first.rounded == [0] and first.bounded == {0: 3}
    assert second.damped == {1: 0.5, 3: 0.5}
    assert second.rounded == [0, 2] and second.bounded == {0: 3, 2: 3}


def test_what_was_made_from_something_else_is_not_found(tmp_path, given):
    (weight, hessian), make = given, Solver()
    kept = KeptMatrices(tmp_path)
    one = weight[:1], hessian[:1]
    kept.solve(*one, SCHEME, "gptq", make)
    wide = replace(SCHEME, bits=4)
    kept.solve(weight[:1] + 1, hessian[:1], SCHEME, "gptq", make)
    kept.solve(weight[:1], hessian[:1] + 1, SCHEME, "gptq", make)
    kept.solve(*one, SCHEME, "gptq 0.02", make)
    other = Solver(wide)
    assert kept.solve(*one, wide, "gptq", other).quantized.scheme == wide
    kept.solve(*one, SCHEME, "gptq", make)
    assert make.counts == [1] * 4 and other.counts == [1]


def test_a_damaged_file_is_an_error(tmp_path, given):
    weight, hessian = given
    KeptMatrices(tmp_path).solve(weight, hessian, SCHEME, "gptq", Solver())
    (path,) = tmp_path.glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(OutputError, match="is damaged .*remove"):
        KeptMatrices(tmp_path)
