"""Experts on the GPU, on the CPU and copied, beside an arena that holds all of them."""

from dataclasses import replace

import pytest
import torch
from helpers import DEVICE, assert_close

from qmoe.config import Scheme
from qmoe.format.quantized import common
from qmoe.kernels.activation import Activation
from qmoe.kernels.arena_stack import ArenaStack
from qmoe.kernels.cpu.stack import uses_cpu_kernels
from qmoe.kernels.hosted.hybrid import AT_ONCE, How, HybridStack, Staging, measured_rates
from qmoe.kernels.hosted.placement import Rates
from qmoe.solvers.rtn import rtn

E, A, H, I = 12, 3, 64, 32  # noqa: E741
SILU = Activation("silu")
ON_CPU = Rates(copy=1.0, read=1e-12, row=0.0, known="assumed")
COPIED = Rates(copy=1e-12, read=1.0, row=1.0, known="assumed")
BOTH = Rates(copy=1.0, read=0.4, row=0.4, known="assumed")  # experts with many rows are copied

pytestmark = pytest.mark.skipif(
    not uses_cpu_kernels(torch.device("cpu")), reason="the C kernels are not installed"
)


class LazyCopier:
    """A slow bus: what was asked for arrives at `wait`, until then the target is garbage."""

    def __init__(self):
        self.started, self.copied = [], 0

    def start(self, source, target):
        target.fill_(255)
        self.started.append((source, target))
        self.copied += 1

    def wait(self):
        for source, target in self.started:
            target.copy_(source)
        self.started.clear()


def made(hot, rates, activation=SILU, bits=4):
    """An arena of all experts, and a hybrid of them."""
    with torch.device("cpu"):
        scheme = Scheme(bits, 32)
        stacks = [
            rtn(torch.randn(E, 2 * I, H) * H**-0.5, scheme, torch.float32),
            rtn(torch.randn(E, H, I) * I**-0.5, scheme, torch.float32),
        ]
        if bits == 8:  # some of them in 4
            widths = [4 if e % 3 else 8 for e in range(E)]
            wide, differ = common(scheme, widths)
            narrow = torch.tensor([b == 4 for b in widths])[:, None, None]
            stacks = [
                replace(s, q=torch.where(narrow, s.q.clamp(-8, 7), s.q), scheme=wide, widths=differ)
                for s in stacks
            ]
        options = dict(activation=activation, paired=activation is not None)
        whole = ArenaStack(stacks, torch.float32, DEVICE, **options)
        largest = max(length for _, length in whole.arena.ranges())
        staging = Staging(DEVICE, largest, LazyCopier())
        staging.rates = rates
        how = How(staging, True)
        return whole, HybridStack(stacks, torch.float32, DEVICE, activation, hot, how)


def between(product):
    gate, up = product.chunk(2, -1)
    return torch.nn.functional.silu(gate) * up


def given(T, generator=None):
    ids = torch.stack([torch.randperm(E)[:A] for _ in range(T)])
    ids[0, 0] = E  # no expert
    return torch.randn(T, H), ids, torch.rand(T, A)


@pytest.mark.parametrize(
    "hot, rates",
    [([1, 4, 5, 9], ON_CPU), ([1, 4, 5, 9], COPIED), ([0, 11], BOTH), ([], BOTH)],
    ids=["cpu", "copied", "both", "nothing_hot"],
)
def test_where_experts_lie_changes_nothing(hot, rates):
    whole, hybrid = made(hot, rates)
    for T in (1, 9):
        x, ids, gates = given(T)
        assert_close(hybrid.experts(x, ids, gates, between), whole.experts(x, ids, gates, between))
    cold = hybrid.how.staging.copier.copied
    assert (cold == 0) == (rates is ON_CPU)


def test_experts_of_different_widths():
    whole, hybrid = made([2, 3], BOTH, bits=8)
    x, ids, gates = given(9)
    assert_close(hybrid.experts(x, ids, gates, between), whole.experts(x, ids, gates, between))


def test_an_activation_that_is_not_fused_and_biases():
    whole, hybrid = made([2, 3], BOTH, activation=None)
    biases = (torch.randn(E, 2 * I), torch.randn(E, H))
    for T in (1, 9):
        x, ids, gates = given(T)
        want = whole.experts(x, ids, gates, between, biases)
        assert_close(hybrid.experts(x, ids, gates, between, biases), want)


def test_assignments_are_counted():
    _, hybrid = made([0, 1], ON_CPU)
    ids = torch.tensor([[0, 2, E], [1, 0, 5]])
    hybrid.experts(torch.randn(2, H), ids, torch.rand(2, A), between)
    assert (hybrid.hits, hybrid.misses) == (3, 2)


def test_no_expert_at_all():
    _, hybrid = made([], ON_CPU)
    y = hybrid.experts(torch.randn(2, H), torch.full((2, A), E), torch.rand(2, A), between)
    assert y.shape == (2, H) and not y.any()


def test_the_copies_in_host_memory_are_never_written():
    _, hybrid = made([0], COPIED)
    before = hybrid.cold[0].buffer.clone(), hybrid.cold[0].table.clone()
    x, ids, gates = given(9)
    hybrid.experts(x, ids, gates, between)
    assert hybrid.how.staging.copier.copied > AT_ONCE  # more than one half of the slots
    assert torch.equal(hybrid.cold[0].buffer, before[0])
    assert torch.equal(hybrid.cold[0].table, before[1])


def test_each_expert_lies_on_the_device_or_in_host_memory():
    whole, hybrid = made([3, 7], ON_CPU)
    ranges = whole.arena.ranges()
    assert hybrid.hot.buffer.nbytes == sum(ranges[e][1] for e in (3, 7))
    assert hybrid.cold[0].buffer.nbytes == sum(
        r[1] for e, r in enumerate(ranges) if e not in (3, 7)
    )
    assert hybrid.packed_bytes() == whole.packed_bytes()
    moved = [name for name, _ in hybrid.named_buffers()]
    assert not any(name.startswith(("cold", "beside")) for name in moved)


def test_rates_are_those_of_this_machine():
    _, hybrid = made([3, 7], ON_CPU)
    nbytes = hybrid.ranges[0][1]
    with torch.device("cpu"):
        rates = measured_rates(DEVICE, hybrid.beside[0], H, nbytes)
    assert 0 < rates.read < 1e-3 and 0 <= rates.row < rates.read
    assert rates.known.startswith("measured")
