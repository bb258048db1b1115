"""The search for EXL3's codes and products with them, in C, against slow definitions."""

import pytest
import torch
import torch.nn.functional as F

from qmoe.config import CHANNEL, Scheme
from qmoe.format.exl3 import codebook_values, from_tiles, states_of, tiles_of
from qmoe.format.trellis import Codes, Trellis, padded
from qmoe.kernels.activation import Activation
from qmoe.kernels.cpu import library
from qmoe.kernels.cpu.encode import encode
from qmoe.kernels.cpu.trellis_ops import code_table
from qmoe.kernels.cpu.trellis_stack import TrellisStack

lib = library.library()
pytestmark = pytest.mark.skipif(lib is None, reason="installed without a C compiler")
TIERS = [n for n in library.NAMES if lib is not None and lib.qmoe_find_tier(n.encode()) >= 0]
SILU = Activation("silu")


@pytest.mark.parametrize("rate", [1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 8.0])
def test_what_is_found_is_a_ring_and_near(rate):
    wanted = torch.randn(3, 256) * 0.9
    states, errors = encode(wanted, rate, "mul1", 32)
    assert torch.equal(states_of(tiles_of(states, rate)), states.long())  # every bit string is one
    found = codebook_values("mul1")[states.long()]
    torch.testing.assert_close((wanted - found).square().sum(1), errors, rtol=1e-3, atol=1e-3)
    # Twice the distortion of the best code there can be, and a bit for few bits.
    assert errors.mean() / 256 < 0.81 * (2 * 4**-rate + 0.01)


def test_all_states_are_better_than_some():
    wanted = torch.randn(2, 256) * 0.95
    best = encode(wanted, 2.0, "mul1", 0)[1].mean()
    few, more = (encode(wanted, 2.0, "mul1", beam)[1].mean() for beam in (16, 512))
    assert best <= 1.001 * more < few
    assert more < 1.15 * best


@pytest.mark.parametrize("codebook", ["mcg", "3inst"])
def test_other_codebooks_are_searched_too(codebook):
    wanted = torch.randn(4, 256) * 1.2
    errors = encode(wanted, 3.0, codebook, 64)[1]
    assert errors.mean() / 256 / 1.2**2 < 0.03


@pytest.mark.parametrize("rate", [2.0, 3.0, 3.5, 6.0])
def test_tiers_and_threads_find_the_same(rate):
    metric = metrics(3)
    wanted, count = torch.randn(9, 256), torch.get_num_threads()
    first = [encode(wanted, rate, "mul1", 48, "scalar", D)[0] for D in (None, metric)]
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            for tier in TIERS:
                for D, same in zip((None, metric), first, strict=True):
                    assert torch.equal(encode(wanted, rate, "mul1", 48, tier, D)[0], same), tier
    finally:
        torch.set_num_threads(count)


def metrics(count):
    mix = torch.randn(count, 16, 5)
    return mix @ mix.mT + 0.3 * torch.eye(16)


def errors_under(metric, wanted, states):
    """Of every tile the sum over its columns e of e' D e, by definition."""
    E = from_tiles((wanted - codebook_values("mul1")[states.long()])[:, None, None])
    each = metric.repeat_interleave(len(wanted) // len(metric), 0)
    return (E * (each @ E)).sum((1, 2))


@pytest.mark.parametrize("rate", [1.5, 2.0, 4.0])
def test_the_error_under_a_metric_is_less_and_told(rate):
    wanted, metric = torch.randn(6, 256) * 0.8, metrics(2)
    states, told = encode(wanted, rate, "mul1", 64, metric=metric)
    assert torch.equal(states_of(tiles_of(states, rate)), states.long())
    found = errors_under(metric, wanted, states)
    torch.testing.assert_close(found, told, rtol=1e-3, atol=1e-3)
    without = errors_under(metric, wanted, encode(wanted, rate, "mul1", 64)[0])
    assert found.sum() < 0.5 * without.sum()


def test_a_metric_of_ones_is_none():
    wanted = torch.randn(2, 256)
    plain, same = (encode(wanted, 2.0, "mul1", 32, metric=m) for m in (None, torch.eye(16)[None]))
    assert torch.equal(plain[0], same[0])


def random_codes(E, n, k, rate, codebook="mul1"):
    tiles = torch.randint(
        -(1 << 15), 1 << 15, (E, padded(k) // 16, padded(n) // 16, int(16 * rate))
    )
    suh = torch.randn(E, padded(k)).half()
    svh = (torch.randn(E, padded(n)) / k**0.5).half()
    return Codes(tiles.to(torch.int16), suh, svh, codebook, n, k)


def layer(E, H, I, rate, codebook="mul1"):  # noqa: E741
    scheme = Scheme(rate, CHANNEL, codebook=codebook)
    first = (random_codes(E, I, H, rate, codebook), random_codes(E, I, H, rate, codebook))
    return [Trellis(first, scheme), Trellis((random_codes(E, H, I, rate, codebook),), scheme)]


def gated(product):
    gate, up = product.chunk(2, -1)
    return F.silu(gate) * up


def near(found, wanted, most):
    assert torch.isfinite(found.float()).all()
    error = (found.float() - wanted.float()).norm() / wanted.float().norm()
    assert error < most, float(error)


CASES = {
    "an empty expert, sentinels": lambda: (
        torch.tensor([[0, 3], [4, 9], [7, 0]]),
        torch.rand(3, 2),
    ),
    "one token": lambda: (torch.tensor([[2, 0, 3]]), torch.rand(1, 3)),
    "all on one expert": lambda: (torch.full((140, 1), 3), torch.rand(140, 1)),
    "the same expert twice": lambda: (torch.tensor([[2, 2], [1, 2]]), torch.rand(2, 2)),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("rate, codebook", [(2, "mul1"), (2.5, "mul1"), (5, "mul1"), (3, "mcg")])
@pytest.mark.usefixtures("nan_empty")
def test_experts_equal_the_definition(case, rate, codebook):
    ids, gates = CASES[case]()
    stacks = layer(4, 130, 72, rate, codebook)  # sizes that are filled up
    x, biases = torch.randn(len(ids), 130), (torch.randn(4, 144), torch.randn(4, 130))
    exact = TrellisStack(stacks, torch.float32, SILU)
    wanted = exact.experts(x, ids, gates, gated, biases)
    for fused in (SILU, None):
        stack = TrellisStack(stacks, torch.bfloat16, fused)
        near(stack.experts(x, ids, gates, gated, biases), wanted, 0.03)
    near(stack.experts(x.bfloat16(), ids, gates, gated, biases), wanted, 0.04)


def test_no_expert_at_all_gives_zeros():
    stack = TrellisStack(layer(2, 128, 128, 2), torch.bfloat16, SILU)
    ids, gates = torch.tensor([[2, -1]]), torch.rand(1, 2)
    assert not stack.experts(torch.randn(1, 128), ids, gates, gated).any()


@pytest.mark.parametrize("T", [1, 4, 70])  # an expert has one row, one to four of them, or many
@pytest.mark.parametrize("rate", [1, 1.5, 2, 3, 3.5, 4, 6, 7.5, 8])
def test_tiers_and_threads_give_the_same_bits(monkeypatch, rate, T):
    stack = TrellisStack(layer(3, 256, 128, rate), torch.bfloat16, SILU)
    x, ids, gates = torch.randn(T, 256), torch.randint(0, 3, (T, 2)), torch.rand(T, 2)
    if T == 4:
        ids = torch.tensor([[0, 1], [0, 1], [0, 1], [0, 2]])
    found, count = [], torch.get_num_threads()
    for tier in TIERS:
        monkeypatch.setattr(
            "qmoe.kernels.cpu.trellis_ops.tier", lambda t=tier: lib.qmoe_find_tier(t.encode())
        )
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(stack.experts(x, ids, gates, gated))
    torch.set_num_threads(count)
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_a_linear_equals_its_matrix():
    scheme = Scheme(4, CHANNEL, codebook="mul1")
    stack = TrellisStack([Trellis((random_codes(1, 300, 130, 4),), scheme)], torch.bfloat16)
    for rows in (1, 5, 65):
        x = torch.randn(rows, 130)
        near(stack.matmul(x, 0), x @ stack.expand(0).float().T, 0.02)


@pytest.mark.parametrize("codebook", ["mul1", "mcg", "3inst"])
def test_eight_bits_stand_for_the_values(codebook):
    table, step, offset = code_table(codebook)
    error = step * (table.float() - 128) + offset - codebook_values(codebook)
    assert error.std() < 0.01 * codebook_values(codebook).std()
    assert error.mean().abs() < 1e-4
