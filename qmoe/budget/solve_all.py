"""Matrices of a layer solved in every way: what each loses, and the matrices of PROBE bits."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qmoe.budget.measurements import PROBE, Measured
from qmoe.budget.ways import ways
from qmoe.calibration.coverage import average_weight
from qmoe.calibration.routed_tokens import RoutedTokens
from qmoe.calibration.stats import ExpertStats, check_finite
from qmoe.config import Scheme
from qmoe.format.grid import dequantize
from qmoe.format.quantized import Quantized
from qmoe.layer.at_hand import LayerAtHand, LayerSettings
from qmoe.layer.solve import borrow_rare, solve_or_find
from qmoe.model import experts
from qmoe.solvers.awq import output_error
from qmoe.solvers.solve import experts_at_once
from qmoe.system.devices import CPU


@dataclass(frozen=True)
class Solution:
    """Of a group. probes: its matrices [E, N, K] at PROBE bits, by parameter."""

    measured: list[Measured]
    probes: dict[str, Quantized]


def solve_linear(
    layer: LayerAtHand,
    settings: LayerSettings,
    name: str,
    hessian: Tensor | None,
    tokens: int,
    group: str,
) -> Solution:
    """A linear by its own Hessian; by none, where no token came to it. tokens: that it saw."""
    weight = layer.linears[name].weight[None]
    seen = torch.eye(weight.shape[-1]) if hessian is None else hessian
    errors, probe = at_all(settings, layer.schemes[name], name, weight, seen[None])
    part = Measured(name, layer.name, group, [tokens], errors, [1.0])
    return Solution([part], {f"{name}.weight": probe})


def solve_experts(
    layer: LayerAtHand,
    settings: LayerSettings,
    name: str,
    stats: ExpertStats | RoutedTokens | None,
) -> Iterator[tuple[str, Solution]]:
    """The two stacks of an experts module, each a group. Both count by their expert's output."""
    assert stats is not None
    module = layer.experts[name]
    weights = experts.expert_weights(module)
    shapes = [experts.rows(module, weight).shape for weight in weights]
    chunk, E = experts_at_once(max(shape[2] for shape in shapes)), shapes[0][0]
    errors: list[list[list[float]]] = [[], []]
    probes: list[list[Quantized]] = [[], []]
    energy: list[float] = []
    for start in range(0, E, chunk):
        end = min(start + chunk, E)
        part = stats.part(start, end)
        check_finite(name, part.first, part.second)
        borrow_rare(module, part, average_weight(stats), settings.config.min_tokens, start)
        for i, hessian in enumerate((part.first, part.second)):
            stack = experts.stack(module, weights[i], start, end)
            found, probe = at_all(settings, layer.schemes[name], name, stack, hessian)
            errors[i] += found
            probes[i].append(probe)
        total = output_error(stack.float(), part.second.to(stack.device))
        energy += (total.cpu() / part.weight.double().clamp(min=1e-12)).tolist()
    # The weights of a token's routing are in the Hessians: per token, not per unit of weight.
    scaled = [value * average_weight(stats) for value in energy]
    tokens = stats.tokens.tolist()
    for i, weight in enumerate(weights):
        target = f"{name}.{weight}"
        measured = Measured(target, layer.name, target, tokens, errors[i], scaled)
        yield target, Solution([measured], {target: _joined(probes[i])})


def at_all(
    settings: LayerSettings, like: Scheme, name: str, weight: Tensor, hessian: Tensor
) -> tuple[list[list[float]], Quantized]:
    """Of matrices [E, N, K]: their squared relative errors in each of their `ways`, and what they
    are at PROBE bits. like: their scheme in the settings."""
    columns: dict[tuple[int, int], list[float]] = {}
    every, inputs = ways(like), weight.shape[-1]
    kinds = [(scheme.bits, scheme.groups(inputs)) for scheme in every]
    for kind, scheme in zip(kinds, every, strict=True):
        if kind in columns:
            continue  # a matrix of one group is the same in both
        solved = solve_or_find(settings, name, weight, hessian, scheme)
        columns[kind] = [error**2 for error in solved.error]
        if scheme == replace(like, bits=PROBE):
            assert isinstance(solved.quantized, Quantized)  # codes have no widths to choose
            probe = solved.quantized.to(CPU)
    return [list(row) for row in zip(*(columns[kind] for kind in kinds), strict=True)], probe


def _joined(stacks: Sequence[Quantized]) -> Quantized:
    """Stacks of one scheme as one."""
    zeros = [stack.zero for stack in stacks if stack.zero is not None]
    return Quantized(
        torch.cat([stack.q for stack in stacks]),
        torch.cat([stack.scale for stack in stacks]),
        torch.cat(zeros) if zeros else None,
        stacks[0].scheme,
    )


def laid_out(layer: LayerAtHand, parameter: str, stack: Quantized) -> Tensor:
    """The matrices in floating point as the model lays the parameter out."""
    weights, (owner, _, weight) = dequantize(stack), parameter.rpartition(".")
    if owner not in layer.experts:
        return weights[0]
    module = layer.experts[owner]
    rows: Tensor = experts.family_rows(module, weight, weights)
    return rows.mT if module.is_transposed else rows
