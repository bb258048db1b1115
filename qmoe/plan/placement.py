"""Where the parts of a model lie, and whether they fit: in host memory alone, or on a GPU, with the
routed experts that do not fit there in host memory (runtime/offload.py).
"""

from collections.abc import Iterator
from dataclasses import dataclass

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
    on the GPU, None if all of them lie in the memory that computes. expert_memory: bytes of those
    slots. on_gpu: share of the experts that lie on the GPU. read: bytes that a step of decoding
    reads, in the GPU's memory and in host memory. short: bytes that are missing in each."""

    parts: list[Part]
    slots: int | None
    expert_memory: int | None
    on_gpu: float
    read: tuple[int, int]
    short: tuple[int, int]

    @property
    def fits(self) -> bool:
        return self.short == (0, 0)

    def total(self) -> tuple[int, int]:
        """Bytes in the GPU's memory and in host memory."""
        return sum(part.gpu for part in self.parts), sum(part.host for part in self.parts)


def place(weights: Weights, load: Load, budget: Budget) -> Placement:
    """Put everything but routed experts on the GPU, and these as far as they fit there; without a
    GPU, put everything in host memory."""
    if budget.gpu is None:
        return _in_host_memory(weights, load, budget)
    parts = [Part("CUDA itself", CUDA, CUDA_HOST), Part("Python and its libraries", 0, PROCESS)]
    parts += [Part(name, nbytes, 0) for name, nbytes in _fixed(weights, load)]
    left = int(budget.gpu / (1 + MARGIN)) - sum(part.gpu for part in parts)
    # While layers are loaded, what is not packed waits in host memory.
    loading = weights.loading() + weights.embeddings + weights.lm_head + weights.other
    if not weights.routed or sum(module.nbytes for module in weights.routed) <= left:
        parts = [*_experts(weights, None, 0), *parts, Part(LOADING, 0, loading)]
        return _judged(parts, weights, load, budget, None)
    one = sum(module.expert for module in weights.routed)  # of every layer
    tables = sum(module.table for module in weights.routed)
    least = max(load.run.chosen.values())
    most = max(module.experts for module in weights.routed)
    slots = max(least, min(most, (left - tables) // one))
    rounding = sum(_pinned(module) - module.nbytes for module in weights.routed)
    parts = [
        *_experts(weights, slots, 1),
        *parts,
        Part("rounding of pinned memory", 0, rounding),
        # Experts are pinned when all are loaded: until then there is no rounding.
        Part(LOADING, 0, max(0, loading - rounding)),
    ]
    return _judged(parts, weights, load, budget, slots)


LOADING = "loading, beyond the above"


def _in_host_memory(weights: Weights, load: Load, budget: Budget) -> Placement:
    parts = [*_experts(weights, 0, 1), Part("Python and its libraries", 0, PROCESS)]
    parts += [Part(name, 0, nbytes) for name, nbytes in _fixed(weights, load)]
    # Nothing runs while layers are loaded.
    running = load.run.cache_bytes + load.run.activations + load.workspace
    parts.append(Part(LOADING, 0, max(0, weights.loading() - running)))
    return _judged(parts, weights, load, budget, None)


def _experts(weights: Weights, slots: int | None, copies: int) -> list[Part]:
    """Routed experts. slots: of each layer on the GPU, None for all. copies: 1 if all of them lie
    in host memory (too), or 0."""
    held = [(module, _held(module, slots)) for module in weights.routed]
    return [
        Part(
            "routed experts",
            sum(count * module.integers for module, count in held),
            copies * sum(module.experts * module.integers for module, _ in held),
        ),
        Part(
            "scales of routed experts",
            sum(count * module.scales + bool(count) * module.table for module, count in held),
            copies * sum(module.experts * module.scales + module.table for module, _ in held),
        ),
    ]


def _held(module: Packed, slots: int | None) -> int:
    """How many experts of a module lie on the GPU."""
    return module.experts if slots is None else min(slots, module.experts)


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
    parts: list[Part], weights: Weights, load: Load, budget: Budget, slots: int | None
) -> Placement:
    """The placement with a margin, and what is said about it."""
    gpu, host = (sum(sizes) for sizes in zip(*((p.gpu, p.host) for p in parts), strict=True))
    parts = [*parts, Part(f"margin, {MARGIN:.0%}", round(MARGIN * gpu), round(MARGIN * host))]
    total = sum(part.gpu for part in parts), sum(part.host for part in parts)
    routed = weights.routed
    one = sum(module.expert for module in routed)
    count = sum(module.experts for module in routed)
    held = sum(_held(module, slots) for module in routed)
    return Placement(
        parts=[part for part in parts if part.gpu or part.host],
        slots=slots,
        expert_memory=None if slots is None else slots * one,
        on_gpu=0.0 if budget.gpu is None else held / max(count, 1),
        read=_read(weights, load, slots, budget.gpu is not None),
        short=(max(0, total[0] - (budget.gpu or 0)), max(0, total[1] - budget.host)),
    )


def _read(weights: Weights, load: Load, slots: int | None, gpu: bool) -> tuple[int, int]:
    """Bytes that a step of decoding reads in each memory, if all experts are used alike: the cache,
    all that is not routed, and the experts that the tokens of the batch go to. Experts that are not
    in a slot are read in host memory, and again from the slot."""
    routed = copied = 0.0
    for module in weights.routed:
        E, chosen = module.experts, load.run.chosen[module.name]
        used = E * (1 - (1 - chosen / E) ** load.batch)
        routed += used * module.expert
        copied += used * module.expert * (1 - _held(module, slots) / E)
    whole = weights.read_whole + load.run.cache_bytes + round(routed)
    return (whole, round(copied)) if gpu else (0, whole)
