"""GPTQ against the paper's algorithm written out for one matrix; edge cases of calibration."""

import pytest
import torch
from helpers import assert_close

from qmoe.config import Scheme
from qmoe.format.grid import dequantize, grid_of, round_to_grid
from qmoe.solvers.awq import Reader, awq_scales, output_error
from qmoe.solvers.gptq import gptq
from qmoe.solvers.rtn import rtn
from qmoe.solvers.solve import solve

F32 = torch.float32


def correlated(E: int, M: int, K: int) -> torch.Tensor:
    """[E, M, K] tokens whose features are correlated, as activations are."""
    return torch.randn(E, M, K) @ torch.randn(E, K, K) * K**-0.5


def gptq_reference(W, H, scheme, act_order, damp):
    """Frantar et al., algorithm 1, for one matrix [N, K] with column by column inverses in float64.

    No blocks and no Cholesky: after each column the inverse Hessian of the rest is recomputed.
    """
    W, H = W.double().clone(), H.double().clone()
    K = W.shape[1]
    H += damp * H.diagonal().mean() * torch.eye(K)
    scale, zero = (g[0].double() for g in grid_of(W.float()[None], scheme, F32))
    group = K // scheme.groups(K)
    diagonal = H.diagonal()
    left = torch.argsort(diagonal, descending=True, stable=True) if act_order else torch.arange(K)
    Q = torch.zeros_like(W)
    for step in range(K):
        i, g = int(left[0]), int(left[0]) // group
        if not act_order and step % group == 0:
            fresh = grid_of(
                W[None, :, i : i + group].float(), Scheme(scheme.bits, -1, scheme.symmetric), F32
            )
            scale[:, g], zero[:, g] = fresh[0][0, :, 0], fresh[1][0, :, 0]
        inverse = torch.linalg.inv(H[left][:, left])
        Q[:, i] = round_to_grid(W[:, i], scale[:, g], zero[:, g], scheme.bits)
        error = (W[:, i] - (Q[:, i] - zero[:, g]) * scale[:, g]) / inverse[0, 0]
        W[:, left] -= error[:, None] * inverse[0]
        left = left[1:]
    return Q


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize(
    "scheme, K",
    [
        (Scheme(4, 32, False), 64),  # inside one block of columns
        (Scheme(2, -1, True), 160),  # a group that spans blocks
        (Scheme(3, 32, False), 160),  # blocks of 128 and 32
    ],
    ids=str,
)
def test_gptq_is_the_papers_algorithm(scheme, K, act_order):
    W, x = torch.randn(2, 12, K), correlated(2, 400, K)
    H = x.mT @ x
    result = gptq(W, H, scheme, scale_dtype=F32, act_order=act_order, damp=0.01)
    assert result.damped == {} and result.rounded == []
    for e in range(2):
        expected = gptq_reference(W[e], H[e], scheme, act_order, 0.01)
        # Values that lie within float32 noise of a rounding boundary may fall either way.
        same = (result.quantized.q[e] == expected).double().mean()
        assert same > 0.995, f"expert {e}: {same:.4f} of the integers agree"


def test_group_boundary_inside_a_block_uses_up_to_date_columns():
    # Groups of 64 with blocks of 128 columns; K = 192 makes the last block short.
    W, x = torch.randn(1, 8, 192), correlated(1, 600, 192)
    H = x.mT @ x
    result = gptq(W, H, Scheme(3, 64, False), scale_dtype=F32, act_order=False)
    expected = gptq_reference(W[0], H[0], Scheme(3, 64, False), False, 0.01)
    assert (result.quantized.q[0] == expected).double().mean() > 0.995


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_gptq_loses_less_output_than_rounding(bits, symmetric):
    scheme = Scheme(bits, 32, symmetric)
    W, x = torch.randn(3, 16, 64), correlated(3, 300, 64)
    H = x.mT @ x
    lost = output_error(dequantize(gptq(W, H, scheme, scale_dtype=F32).quantized) - W, H)
    plain = output_error(dequantize(rtn(W, scheme, F32)) - W, H)
    assert (lost < 0.8 * plain).all()


def test_experts_do_not_disturb_each_other():
    W, x = torch.randn(3, 8, 64), correlated(3, 200, 64)
    H = x.mT @ x
    together = gptq(W, H, Scheme(4, 32), scale_dtype=F32).quantized
    for e in range(3):
        alone = gptq(W[e : e + 1], H[e : e + 1], Scheme(4, 32), scale_dtype=F32).quantized
        assert torch.equal(together.q[e], alone.q[0])


def test_an_expert_without_tokens_is_rounded_and_reported():
    W, x = torch.randn(2, 8, 64), correlated(2, 200, 64)
    H = x.mT @ x
    H[1] = 0
    result = gptq(W, H, Scheme(4, 32, False), scale_dtype=F32)
    assert result.rounded == [1]
    assert torch.equal(result.quantized.q[1], rtn(W, Scheme(4, 32, False), F32).q[1])


@pytest.mark.parametrize("tokens", [1, 3])  # H of rank 1 and 3, singular without damping
def test_an_expert_with_few_tokens_is_solved(tokens):
    W, x = torch.randn(1, 8, 64), torch.randn(1, tokens, 64)
    H = x.mT @ x
    result = gptq(W, H, Scheme(3, 32), scale_dtype=F32)
    assert result.rounded == []
    lost = output_error(dequantize(result.quantized) - W, H)
    assert lost < output_error(dequantize(rtn(W, Scheme(3, 32), F32)) - W, H)


def test_damping_is_raised_until_the_factorization_works_and_reported():
    x = torch.randn(1, 300, 64)
    H = x.mT @ x
    # Not positive definite by a margin that the asked damping does not cover.
    H[0] -= 0.5 * H[0].diagonal().mean() * torch.eye(64)
    result = gptq(torch.randn(1, 8, 64), H, Scheme(4, 32), scale_dtype=F32, damp=0.001)
    assert list(result.damped) == [0] and result.damped[0] > 0.001
    assert result.quantized.scale.isfinite().all()


def test_a_feature_that_was_never_active_does_not_hurt():
    W, x = torch.randn(1, 8, 64), correlated(1, 200, 64)
    x[..., 5] = 0
    result = gptq(W, x.mT @ x, Scheme(4, 32), scale_dtype=F32)
    assert result.rounded == [] and dequantize(result.quantized).isfinite().all()


def test_awq_scales_help_where_few_features_are_loud():
    W, x = torch.randn(2, 16, 64), torch.randn(2, 300, 64)
    x[..., :3] *= 30
    H = x.mT @ x
    s = awq_scales([Reader(W, H, Scheme(3, 32))], scale_dtype=F32, shared=False)[:, None]
    scaled = dequantize(rtn(W * s, Scheme(3, 32), F32)) / s
    plain = dequantize(rtn(W, Scheme(3, 32), F32))
    assert (output_error(scaled - W, H) < 0.9 * output_error(plain - W, H)).all()


def test_awq_shared_scale_serves_the_sum_of_its_readers():
    W, x = torch.randn(2, 16, 64), torch.randn(2, 300, 64)
    x[..., :3] *= 30
    H = x.mT @ x
    readers = [Reader(W[:1], H[:1], Scheme(3, 32)), Reader(W[1:], H[1:], Scheme(8, -1))]
    s = awq_scales(readers, scale_dtype=F32, shared=True)
    assert s.shape == (1, 64) and s.isfinite().all() and s[0, :3].min() > s[0, 3:].max()


def test_awq_leaves_dead_features_alone():
    x = torch.randn(1, 100, 32)
    x[..., 4] = 0
    s = awq_scales(
        [Reader(torch.randn(1, 4, 32), x.mT @ x, Scheme(2, 32))], scale_dtype=F32, shared=False
    )
    assert s[0, 4] == 1 and s.isfinite().all()


@pytest.mark.parametrize("search_grid", [False, True])
def test_reported_error_is_the_output_error(search_grid):
    W, x = torch.randn(2, 8, 64), correlated(2, 100, 64)
    solved = solve(
        W,
        x.mT @ x,
        Scheme(4, 32),
        "gptq",
        scale_dtype=F32,
        act_order=True,
        damp=0.01,
        search_grid=search_grid,
    )
    y, lost = x @ W.mT, x @ (dequantize(solved.quantized) - W).mT
    expected = lost.flatten(1).norm(dim=1) / y.flatten(1).norm(dim=1)
    assert_close(torch.tensor(solved.error), expected, most=1e-3, rms=1e-3)
