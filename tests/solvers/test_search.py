"""The search for better grids and integers, against brute force and least squares written out."""

import pytest
import torch
from helpers import assert_close

from qmoe.config import Scheme
from qmoe.format.grid import dequantize, grid_of, round_to_grid
from qmoe.solvers.awq import output_error
from qmoe.solvers.gptq import gptq
from qmoe.solvers.rtn import rtn
from qmoe.solvers.search import Rounded, move_integers, refit_scales

F32 = torch.float32


def problem(E=2, N=12, K=64, M=300):
    W, x = torch.randn(E, N, K), torch.randn(E, M, K) @ torch.randn(E, K, K) * K**-0.5
    return W, x.mT @ x


def start(W, H, scheme):
    """Plain rounding in the search's layout, with the loss of every row."""
    scale, zero = (grid.mT for grid in grid_of(W, scheme, F32))
    size = W.shape[2] // scale.shape[1]
    q = round_to_grid(
        W.mT, scale.repeat_interleave(size, 1), zero.repeat_interleave(size, 1), scheme.bits
    )
    D = W - values(Rounded(q, scale, zero, torch.empty(0))).mT
    return Rounded(q, scale, zero, ((D @ H) * D).sum(2))


def values(at):
    size = at.q.shape[1] // at.scale.shape[1]
    return (at.q - at.zero.repeat_interleave(size, 1)) * at.scale.repeat_interleave(size, 1)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [32, -1])
def test_searching_loses_less_for_every_expert(bits, symmetric, group):
    W, H = problem()
    scheme = Scheme(bits, group, symmetric)
    plain = gptq(W, H, scheme, scale_dtype=F32)
    found = gptq(W, H, scheme, scale_dtype=F32, search_grid=True)
    lost = output_error(dequantize(found.quantized) - W, H)
    assert (lost < output_error(dequantize(plain.quantized) - W, H)).all()
    assert_close(found.lost, lost, most=1e-3, rms=1e-3)
    assert found.quantized.scale.dtype == F32 and (found.quantized.scale > 0).all()


def test_stored_scales_are_those_the_integers_were_chosen_for():
    W, H = problem()
    made = gptq(W, H, Scheme(3, 32), scale_dtype=torch.bfloat16, search_grid=True)
    assert made.quantized.scale.dtype == torch.bfloat16
    lost = output_error(dequantize(made.quantized) - W, H)
    assert_close(made.lost, lost, most=1e-3, rms=1e-3)


def test_refitted_scales_are_the_least_squares_solution():
    W, H = problem(E=1, N=5)
    at = start(W, H, Scheme(3, 32, False))
    fitted = refit_scales(H @ W.mT, H, at, F32)
    root = torch.linalg.cholesky(H[0].double(), upper=True)
    steps = (at.q - at.zero.repeat_interleave(32, 1))[0].double()
    for n in range(5):
        columns = torch.block_diag(steps[:32, n : n + 1], steps[32:, n : n + 1])
        expected = torch.linalg.lstsq(root @ columns, root @ W[0, n].double()[:, None]).solution
        assert_close(fitted[0, :, n].double(), expected[:, 0], most=1e-3, rms=1e-3)


def test_moving_integers_never_loses_and_ends_where_no_single_move_helps():
    W, H = problem(E=2, N=6, K=40)
    scheme = Scheme(2, -1, False)
    at = start(W, H, scheme)
    before = at.loss
    error = W.mT - values(at)
    slope = H @ error
    for _ in range(30):
        old = at.q
        move_integers(W.mT, H, at, error, slope, scheme.bits)
        D = W - values(at).mT
        assert_close(error, D.mT)
        assert_close(slope, H @ D.mT, most=1e-3, rms=1e-3)
        now = ((D @ H) * D).sum(2)
        assert (now <= before * (1 + 1e-5)).all()
        before = now
        if torch.equal(old, at.q):
            break
    for k in range(40):  # brute force over every single integer
        for q in range(-2, 2):
            changed = at.q.clone()
            changed[:, k] = q
            D = W - values(Rounded(changed, at.scale, at.zero, torch.empty(0))).mT
            assert (((D @ H) * D).sum(2) >= before * (1 - 1e-4)).all()


def test_dead_features_and_dead_experts_stay_finite_and_in_place():
    W, H = problem()
    H[0, 5], H[0, :, 5] = 0, 0
    H[1] = 0
    scheme = Scheme(3, 32, False)
    made = gptq(W, H, scheme, scale_dtype=F32, search_grid=True)
    assert made.rounded == [1] and dequantize(made.quantized).isfinite().all()
    assert torch.equal(made.quantized.q[1], rtn(W, scheme, F32).q[1])


@pytest.mark.parametrize("tokens", [1, 3])
def test_experts_with_few_tokens(tokens):
    W, x = torch.randn(1, 8, 64), torch.randn(1, tokens, 64)
    H = x.mT @ x
    made = gptq(W, H, Scheme(2, 32), scale_dtype=F32, search_grid=True)
    lost = output_error(dequantize(made.quantized) - W, H)
    assert made.rounded == [] and lost < output_error(dequantize(rtn(W, Scheme(2, 32), F32)) - W, H)
