"""Where parts lie, and whether they fit: arithmetic by hand, and both sides of every limit."""

from dataclasses import replace

import pytest

from qmoe.plan.dry_run import CacheKind, Pass
from qmoe.plan.in_memory import Packed, Weights
from qmoe.plan.placement import CUDA, CUDA_HOST, MARGIN, SLOTS, Budget, Load, place
from qmoe.system.host_memory import PROCESS

E, LAYERS, TOP = 8, 3, 2
# For the CPU they take more than any host memory has, so that experts wait in slots.
ROUTED = [
    Packed(
        f"layers.{i}.experts", f"layers.{i}", True, E, 40_000_000, 2_000_000, 256, 9_000_000, 10**15
    )
    for i in range(LAYERS)
]
DENSE = [
    Packed(f"layers.{i}.q", f"layers.{i}", False, 1, 5_000_000, 100_000, 16, 5_000_000)
    for i in range(LAYERS)
]
WEIGHTS = Weights([*ROUTED, *DENSE], None, 30_000_000, 20_000_000, 1_000_000, 600_000)
RUN = Pass([CacheKind("full", LAYERS, 7_000_000)], 3_000_000, {m.name: TOP for m in ROUTED})
LOAD = Load(RUN, 2_000_000, 1)
EXPERTS = LAYERS * (E * 42_000_000 + 256)
FIXED = LAYERS * 5_100_016 + 51_000_000 + 12_000_000  # all else that computes
LARGE = 10**12


def parts(placement):
    return {part.name: (part.gpu, part.host) for part in placement.parts}


def with_margin(nbytes):
    return nbytes + round(MARGIN * nbytes)


def test_without_a_gpu_everything_is_in_host_memory():
    found = place(WEIGHTS, LOAD, Budget(None, LARGE))
    loading = E * 42_000_000 + 256 + 9_000_000 + 5_100_016 + 5_000_000 - 12_000_000
    need = with_margin(EXPERTS + FIXED + PROCESS + loading)
    assert found.total() == (0, need) and found.fits and found.on_gpu == 0
    assert found.slots is None and found.expert_memory is None
    assert place(WEIGHTS, LOAD, Budget(None, need)).fits
    assert place(WEIGHTS, LOAD, Budget(None, need - 1)).short == (0, 1)


def test_all_on_the_gpu():
    need = with_margin(EXPERTS + FIXED + CUDA)
    for gpu in (need + 1, LARGE):
        found = place(WEIGHTS, LOAD, Budget(gpu, LARGE))
        assert found.total()[0] == need and found.fits and found.on_gpu == 1
        assert found.slots is None and found.read[1] == 0
    # Of host memory it takes a layer while it is loaded, and what is not packed.
    loading = E * 42_000_000 + 256 + 9_000_000 + 5_100_016 + 5_000_000 + 51_000_000
    assert found.total()[1] == with_margin(PROCESS + CUDA_HOST + loading)


@pytest.mark.parametrize("slots", [2, 3, 7])
def test_as_many_slots_as_fit(slots):
    one = LAYERS * 42_000_000
    need = with_margin(FIXED + CUDA + LAYERS * 256 + slots * one)
    found = place(WEIGHTS, LOAD, Budget(need + 1, LARGE))
    assert found.fits and found.slots == slots and found.expert_memory == slots * one
    assert found.total()[0] == need and found.on_gpu == slots / E
    fewer = place(WEIGHTS, LOAD, Budget(need - 2, LARGE))
    assert fewer.slots == (slots - 1 if slots > TOP else TOP)
    assert fewer.fits == (slots > TOP)


def test_a_token_needs_a_slot_for_each_of_its_experts():
    found = place(WEIGHTS, LOAD, Budget(1, LARGE))
    assert found.slots == TOP and found.short == (found.total()[0] - 1, 0)


def test_experts_in_slots_are_pinned_in_powers_of_two():
    found = place(WEIGHTS, LOAD, Budget(CUDA + 500_000_000, LARGE))
    assert 0 < found.slots < E
    named = parts(found)
    experts = named["routed experts"][1] + named["scales of routed experts"][1]
    assert experts == EXPERTS
    assert experts + named["rounding of pinned memory"][1] == LAYERS * 2**29  # of 336 MB


def test_the_host_is_what_does_not_suffice():
    host = place(WEIGHTS, LOAD, Budget(CUDA + 500_000_000, LARGE)).total()[1]
    assert place(WEIGHTS, LOAD, Budget(CUDA + 500_000_000, host)).fits
    short = place(WEIGHTS, LOAD, Budget(CUDA + 500_000_000, host - 5))
    assert short.short == (0, 5) and not short.fits


def test_what_a_token_reads():
    """All of the layers that is not routed, the cache, the head or what it is tied to, and TOP
    experts of each layer, of which those in no slot are read in host memory as well."""
    whole = LAYERS * 5_100_016 + 20_000_000 + 600_000 + 7_000_000
    routed = LAYERS * TOP * 42_000_000
    assert place(WEIGHTS, LOAD, Budget(None, LARGE)).read == (0, whole + routed)
    found = place(WEIGHTS, LOAD, Budget(CUDA + 500_000_000, LARGE))
    assert found.read == (whole + routed, round(routed * (1 - found.slots / E)))
    tied = replace(WEIGHTS, lm_head=0)
    assert place(tied, LOAD, Budget(None, LARGE)).read[1] == whole + routed + 10_000_000


def test_a_batch_reads_each_expert_once():
    large = replace(LOAD, batch=10_000)
    whole = LAYERS * 5_100_016 + 27_600_000
    assert place(WEIGHTS, large, Budget(None, LARGE)).read[1] == whole + EXPERTS - LAYERS * 256


def both(on_cpu=43_000_000):
    """The weights with experts that host memory holds in both layouts."""
    return replace(WEIGHTS, packed=[*(replace(m, on_cpu=on_cpu) for m in ROUTED), *DENSE])


@pytest.mark.parametrize("held", [0, 1, 7, 15])
def test_the_cpu_computes_what_is_not_on_the_gpu(held):
    """Of 24 experts, `held` lie on the GPU beside the slots, and the others in both layouts in host
    memory, pinned in powers of two."""
    staging = SLOTS * 42_000_000
    gpu = with_margin(FIXED + CUDA + 2 * LAYERS * 256 + staging + held * 42_000_000)
    found = place(both(), LOAD, Budget(gpu + 1, LARGE))
    assert found.fits and found.hybrid and found.slots is None
    assert found.expert_memory == pytest.approx(staging + held * 42_000_000, abs=2)
    tables = LAYERS * 256 * 1.05 if held == 0 else 0  # of no experts
    assert found.total()[0] == pytest.approx(gpu - tables, abs=4) and found.total()[0] <= gpu + 1
    assert found.on_gpu == pytest.approx(held / (LAYERS * E), abs=1e-7)
    cold = LAYERS * E - held
    named = parts(found)
    assert named["the same experts for the CPU"][1] == pytest.approx(cold * 43_000_000, abs=9)
    experts = named["routed experts"][1] + named["scales of routed experts"][1]
    assert experts == pytest.approx(cold * 42_000_000 + LAYERS * 256, abs=9)
    rounded = min(2 * cold * 42_000_000, LAYERS * 2**29)
    rounding = named["rounding of pinned memory"][1]
    assert rounding == pytest.approx(rounded - cold * 42_000_000, abs=9)
    # Every expert that a token chooses is read once, in one of the memories.
    whole = LAYERS * 5_100_016 + 20_000_000 + 600_000 + 7_000_000
    routed = LAYERS * TOP * 42_000_000
    assert found.read[1] == pytest.approx(routed * (1 - found.on_gpu), abs=2)
    assert sum(found.read) == whole + routed


def test_experts_wait_in_slots_where_host_memory_does_not_hold_them_twice():
    gpu = CUDA + 700_000_000
    host = place(both(), LOAD, Budget(gpu, LARGE)).total()[1]
    assert place(both(), LOAD, Budget(gpu, host)).hybrid
    less = place(both(), LOAD, Budget(gpu, host - 9))
    assert less.fits == (place(WEIGHTS, LOAD, Budget(gpu, LARGE)).total()[1] <= host - 9)
    more = place(both(10**9), LOAD, Budget(gpu, host))
    assert more.slots is not None or not more.fits


def test_the_slots_are_those_of_the_runtime():
    hybrid = pytest.importorskip("qmoe.kernels.hosted.hybrid")
    assert SLOTS == 2 * hybrid.AT_ONCE


def test_a_model_without_stacks_of_experts():
    """As Doge, whose experts are vectors."""
    found = place(replace(WEIGHTS, packed=DENSE), LOAD, Budget(1, LARGE))
    assert not found.fits and found.slots is None and found.read[1] == 0
