"""The plan: the widest scheme of the routed experts with which a model fits, and where its parts
lie. Nothing but config.json and the headers of the weights is read.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from qmoe.config import BITS, CHANNEL, GROUPS, QuantConfig, Scheme
from qmoe.errors import ConfigError, UnsupportedModelError
from qmoe.model.schemes import check_schemes, with_block
from qmoe.model.source import Source
from qmoe.plan.dry_run import Pass, dry_run
from qmoe.plan.in_memory import in_memory
from qmoe.plan.placement import Budget, Load, Placement, place
from qmoe.plan.sizes import Sizes, sizes, stacks, with_experts
from qmoe.plan.workspace import workspace
from qmoe.system.sizes import format_size

AT_ONCE = 512  # tokens of each sequence's prompt that go through the model at once
# From the widest to the narrowest: bits, group size.
CANDIDATES = [(8, 128), *((bits, group) for bits in (4, 3, 2) for group in GROUPS)]


@dataclass(frozen=True)
class Candidate:
    """A scheme of the routed experts, what the files take with it, and where everything lies."""

    config: QuantConfig
    sizes: Sizes
    placement: Placement


@dataclass(frozen=True)
class Plan:
    """candidates: from the widest to the narrowest scheme. chosen: the widest that fits."""

    candidates: list[Candidate]
    chosen: Candidate
    run: Pass


def plan(
    source: Source, configs: Sequence[QuantConfig], budget: Budget, run: Pass, batch: int = 1
) -> Plan:
    """Choose among `configs`, which differ in the routed experts' scheme: the first that fits.

    run: what `measure` found. batch: sequences that it was found for. Raises ConfigError if none
    fits, saying what the last of them lacks.
    """
    gpu = budget.gpu is not None
    every = stacks(source, configs[0])
    running = [part for part in every if not source.predicts(part.layer)]
    needed = workspace(running, source.weight_dtype(), run.chosen, batch * AT_ONCE, gpu)
    load = Load(run, needed, batch)
    candidates = []
    for config in configs:
        parts = with_experts(every, config.experts)
        placement = place(in_memory(source, config, parts, gpu), load, budget)
        candidates.append(Candidate(config, sizes(source, config, parts), placement))
    chosen = next((c for c in candidates if c.placement.fits), None)
    if chosen is None:
        raise ConfigError(_shortfall(candidates[-1], budget))
    return Plan(candidates, chosen, run)


def measure(
    source: Source, context: int, batch: int = 1, keep: Callable[[Any], None] | None = None
) -> Pass:
    """The cache and the activations of `batch` sequences of `context` tokens. keep: see `dry_run`.

    Raises ConfigError if the model has fewer positions, UnsupportedModelError for a family of which
    this cannot be found without running it.
    """
    for name, value in (("context", context), ("batch", batch)):
        if value < 1:
            raise ConfigError(f"{name}: expected 1 or more, got {value}")
    text = source.model.config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None)
    if isinstance(positions, int) and context > positions:
        raise ConfigError(
            f"context: {context} tokens are more than the {positions} positions of this model"
        )
    run = dry_run(source.model, context, batch, source.weight_dtype(), AT_ONCE, keep)
    running = [layer for layer in source.structure.layers if not source.predicts(layer.name)]
    names = [n for layer in running for n in [*layer.experts, *layer.unfused]]
    if unknown := [name for name in names if name not in run.chosen]:
        raise UnsupportedModelError(
            f"{unknown[0]}: to how many experts a token goes cannot be found without running the "
            "model"
        )
    return run


def schemes(
    source: Source, config: QuantConfig, bits: int | None = None, group_size: int | None = None
) -> list[QuantConfig]:
    """`config` with each uniform scheme that goes with the model's shapes, the widest first. bits,
    group_size: what is not to be chosen. Raises ConfigError if no scheme is left."""
    found, problems = [], []
    for b, g in _pairs(bits, group_size):
        experts = replace(config.experts, bits=b, group_size=g)
        changed = with_block(source, replace(config, experts=experts))
        try:
            check_schemes(source, changed)
        except ConfigError as error:
            problems.append(error)
            continue
        found.append(changed)
    if not found:
        raise problems[-1]
    return found


def _pairs(bits: int | None, group_size: int | None) -> list[tuple[int, int]]:
    """Bits and group sizes to try. What is given may be none that would be chosen."""
    if bits is None and group_size is None:
        return CANDIDATES
    widths = sorted(BITS, reverse=True) if bits is None else [bits]
    return [(b, g) for b in widths for g in (GROUPS if group_size is None else [group_size])]


def _shortfall(smallest: Candidate, budget: Budget) -> str:
    """What is missing of the smallest candidate, and what takes most."""
    placement, scheme = smallest.placement, smallest.config.experts
    said = []
    for i, (name, memory) in enumerate((("GPU memory", "gpu"), ("host memory", "host"))):
        if placement.short[i]:
            most = max(placement.parts, key=lambda part: getattr(part, memory))
            there = f"{getattr(budget, memory)} that are {budget.host_is if i else 'given'}"
            said.append(
                f"{placement.total()[i]} bytes of {name}, which is {placement.short[i]} more than "
                f"the {there}; most of it is for {most.name} "
                f"({format_size(getattr(most, memory))})"
            )
    return (
        f"plan: no scheme fits; with experts in {scheme}, the smallest, the model needs "
        + ", and ".join(said)
    )


def describe(scheme: Scheme) -> str:
    """As in `4 bits, groups of 128`."""
    groups = "channels" if scheme.group_size == CHANNEL else f"groups of {scheme.group_size}"
    return f"{scheme.bits} bits, {groups}"
