"""Widths and groups for a number of bytes: every matrix's cost in every way, and the knapsack over
them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy import ndarray

from qmoe.budget.measurements import Measurements
from qmoe.budget.memory import Memory
from qmoe.budget.ways import COUNT, IS_CHANNEL, is_open, ways
from qmoe.config import BITS, CHANNEL, GROUPS, UNIFORM_LAYERS, QuantConfig, Scheme
from qmoe.engines.settings import check_target
from qmoe.errors import ConfigError
from qmoe.model.schemes import check_schemes, with_widest
from qmoe.plan.allocate import Choice
from qmoe.plan.coupled import allocate_alike
from qmoe.plan.sizes import Stack, stacks


@dataclass(frozen=True)
class Chosen:
    """config: with widths and groups. nbytes: that the budget counts. predicted: KL in nats per
    token. gap: see `Choice`."""

    config: QuantConfig
    nbytes: int
    predicted: float
    gap: float


def choose(memory: Memory, config: QuantConfig, measurements: Measurements, budget: int) -> Chosen:
    """The widths and groups with the least predicted KL with which the model takes at most `budget`
    bytes. The experts of a layer have one group size. With the target "vllm" they have one width
    too, and so have linears of one module.
    Raises ConfigError if the fewest bytes are more than the budget."""
    parts = stacks(memory.source, config)
    costs = measurements.costs()
    modules: dict[str, list[Stack]] = {}
    for part in parts:
        modules.setdefault(part.module, []).append(part)
    each: dict[str, ndarray] = {}
    for module in modules.values():
        rows = memory.each(module)
        each |= {_key(part): _filled(row, 0) for part, row in zip(module, rows, strict=True)}
    fixed = memory.total(config) - sum(
        part.shape[0] * int(each[_key(part)][ways(part.scheme).index(part.scheme)])
        for part in parts
    )
    for part in parts:
        closed = ~_filled(is_open(config, part.scheme), False)
        costs[_key(part)] = np.where(closed, np.inf, _filled(costs[_key(part)], np.inf))
    together = _together(parts, config)
    nbytes = np.stack([sum(each[name] for name, _ in some) for some in together])
    cost = np.stack([sum(costs[name][e] for name, e in some) for some in together])
    smallest = fixed + int(np.where(np.isfinite(cost), nbytes, np.iinfo(np.int64).max).min(1).sum())
    if smallest > budget:
        raise ConfigError(
            f"budget: at {min(BITS)} bits the model takes {smallest} bytes, which is "
            f"{smallest - budget} more than the {budget} that were given"
        )
    owners = {_key(part): part.module for part in parts}
    alike = [owners[some[0][0]] for some in together]
    found = allocate_alike(nbytes, cost, budget - fixed, alike, IS_CHANNEL)
    made = _with(config, parts, together, found)
    return Chosen(made, fixed + found.nbytes, found.cost, found.gap)


def _filled(values: Any, rest: Any) -> ndarray:
    """Numbers of the ways that a matrix has, filled up to COUNT."""
    known = np.asarray(values)
    missing = [(0, 0)] * (known.ndim - 1) + [(0, COUNT - known.shape[-1])]
    return np.pad(known, missing, constant_values=rest)


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
    config: QuantConfig, parts: Sequence[Stack], together: list[list[Place]], found: Choice
) -> QuantConfig:
    """The settings with these ways; the experts' scheme has the most common width, and that of
    lm_head its own."""
    schemes: dict[str, dict[int, Scheme]] = {}
    own = {_key(part): ways(part.scheme) for part in parts}
    for some, way in zip(together, found.picked, strict=True):
        for name, e in some:
            schemes.setdefault(name, {})[e] = own[name][way]
    widths, groups = dict[str, str](), dict[str, int]()
    for part in parts:
        each = schemes[_key(part)]
        if not part.layer:
            config = replace(config, lm_head=each[0])
            continue
        widths[_key(part)] = "".join(str(each[e].bits) for e in sorted(each))
        if each[0].group_size != part.scheme.group_size:
            groups[part.module] = each[0].group_size
    every = "".join(text for text in widths.values() if len(text) > 1)
    most = max(BITS, key=lambda bits: (every.count(str(bits)), -bits))
    experts = replace(config.experts, bits=most)
    return replace(config, widths=widths, groups=groups, experts=experts)


def uniform(memory: Memory, config: QuantConfig, budget: int) -> QuantConfig | None:
    """The widest uniform scheme of everything with which the model fits, None if none does. Dense
    linears that are left in 16 bits stay so."""
    best: tuple[int, QuantConfig] | None = None
    for bits in BITS:
        for group in sorted({CHANNEL, *GROUPS, config.experts.group_size}):
            changed = all_in(config, replace(config.experts, bits=bits, group_size=group))
            try:
                check_schemes(memory.source, changed)
                check_target(memory.source, changed)
                changed, _ = with_widest(memory.source, changed)
            except ConfigError:
                continue  # the model's shapes or the target do not take it
            size = memory.total(changed)
            if size <= budget and (best is None or size > best[0]):
                best = size, changed
    return None if best is None else best[1]


def all_in(config: QuantConfig, scheme: Scheme) -> QuantConfig:
    """The settings with everything that is quantized in the layers in one scheme."""
    dense = None if config.dense is None else scheme
    return replace(config, experts=scheme, dense=dense, widths={}, groups={})
