"""Widths for a number of bytes: every matrix's cost at every width, and the knapsack over them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy import ndarray

from qmoe.budget.measurements import Measurements
from qmoe.budget.memory import Memory
from qmoe.config import BITS, GROUPS, UNIFORM_LAYERS, QuantConfig, Scheme
from qmoe.errors import ConfigError
from qmoe.model.schemes import check_schemes
from qmoe.plan.allocate import Choice, allocate
from qmoe.plan.sizes import Stack, stacks


@dataclass(frozen=True)
class Chosen:
    """config: with the widths. nbytes: that the budget counts. predicted: KL in nats per token.
    gap: see `Choice`."""

    config: QuantConfig
    nbytes: int
    predicted: float
    gap: float


def choose(memory: Memory, config: QuantConfig, measurements: Measurements, budget: int) -> Chosen:
    """The widths with the least predicted KL with which the model takes at most `budget` bytes.
    With the targets "vllm" and "sglang" all experts of a layer have one, and so have linears of
    one module.
    Raises ConfigError if 2 bits are more than the budget."""
    narrow = replace(config, widths={})
    parts = stacks(memory.source, narrow)
    costs = measurements.costs()
    modules: dict[str, list[Stack]] = {}
    for part in parts:
        modules.setdefault(part.module, []).append(part)
    each: dict[str, ndarray] = {}
    for module in modules.values():
        rows = memory.each(module)
        each |= {_key(part): np.asarray(row) for part, row in zip(module, rows, strict=True)}
    fixed = memory.total(narrow) - sum(
        part.shape[0] * int(each[_key(part)][BITS.index(part.scheme.bits)]) for part in parts
    )
    together = _together(parts, config)
    nbytes = np.stack([sum(each[name] for name, _ in some) for some in together])
    cost = np.stack([sum(costs[name][e] for name, e in some) for some in together])
    smallest = fixed + int(nbytes.min(1).sum())
    if smallest > budget:
        raise ConfigError(
            f"budget: at {min(BITS)} bits the model takes {smallest} bytes, which is "
            f"{smallest - budget} more than the {budget} that were given"
        )
    found = allocate(nbytes, cost, budget - fixed)
    made = _with(config, together, found, str(memory.source.structure.lm_head))
    return Chosen(made, fixed + found.nbytes, found.cost, found.gap)


def _key(part: Stack) -> str:
    """What the part is called in `QuantConfig.widths`."""
    return part.module if part.name.endswith(".weight") else part.name


Place = tuple[str, int]  # a target of widths, and which of its matrices


def _together(parts: Sequence[Stack], config: QuantConfig) -> list[list[Place]]:
    """Which matrices have one width in common."""
    found: dict[object, list[Place]] = {}
    for part in parts:
        for e in range(part.shape[0]):
            place = (_key(part), e)
            if config.target not in UNIFORM_LAYERS:
                found[place] = [place]
            elif part.routed:
                found.setdefault((part.layer, "experts"), []).append(place)
            else:
                found.setdefault(_key(part).rpartition(".")[0], []).append(place)
    return list(found.values())


def _with(
    config: QuantConfig, together: list[list[Place]], found: Choice, head_name: str
) -> QuantConfig:
    """The settings with these widths; the experts' scheme has the most common one, and that of
    lm_head its own."""
    digits: dict[str, dict[int, str]] = {}
    for some, way in zip(together, found.picked, strict=True):
        for name, e in some:
            digits.setdefault(name, {})[e] = str(BITS[way])
    if config.lm_head is not None and head_name in digits:
        head = replace(config.lm_head, bits=int(digits.pop(head_name)[0]))
        config = replace(config, lm_head=head)
    widths = {name: "".join(own[e] for e in sorted(own)) for name, own in digits.items()}
    every = "".join(text for text in widths.values() if len(text) > 1)
    most = max(BITS, key=lambda bits: (every.count(str(bits)), -bits))
    return replace(config, widths=widths, experts=replace(config.experts, bits=most))


def uniform(memory: Memory, config: QuantConfig, budget: int) -> QuantConfig | None:
    """The widest uniform scheme of everything with which the model fits, None if none does. Dense
    linears that are left in 16 bits stay so."""
    best: tuple[int, QuantConfig] | None = None
    for bits in BITS:
        for group in sorted({*GROUPS, config.experts.group_size}):
            changed = all_in(config, replace(config.experts, bits=bits, group_size=group))
            try:
                check_schemes(memory.source, changed)
            except ConfigError:
                continue  # this group size does not divide the model's matrices
            size = memory.total(changed)
            if size <= budget and (best is None or size > best[0]):
                best = size, changed
    return None if best is None else best[1]


def all_in(config: QuantConfig, scheme: Scheme) -> QuantConfig:
    """The settings with everything that is quantized in the layers in one scheme."""
    dense = None if config.dense is None else scheme
    return replace(config, experts=scheme, dense=dense, widths={})
