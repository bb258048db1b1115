"""Solving the weights of a layer whose statistics are known, a few experts at a time."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from qmoe.calibration.coverage import average_weight, borrow
from qmoe.calibration.moments import second_moments
from qmoe.calibration.routed_tokens import RoutedTokens
from qmoe.calibration.stats import ExpertStats, check_finite
from qmoe.config import Method, QuantConfig, Scheme
from qmoe.errors import CalibrationError
from qmoe.format.quantized import Quantized
from qmoe.format.stacks import dequantize
from qmoe.format.trellis import Stack
from qmoe.layer.at_hand import LayerAtHand, LayerSettings, QuantizedLayer
from qmoe.layer.records import ExpertsRecord, MatrixRecord
from qmoe.layer.statistics import CollectedStats
from qmoe.model import experts
from qmoe.solved.solved_cache import SolvedExperts
from qmoe.solvers.refit import refit
from qmoe.solvers.solve import Solved, experts_at_once, in_order, join, solve, solve_codes
from qmoe.system import distributed
from qmoe.system.devices import CPU


def solve_modules(
    layer: LayerAtHand,
    settings: LayerSettings,
    names: list[str],
    stats: CollectedStats,
    made: QuantizedLayer,
) -> None:
    """Quantize the modules `names` into `made`; the layer then holds their dequantized weights."""
    for name in names:
        if name in layer.experts:
            _solve_experts(layer, settings, name, stats.of_experts(name), made)
        else:
            linear = stats.linears.get(name)
            hessian = None if linear is None else linear.hessian[None]
            _solve_linear(layer, settings, name, hessian, made)


def hold(layer: LayerAtHand, target: str, quantized: Stack) -> None:
    """Have the layer hold the dequantized weights of parameter `target`."""
    name, _, weight = target.rpartition(".")
    if name in layer.experts:
        _put(layer.experts[name], weight, quantized, 0)
    else:
        parameter = layer.linears[name].weight
        parameter.data.copy_(dequantize(quantized.to(parameter.device))[0])


def _put(module: Any, weight: str, quantized: Stack, start: int) -> None:
    there = quantized.to(getattr(module, weight).device)
    # Matrix by matrix, whose temporaries are small enough to be used again.
    parts = there.matrices() if isinstance(there, Quantized) else [there]
    for part in parts:
        values = dequantize(part)
        experts.put(module, weight, values, start)
        start += len(values)


def _solve_linear(
    layer: LayerAtHand,
    settings: LayerSettings,
    name: str,
    hessian: Tensor | None,
    made: QuantizedLayer,
) -> None:
    weight = layer.linears[name].weight[None]
    solved = _solve(layer, settings, name, weight, hessian)
    if settings.config.tune:
        made.originals[f"{name}.weight"] = weight.to(CPU, copy=True)
    if hessian is None and settings.config.method != "rtn":
        # Its family multiplies with the weight by hand, or no token came to this expert.
        solved = replace(solved, rounded=[0])
    hold(layer, f"{name}.weight", solved.quantized)
    made.weights[f"{name}.weight"] = solved.quantized
    made.record.dense[name] = MatrixRecord.of(solved)


def _solve_experts(
    layer: LayerAtHand,
    settings: LayerSettings,
    name: str,
    stats: ExpertStats | RoutedTokens | None,
    made: QuantizedLayer,
) -> None:
    module, record = layer.experts[name], made.record.experts.setdefault(name, ExpertsRecord())
    if stats is not None:
        record.tokens, record.routing_mass = stats.tokens.tolist(), stats.routing_mass.tolist()
    weights = experts.expert_weights(module)
    if settings.config.tune:
        made.originals |= {
            f"{name}.{w}": experts.stack(module, w).to(CPU, copy=True) for w in weights
        }
    E, chunk = len(experts.rows(module, weights[0])), _experts_at_once(module)
    starts = range(0, E, chunk)
    parts: list[SolvedExperts] = []
    for first in range(0, len(starts), distributed.count()):
        at_once = starts[first : first + distributed.count()]
        mine = at_once[distributed.rank()] if distributed.rank() < len(at_once) else None
        here = None
        if mine is not None:
            here = _solve_part(layer, settings, name, stats, mine, min(mine + chunk, E))
        for start, part in zip(at_once, distributed.all_gather_object(here), strict=False):
            assert part is not None
            for weight, solved in zip(weights, part.solved, strict=True):
                _put(module, weight, solved.quantized, start)
            parts.append(part)
    if stats is not None and not settings.config.applies_awq:  # which borrows before it folds
        record.borrowed = [e for part in parts for e in part.borrowed]
    if parts[0].refitted is not None:
        refitted = [part.refitted for part in parts if part.refitted is not None]
        made.originals[f"{name}.{weights[1]}"] = torch.cat(refitted)
    for i, weight in enumerate(weights):
        joined = join([part.solved[i] for part in parts])
        made.weights[f"{name}.{weight}"] = joined.quantized
        record.matrices[weight] = MatrixRecord.of(joined)


def _experts_at_once(module: Any) -> int:
    """By sizes alone, so that a run that goes on finds its parts; fewer if ranks would idle."""
    shapes = [experts.rows(module, w).shape for w in experts.expert_weights(module)]
    share = -(-shapes[0][0] // distributed.count())
    return min(share, experts_at_once(max(shape[2] for shape in shapes)))


def _solve_part(
    layer: LayerAtHand,
    settings: LayerSettings,
    name: str,
    stats: ExpertStats | RoutedTokens | None,
    start: int,
    end: int,
) -> SolvedExperts:
    """Experts start to end of a module solved, or as an earlier run solved them."""
    cache = settings.solved_cache
    if cache is not None:
        known = cache.load(name, start, end)
        if known is not None:
            return known
    module, config = layer.experts[name], settings.config
    weights = experts.expert_weights(module)
    first, second = (experts.stack(module, w, start, end) for w in weights)
    widths = [layer.widths.get(f"{name}.{w}", ())[start:end] for w in weights]
    part, borrowed, refitted = None, list[int](), None
    # Refitted below: a Hessian of what the second matrix gets before the first is quantized is not
    # needed then.
    routed = stats if settings.refits and isinstance(stats, RoutedTokens) else None
    if isinstance(stats, RoutedTokens):
        part = stats.part(start, end, second=routed is None)
    elif stats is not None:
        part = stats.part(start, end)
    if stats is not None and part is not None:
        check_finite(name, part.first, part.second)
        if not config.applies_awq:
            borrowed = borrow_rare(module, part, average_weight(stats), config.min_tokens, start)
    parts = [len(experts.matrices_of(module, w)) for w in experts.expert_weights(module)]
    before = None if part is None else part.first
    solved = _solve(layer, settings, name, first, before, parts[0], widths[0])
    hessian = None if part is None else part.second
    if routed is not None:
        there = dequantize(solved.quantized.to(first.device))
        cross, hessian = second_moments(routed, start, there, config.min_tokens)
        check_finite(name, cross, hessian)
        second = refit(second, cross, hessian, config.damp)
        # Contiguous: some families keep their experts transposed, and so is what is fitted then.
        refitted = second.to(CPU).contiguous() if config.tune else None
    both = [solved, _solve(layer, settings, name, second, hessian, parts[1], widths[1])]
    made = SolvedExperts(both, borrowed, refitted)
    if cache is not None:
        cache.save(name, start, end, made)
    return made


def borrow_rare(
    module: Any, part: ExpertStats, average: float, min_tokens: int, start: int = 0
) -> list[int]:
    """Top up the rare experts of a part that begins at expert `start`; returns which those were.
    average: weight of a token of the layer (calibration/coverage.py)."""
    first = experts.expert_weights(module)[0]

    def middle(e: int, x: Tensor) -> Tensor:
        there = x.to(getattr(module, first).device)
        mid = experts.activation(module, experts.product(module, first, start + e, there))
        return mid.to(x.device)

    return [start + e for e in borrow(part, middle, min_tokens, average)]


def _solve(
    layer: LayerAtHand,
    settings: LayerSettings,
    name: str,
    weight: Tensor,
    hessian: Tensor | None,
    parts: int = 1,
    widths: Sequence[int] = (),
) -> Solved:
    """parts: matrices that rows are made of. widths: bits of each matrix, empty where all have the
    scheme's."""
    config, scheme = settings.config, layer.schemes[name]
    if scheme.codebook:
        return solve_coded(config, name, weight, hessian, scheme, parts)
    solved = []
    for bits in sorted(set(widths)) or [scheme.bits]:
        alike = [e for e in range(len(weight)) if not widths or widths[e] == bits]
        every = len(alike) == len(weight)
        given = weight if every else weight[alike]
        seen = hessian if hessian is None or every else hessian[alike]
        each = replace(scheme, bits=bits)
        solved.append((alike, solve_or_find(settings, name, given, seen, each)))
    return solved[0][1] if len(solved) == 1 else in_order(solved)


def solve_or_find(
    settings: LayerSettings, name: str, weight: Tensor, hessian: Tensor | None, scheme: Scheme
) -> Solved:
    """`solve_as` with the method of the settings, or what is kept of it (kept_matrices.py)."""
    config, kept, dtype = settings.config, settings.kept_matrices, settings.scale_dtype

    def make(given: Tensor, seen: Tensor | None) -> Solved:
        return solve_as(config, config.method, name, given, seen, scheme, dtype)

    if kept is None or hessian is None:
        return make(weight, hessian)
    about = f"{config.method} {config.act_order} {config.damp} {config.search_grid} {dtype}"
    return kept.solve(weight, hessian, scheme, about, make)


def solve_coded(
    config: QuantConfig,
    name: str,
    weight: Tensor,
    hessian: Tensor | None,
    scheme: Scheme,
    parts: int = 1,
) -> Solved:
    """`solve_codes` with these settings; CalibrationError unless what was lost is known."""
    solved = solve_codes(weight, hessian, scheme, parts, damp=config.damp, beam=config.beam)
    return _known(name, solved)


def solve_as(
    config: QuantConfig,
    method: Method,
    name: str,
    weight: Tensor,
    hessian: Tensor | None,
    scheme: Scheme,
    scale_dtype: torch.dtype,
) -> Solved:
    """`solve` with these settings; CalibrationError unless what was lost is known."""
    solved = solve(
        weight,
        hessian,
        scheme,
        method,
        scale_dtype=scale_dtype,
        act_order=config.act_order,
        damp=config.damp,
        search_grid=config.search_grid,
    )
    return _known(name, solved)


def _known(name: str, solved: Solved) -> Solved:
    if not all(map(math.isfinite, solved.error)):
        raise CalibrationError(
            f"{name}: its weights times its inputs are too large for float32, so that nothing can "
            "be said of what rounding loses; use --method rtn"
        )
    return solved
