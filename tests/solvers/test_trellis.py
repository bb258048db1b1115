"""Matrices in EXL3's codes: the Hessian pays, and what may go wrong with one."""

import pytest
import torch

from qmoe.config import CHANNEL, Scheme
from qmoe.format.exl3 import SIDE
from qmoe.kernels.cpu import library
from qmoe.solvers.solve import solve_codes
from qmoe.solvers.trellis import _factor, code_stack

pytestmark = pytest.mark.skipif(library.library() is None, reason="installed without a C compiler")
TWO = Scheme(2, CHANNEL, codebook="mul1")


def problem(E=2, N=96, K=160):
    mix = torch.randn(K, K) * torch.logspace(0, -1.5, K)
    x = torch.randn(E, 600, K) @ mix
    return torch.randn(E, N, K) * (0.1 + torch.rand(N, 1)) * 0.02, x.mT @ x


def loss(D, H):
    return ((D @ H) * D).sum((1, 2))


def test_the_hessian_pays_and_losses_are_told():
    W, H = problem()
    with_it = code_stack(W, H, TWO, damp=0.01, beam=32)
    alone = code_stack(W, None, TWO, damp=0.01, beam=32)
    lost, blind = (loss(c.codes.dequantize() - W, H) for c in (with_it, alone))
    torch.testing.assert_close(lost.double(), with_it.lost, rtol=1e-3, atol=0)
    assert (lost < 0.6 * blind).all()
    assert not with_it.damped and not with_it.alone


def test_experts_are_solved_as_each_alone():
    W, H = problem()
    both = code_stack(W, H, TWO, damp=0.01, beam=16).codes
    each = [code_stack(W[e : e + 1], H[e : e + 1], TWO, damp=0.01, beam=16).codes for e in (0, 1)]
    assert torch.equal(both.trellis, torch.cat([codes.trellis for codes in each]))


def test_parts_of_a_stack_are_coded_each_on_its_own():
    W, H = problem(N=192)
    solved = solve_codes(W, H, TWO, 2, damp=0.01, beam=16)
    assert [part.n for part in solved.quantized.parts] == [96, 96]
    top = code_stack(W[:, :96], H, TWO, damp=0.01, beam=16)
    assert torch.equal(solved.quantized.parts[0].trellis, top.codes.trellis)
    assert all(0 < error < 0.5 for error in solved.error)


def test_the_factor_is_one_of_blocks():
    _, H = problem(E=1, K=64)
    unit = _factor(H, 0.01).unit[0]
    for b in range(0, 64, SIDE):
        assert torch.allclose(unit[b : b + SIDE, b : b + SIDE], torch.eye(SIDE), atol=1e-3)
        assert not unit[b + SIDE :, b : b + SIDE].any()
    damped = H[0] / H[0].diagonal().mean() + 0.01 * torch.eye(64)
    inner = torch.linalg.solve_triangular(unit.double(), damped.double(), upper=True)
    D = torch.linalg.solve_triangular(unit.double(), inner.mT, upper=True)
    blocks = torch.block_diag(*[D[b : b + SIDE, b : b + SIDE] for b in range(0, 64, SIDE)])
    assert (D - blocks).norm() < 1e-4 * D.norm()


def test_without_usable_statistics():
    W, H = problem()
    H[0] = 0
    made = code_stack(W, H, TWO, damp=0.01, beam=16)
    assert made.alone == [0] and made.lost[0] == 0
    assert torch.isfinite(made.codes.dequantize()).all()
    indefinite = torch.eye(160)[None].repeat(2, 1, 1)
    indefinite[1, 0, 0] = -1.5
    made = code_stack(W, indefinite, TWO, damp=0.01, beam=16)
    assert 1 in made.damped or made.alone == [1]


def test_weights_of_zero_and_of_any_size():
    W, H = problem(E=1)
    made = code_stack(torch.zeros_like(W), H, TWO, damp=0.01, beam=16)
    assert made.codes.dequantize().abs().max() < 1e-6
    W[0, 3], W[0, :, 7] = 0, 0
    for size in (1e-6, 1e4):
        made = code_stack(size * W, H, TWO, damp=0.01, beam=16)
        error = loss(made.codes.dequantize() - size * W, H) / loss(size * W, H)
        assert error < 0.1, size
