"""Widths for a number of bytes: every matrix's cost at every width, and the knapsack over them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil

import numpy as np
from jaxtyping import Int64
from numpy import ndarray

from qmoe.budget.measurements import Measurements
from qmoe.config import BITS, GROUPS, QuantConfig, Scheme
from qmoe.errors import ConfigError
from qmoe.model.schemes import check_schemes
from qmoe.model.source import Source
from qmoe.plan.allocate import Choice, allocate
from qmoe.plan.sizes import Stack, sizes, stacks


@dataclass(frozen=True)
class Chosen:
    """config: with the widths. nbytes: of the weight files, at most. predicted: KL in nats per
    token. gap: see `Choice`."""

    config: QuantConfig
    nbytes: int
    predicted: float
    gap: float


def choose(source: Source, config: QuantConfig, measurements: Measurements, budget: int) -> Chosen:
    """The widths with the least predicted KL with which the weight files take at most `budget`
    bytes. With the target "vllm" all experts of a layer have one, and linears of one module have
    one. Raises ConfigError if 2 bits are more than the budget."""
    narrow = replace(config, widths={})
    parts = [part for part in stacks(source, narrow) if part.layer]
    costs = measurements.costs()
    each = {_key(part): (_nbytes(part, source), costs[_key(part)]) for part in parts}
    least = sizes(source, narrow, stacks(source, narrow))
    # What is stored besides these matrices.
    fixed = (
        least.tensors
        + least.headers
        - sum(
            int(nbytes[:, BITS.index(part.scheme.bits)].sum())
            for part, (nbytes, _) in zip(parts, each.values(), strict=True)
        )
    )
    together = _together(parts, config)
    nbytes = np.stack([sum(each[n][0][e] for n, e in some) for some in together])
    cost = np.stack([sum(each[n][1][e] for n, e in some) for some in together])
    try:
        found = allocate(nbytes, cost, budget - fixed)
    except ConfigError as error:
        smallest = fixed + int(nbytes.min(1).sum())
        raise ConfigError(
            f"budget: at {min(BITS)} bits the weight files take {smallest} bytes, which is "
            f"{smallest - budget} more than the {budget} that were given"
        ) from error
    return Chosen(_with(config, together, found), fixed + found.nbytes, found.cost, found.gap)


def _key(part: Stack) -> str:
    """What the part is called in `QuantConfig.widths`."""
    return part.module if part.name.endswith(".weight") else part.name


def _nbytes(part: Stack, source: Source) -> Int64[ndarray, "E C"]:
    """Of each matrix at each of BITS, as it is stored."""
    one = replace(part, shape=(1, *part.shape[1:]))
    scale = source.weight_dtype().itemsize
    widths = [replace(one, scheme=replace(part.scheme, bits=bits)) for bits in BITS]
    row = [each.weights + each.scales(scale) for each in widths]
    return np.tile(np.asarray(row, np.int64), (part.shape[0], 1))


Place = tuple[str, int]  # a target of widths, and which of its matrices


def _together(parts: Sequence[Stack], config: QuantConfig) -> list[list[Place]]:
    """Which matrices have one width in common."""
    found: dict[object, list[Place]] = {}
    for part in parts:
        for e in range(part.shape[0]):
            place = (_key(part), e)
            if config.target != "vllm":
                found[place] = [place]
            elif part.routed:
                found.setdefault((part.layer, "experts"), []).append(place)
            else:
                found.setdefault(_key(part).rpartition(".")[0], []).append(place)
    return list(found.values())


def _with(config: QuantConfig, together: list[list[Place]], found: Choice) -> QuantConfig:
    """The settings with these widths; the experts' scheme has the most common one."""
    digits: dict[str, dict[int, str]] = {}
    for some, way in zip(together, found.picked, strict=True):
        for name, e in some:
            digits.setdefault(name, {})[e] = str(BITS[way])
    widths = {name: "".join(own[e] for e in sorted(own)) for name, own in digits.items()}
    every = "".join(text for text in widths.values() if len(text) > 1)
    most = max(BITS, key=lambda bits: (every.count(str(bits)), -bits))
    return replace(config, widths=widths, experts=replace(config.experts, bits=most))


def uniform(source: Source, config: QuantConfig, budget: int) -> QuantConfig | None:
    """The widest uniform scheme of everything with which the weight files fit, None if none does.
    Dense linears that are left in 16 bits stay so."""
    best: tuple[int, QuantConfig] | None = None
    for bits in BITS:
        for group in sorted({*GROUPS, config.experts.group_size}):
            changed = _all_in(config, replace(config.experts, bits=bits, group_size=group))
            try:
                check_schemes(source, changed)
            except ConfigError:
                continue  # this group size does not divide the model's matrices
            size = weight_files(source, changed)
            if size <= budget and (best is None or size > best[0]):
                best = size, changed
    return None if best is None else best[1]


def _all_in(config: QuantConfig, scheme: Scheme) -> QuantConfig:
    dense = None if config.dense is None else scheme
    return replace(config, experts=scheme, dense=dense, widths={})


def weight_files(source: Source, config: QuantConfig) -> int:
    """Bytes of the weight files that these settings give, at most."""
    found = sizes(source, config, stacks(source, config))
    return found.tensors + found.headers


def bytes_for(source: Source, config: QuantConfig, bits: float) -> int:
    """The bytes of the weight files in which every quantized matrix takes `bits` for a weight on
    average, scales and zero points counted."""
    every = stacks(source, replace(config, widths={}))
    scale = source.weight_dtype().itemsize
    stored = sum(part.weights + part.scales(scale) for part in every)
    weights = sum(float(np.prod(part.shape)) for part in every)
    return weight_files(source, replace(config, widths={})) - stored + ceil(weights * bits / 8)


def average_bits(source: Source, config: QuantConfig) -> float:
    """Stored bits of a quantized weight on average, scales and zero points counted."""
    every = stacks(source, config)
    scale = source.weight_dtype().itemsize
    stored = sum(part.weights + part.scales(scale) for part in every)
    return 8 * stored / sum(float(np.prod(part.shape)) for part in every)
