"""The slot policy as a pure function, and layers whose experts live in a slow memory."""

import weakref

import pytest
import torch
from helpers import DEVICE, assert_close

from qmoe.config import Scheme
from qmoe.kernels.activation import Activation
from qmoe.kernels.arena_stack import ArenaStack
from qmoe.kernels.hosted.residency import Held, empty, fetch, guess, waves
from qmoe.kernels.hosted.slots import SlotStack
from qmoe.solvers.rtn import rtn

E, A, H, I = 12, 2, 64, 32  # noqa: E741
HOST = torch.device("cpu")
SILU = Activation("silu")


def test_missing_experts_take_the_least_recently_used_slots():
    held, copies = fetch(empty(3), [7, 5])
    assert copies == [(7, 0), (5, 1)] and held.pairs == ((-1, 2), (7, 0), (5, 1))
    held, copies = fetch(held, [7, 9])  # the free slot goes first, then 5 is the oldest
    assert copies == [(9, 2)] and held.pairs == ((5, 1), (7, 0), (9, 2))
    held, copies = fetch(held, [2])
    assert copies == [(2, 1)] and held.slot_of(5) is None and held.slot_of(2) == 1


def test_what_is_wanted_is_never_thrown_out():
    held = Held(((1, 0), (2, 1), (3, 2)))
    after, copies = fetch(held, [9, 1])  # 1 is the oldest, but wanted
    assert copies == [(9, 1)] and {e for e, _ in after.pairs} == {1, 3, 9}


def test_an_expert_wanted_twice_is_copied_once():
    assert fetch(empty(2), [4, 4, 4])[1] == [(4, 0)]


def test_more_wanted_than_slots_is_refused():
    with pytest.raises(ValueError, match="3 experts wanted at once, 2 slots"):
        fetch(empty(2), [1, 2, 3])


@pytest.mark.parametrize("seed", range(5))
def test_random_runs_keep_one_slot_per_expert(seed):
    generator = torch.Generator().manual_seed(seed)
    held, place = empty(5), {}
    for _ in range(200):
        wanted = torch.randperm(16, generator=generator)[: 1 + seed].tolist()
        held, copies = fetch(held, wanted)
        place.update({slot: expert for expert, slot in copies})
        assert sorted(slot for _, slot in held.pairs) == list(range(5))
        assert all(place.get(slot, -1) == expert for expert, slot in held.pairs)
        assert [e for e, _ in held.pairs][-len(wanted) :] == wanted


def test_waves_cover_everything_once_and_start_with_what_is_held():
    held = Held(((8, 0), (3, 1)))
    rounds = waves(held, [1, 3, 5, 8, 9])
    assert rounds == [[3, 8], [1, 5], [9]]
    assert waves(held, []) == []


def test_guesses_follow_what_followed():
    followed = torch.zeros(4, 6)
    followed[0, 2], followed[0, 5], followed[1, 5] = 3, 1, 4
    assert guess(followed, [0, 1], 2) == [5, 2]
    assert guess(followed, [0, 1], 1) == [5]
    assert guess(followed, [3], 2) == []  # nothing is known: nothing is copied
    assert guess(followed, [], 2) == []


class LazyCopier:
    """A slow tier: what was asked for arrives at `wait`, until then the target is garbage."""

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


def layers(count, slots, copier=None, bits=4):
    scheme = Scheme(bits, 32)
    made = []
    for _ in range(count):
        first = rtn(torch.randn(E, 2 * I, H) * H**-0.5, scheme, torch.float32)
        second = rtn(torch.randn(E, H, I) * I**-0.5, scheme, torch.float32)
        options = dict(activation=SILU, paired=True)
        stack = ArenaStack([first, second], torch.float32, DEVICE, **options)
        slow = ArenaStack([first, second], torch.float32, DEVICE, **options, home=HOST)
        made.append((stack, SlotStack(slow, slots, DEVICE, copier)))
    for (_, a), (_, b) in zip(made, made[1:], strict=False):
        a.link(b)
    return made


@pytest.mark.slow
def test_a_slow_memory_changes_nothing_but_time():
    copier = LazyCopier()
    made = layers(2, 4, copier)
    for _, slow in made:
        slow.warm(range(E))
        assert sorted(e for e, _ in slow.held.pairs) == [8, 9, 10, 11]  # the most used ones
    for step, T in enumerate((1, 7, 1, 1)):
        for layer, (fast, slow) in enumerate(made):
            x, gates = torch.randn(T, H), torch.rand(T, A)
            ids = torch.stack([torch.randperm(5 + 2 * layer)[:A] for _ in range(T)])
            if step == 2:
                ids[:] = E  # every assignment a sentinel
            assert_close(slow.experts(x, ids, gates, SILU), fast.experts(x, ids, gates, SILU))


def test_guessed_experts_are_there_before_they_are_wanted():
    (_, first), (_, second) = layers(2, 4)
    x, gates = torch.randn(1, H), torch.rand(1, A)
    ids = {first: [torch.tensor([[0, 1]]), torch.tensor([[2, 3]])],
           second: [torch.tensor([[4, 5]]), torch.tensor([[6, 7]])]}  # fmt: skip
    for step in range(6):
        for slow in (first, second):
            if slow is second and step >= 2:  # what follows what has been seen by then
                wanted = ids[second][step % 2][0].tolist()
                assert all(second.held.slot_of(e) is not None for e in wanted)
            slow.experts(x, ids[slow][step % 2], gates, SILU)
    assert second.misses == 4


def test_the_host_copy_is_never_written():
    ((fast, slow),) = layers(1, 2)
    before, table = fast.buffer.clone(), fast.table.clone()
    for _ in range(2):
        ids = torch.stack([torch.randperm(E)[:A] for _ in range(5)])
        slow.experts(torch.randn(5, H), ids, torch.rand(5, A), SILU)
    assert torch.equal(fast.buffer, before) and torch.equal(fast.table, table)
    assert slow.nbytes() > fast.nbytes() and slow.packed_bytes() == fast.packed_bytes()


def test_bytes_are_in_memory_once():
    """Neither an arena that is moved, nor one that is pinned, leaves its bytes where they were."""
    ((fast, slow),) = layers(1, 2)
    old = weakref.ref(fast.buffer.untyped_storage())
    fast.to("meta")
    assert old() is None and fast.arena.buffer.device.type == "meta"
    assert slow.stack[0].buffer is slow.host


def test_no_slots_are_refused():
    ((fast, _),) = layers(1, 2)
    with pytest.raises(ValueError, match="slots: expected at least 1, got 0"):
        SlotStack(fast, 0, DEVICE)
