"""Where the parts of a model lie, and whether they fit: in host memory alone, or on a GPU, with the
routed experts that do not fit there in host memory, where the CPU computes them
(runtime/hybrid.py), or from where they are copied to slots (runtime/offload.py).
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import ceil, floor

from qmoe.plan.dry_run import Pass
from qmoe.plan.in_memory import Packed, Weights
from qmoe.system.host_memory import PROCESS

# Allowances, none of them measured: for CUDA itself, its libraries and kernels, in the GPU's memory
# and in the host's, and for what allocators waste, as a share of all else in a memory.
CUDA, CUDA_HOST, MARGIN = 800_000_000, 1_000_000_000, 0.05


@dataclass(frozen=True)
class Budget:
    """Bytes. gpu: of the GPU's memory, None to run on the CPU. host: of host memory. host_is: why
    it is that much, as in "given" or "free on this machine"."""

    gpu: int | None
    host: int
    host_is: str = "given"


@dataclass(frozen=True)
class Load:
    """What runs besides the weights. run: what the dry run found. workspace: bytes that routed
    experts need for the same tokens. batch: sequences."""

    run: Pass
    workspace: int
    batch: int


@dataclass(frozen=True)
class Part:
    """Bytes of a part of the model in each memory."""

    name: str
    gpu: int
    host: int


@dataclass(frozen=True)
class Placement:
    """parts: what lies where, with a margin for each memory. slots: experts of each layer that wait
    on the GPU, if others are copied there. hybrid: whether the CPU computes others instead.
    expert_memory: bytes of the GPU for experts and slots, None if all experts lie in the memory
    that computes. on_gpu: share of the experts that lie on the GPU. read: bytes that a step of
    decoding reads, in the GPU's memory and in host memory. short: bytes that are missing in each.
    """

    parts: list[Part]
    slots: int | None
    expert_memory: int | None
    on_gpu: float
    read: tuple[int, int]
    short: tuple[int, int]
    hybrid: bool = False

    @property
    def fits(self) -> bool:
        return self.short == (0, 0)

    def total(self) -> tuple[int, int]:
        """Bytes in the GPU's memory and in host memory."""
        return sum(part.gpu for part in self.parts), sum(part.host for part in self.parts)


def place(weights: Weights, load: Load, budget: Budget) -> Placement:
    """Put everything but routed experts on the GPU, and these as far as they fit there; without a
    GPU, put everything in host memory. If not all experts fit on the GPU, the CPU computes the
    others, or they are copied if host memory does not hold them in the layouts of both."""
    if budget.gpu is None:
        return _in_host_memory(weights, load, budget)
    parts = [Part("CUDA itself", CUDA, CUDA_HOST), Part("Python and its libraries", 0, PROCESS)]
    parts += [Part(name, nbytes, 0) for name, nbytes in _fixed(weights, load)]
    left = int(budget.gpu / (1 + MARGIN)) - sum(part.gpu for part in parts)
    # While layers are loaded, what is not packed waits in host memory.
    loading = weights.loading() + weights.embeddings + weights.lm_head + weights.other
    if not weights.routed or sum(module.nbytes for module in weights.routed) <= left:
        parts = [*_experts(weights, _all(weights), 0), *parts, Part(LOADING, 0, loading)]
        return _judged(parts, weights, load, budget, _all(weights))
    ways = [_hybrid, _in_slots]
    found = [way(weights, load, budget, parts, left, loading) for way in ways]
    return next((p for p in found if p.fits), min(found, key=lambda p: sum(p.short)))


def _in_slots(
    weights: Weights, load: Load, budget: Budget, parts: list[Part], left: int, loading: int
) -> Placement:
    """As many slots for every layer as fit in the `left` bytes; all experts in host memory."""
    one = sum(module.expert for module in weights.routed)  # of every layer
    tables = sum(module.table for module in weights.routed)
    least = max(load.run.chosen.values())
    most = max(module.experts for module in weights.routed)
    slots = max(least, min(most, (left - tables) // one))
    rounding = sum(_pinned(module) - module.nbytes for module in weights.routed)
    held = [float(min(slots, module.experts)) for module in weights.routed]
    parts = [
        *_experts(weights, held, 1),
        *parts,
        Part("rounding of pinned memory", 0, rounding),
        # Experts are pinned when all are loaded: until then there is no rounding.
        Part(LOADING, 0, max(0, loading - rounding)),
    ]
    return replace(
        _judged(parts, weights, load, budget, held), slots=slots, expert_memory=slots * one
    )


def _hybrid(
    weights: Weights, load: Load, budget: Budget, parts: list[Part], left: int, loading: int
) -> Placement:
    """As many experts on the GPU as fit there beside the slots that all layers share; the others in
    host memory, in the layouts of both. Which ones decides calibration, so that the rounding of
    pinned memory is an upper bound."""
    every = sum(module.experts * module.expert for module in weights.routed)
    tables = sum(module.table for module in weights.routed)
    staging = SLOTS * max(module.expert for module in weights.routed)
    room = max(0, left - 2 * tables - staging)
    share = room / every
    held = [share * module.experts for module in weights.routed]
    cold = sum((1 - share) * module.experts * module.expert for module in weights.routed)
    rounded = min(2 * cold, sum(_pinned(module) for module in weights.routed))
    on_cpu = sum((1 - share) * module.experts * module.on_cpu for module in weights.routed)
    parts = [
        *_experts(weights, held, 1, shared=False),
        Part("slots for experts that are copied", staging + tables, 0),
        Part("the same experts for the CPU", 0, ceil(on_cpu)),
        *parts,
        Part("rounding of pinned memory", 0, ceil(rounded - cold)),
        Part(LOADING, 0, loading),
    ]
    found = _judged(parts, weights, load, budget, held)
    read = found.read[0] - found.read[1], found.read[1]  # each expert in one memory
    return replace(found, expert_memory=room + staging, hybrid=True, read=read)


SLOTS = 8  # experts for which the slots have room (kernels/hosted/hybrid.py)
LOADING = "loading, beyond the above"


def _in_host_memory(weights: Weights, load: Load, budget: Budget) -> Placement:
    parts = [*_experts(weights, [0.0] * len(weights.routed), 1)]
    parts.append(Part("Python and its libraries", 0, PROCESS))
    parts += [Part(name, 0, nbytes) for name, nbytes in _fixed(weights, load)]
    # Nothing runs while layers are loaded.
    running = load.run.cache_bytes + load.run.activations + load.workspace
    parts.append(Part(LOADING, 0, max(0, weights.loading() - running)))
    return _judged(parts, weights, load, budget, [0.0] * len(weights.routed))


def _all(weights: Weights) -> list[float]:
    return [float(module.experts) for module in weights.routed]


def _experts(weights: Weights, held: list[float], copies: int, shared: bool = True) -> list[Part]:
    """Routed experts. held: of each module on the GPU. copies: 1 if they lie in host memory (too),
    or 0. shared: whether those on the GPU do."""
    pairs = list(zip(weights.routed, held, strict=True))
    there = [copies * (m.experts if shared else m.experts - count) for m, count in pairs]
    each = list(zip(pairs, there, strict=True))
    return [
        Part(
            "routed experts",
            floor(sum(count * module.integers for module, count in pairs)),
            ceil(sum(host * module.integers for (module, _), host in each)),
        ),
        Part(
            "scales of routed experts",
            floor(sum(n * module.scales + bool(n) * module.table for module, n in pairs)),
            ceil(sum(host * m.scales + copies * m.table for (m, _), host in each)),
        ),
    ]


def _fixed(weights: Weights, load: Load) -> Iterator[tuple[str, int]]:
    """All but routed experts, by name, in the memory of what computes."""
    head = weights.head
    packed = [*weights.dense, *([head] if head else [])]
    yield "dense linears", sum(module.integers for module in weights.dense)
    yield "scales of these and lm_head", sum(module.scales + module.table for module in packed)
    yield "embeddings", weights.embeddings
    yield "lm_head", weights.lm_head + (head.integers if head else 0)
    yield "other weights", weights.other
    for kind in load.run.cache:
        yield f"cache: {kind.name}, {kind.layers} layers", kind.nbytes
    yield "activations", load.run.activations
    yield "workspace of routed experts", load.workspace


def _pinned(module: Packed) -> int:
    """Bytes that torch pins for the experts of a module: a power of two."""
    return 1 << (module.experts * module.expert - 1).bit_length()


def _judged(
    parts: list[Part], weights: Weights, load: Load, budget: Budget, held: list[float]
) -> Placement:
    """The placement with a margin, and what is said about it. held: experts of each module that lie
    on the GPU."""
    gpu, host = (sum(sizes) for sizes in zip(*((p.gpu, p.host) for p in parts), strict=True))
    parts = [*parts, Part(f"margin, {MARGIN:.0%}", round(MARGIN * gpu), round(MARGIN * host))]
    total = sum(part.gpu for part in parts), sum(part.host for part in parts)
    count = sum(module.experts for module in weights.routed)
    return Placement(
        parts=[part for part in parts if part.gpu or part.host],
        slots=None,
        expert_memory=None,
        on_gpu=0.0 if budget.gpu is None else sum(held) / max(count, 1),
        read=_read(weights, load, held, budget.gpu is not None),
        short=(max(0, total[0] - (budget.gpu or 0)), max(0, total[1] - budget.host)),
    )


def _read(weights: Weights, load: Load, held: list[float], gpu: bool) -> tuple[int, int]:
    """Bytes that a step of decoding reads in each memory, if all experts are used alike: the cache,
    all that is not routed, and the experts that the tokens of the batch go to. Experts that are not
    on the GPU are read in host memory; those that are copied to slots are read there again."""
    routed = elsewhere = 0.0
    for module, count in zip(weights.routed, held, strict=True):
        E, chosen = module.experts, load.run.chosen[module.name]
        used = E * (1 - (1 - chosen / E) ** load.batch)
        routed += used * module.expert
        elsewhere += used * module.expert * (1 - count / E)
    whole = weights.read_whole + load.run.cache_bytes + round(routed)
    return (whole, round(elsewhere)) if gpu else (0, whole)
