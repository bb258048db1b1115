"""Solving the weights of a layer whose statistics are known, a few experts at a time."""

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from qmoe.calibration.capture import Captured
from qmoe.calibration.coverage import average_weight, borrow
from qmoe.calibration.moments import second_moments
from qmoe.calibration.stats import ExpertStats
from qmoe.errors import CalibrationError
from qmoe.format.grid import dequantize
from qmoe.format.quantized import Quantized
from qmoe.layer.job import Job, Result
from qmoe.layer.solved_cache import Unit
from qmoe.model import experts
from qmoe.solvers.refit import refit
from qmoe.solvers.solve import Solved, experts_at_once, join, solve
from qmoe.system import distributed
from qmoe.system.devices import CPU


def solve_parts(job: Job, names: list[str], result: Result) -> None:
    """Quantize these modules; the layer then holds their dequantized weights."""
    for name in names:
        module = job.model.get_submodule(name)
        if name in job.layer.experts:
            _solve_experts(job, name, module, result)
        else:
            _solve_linear(job, name, module, result)


def hold(job: Job, target: str, quantized: Quantized) -> None:
    """Have the layer hold the dequantized weights of parameter `target`."""
    name, _, weight = target.rpartition(".")
    module: Any = job.model.get_submodule(name)
    if name in job.layer.experts:
        _put(module, weight, quantized, 0)
    else:
        module.weight.data.copy_(dequantize(quantized.to(module.weight.device))[0])


def _put(module: Any, weight: str, quantized: Quantized, start: int) -> None:
    there = quantized.to(getattr(module, weight).device)
    experts.put(module, weight, dequantize(there), start)


def _solve_linear(job: Job, name: str, module: Any, result: Result) -> None:
    linear = result.stats.linears.get(name)
    hessian = linear.hessian[None] if linear is not None else None
    solved = _solve(job, name, module.weight[None], hessian)
    if job.config.tune:
        result.originals[f"{name}.weight"] = module.weight[None].to(CPU, copy=True)
    if hessian is None and job.config.method != "rtn":
        # Its family multiplies with the weight by hand, or no token came to this expert.
        solved = replace(solved, rounded=[0])
    hold(job, f"{name}.weight", solved.quantized)
    result.weights[f"{name}.weight"] = solved.quantized
    result.record["dense"][name] = entry_of(solved, single=True)


def _solve_experts(job: Job, name: str, module: nn.Module, result: Result) -> None:
    stats = result.stats.experts.get(name) or result.captured.get(name)
    entry = result.record["experts"].setdefault(name, {})
    if stats is not None:
        entry |= {"tokens": stats.tokens.tolist(), "gate_mass": stats.gate_mass.tolist()}
    weights = experts.expert_weights(module)
    if job.config.tune:
        result.originals |= {
            f"{name}.{w}": experts.stack(module, w).to(CPU, copy=True) for w in weights
        }
    E, chunk = len(experts.rows(module, weights[0])), _experts_at_once(module)
    starts = range(0, E, chunk)
    units: list[Unit] = []
    for first in range(0, len(starts), distributed.count()):
        at_once = starts[first : first + distributed.count()]
        mine = at_once[distributed.rank()] if distributed.rank() < len(at_once) else None
        made = None if mine is None else _unit(job, name, stats, mine, min(mine + chunk, E))
        for start, unit in zip(at_once, distributed.all_gather_object(made), strict=False):
            assert unit is not None
            for weight, solved in zip(weights, unit.solved, strict=True):
                _put(module, weight, solved.quantized, start)
            units.append(unit)
    if stats is not None and not job.config.applies_awq:  # which borrows before it folds
        entry["borrowed"] = [e for unit in units for e in unit.borrowed]
    if units[0].fitted is not None:
        fitted = [unit.fitted for unit in units if unit.fitted is not None]
        result.originals[f"{name}.{weights[1]}"] = torch.cat(fitted)
    for i, weight in enumerate(weights):
        whole = join([unit.solved[i] for unit in units])
        result.weights[f"{name}.{weight}"] = whole.quantized
        entry[weight] = entry_of(whole, single=False)


def _experts_at_once(module: nn.Module) -> int:
    """By sizes alone, so that a run that goes on finds its units; fewer if ranks would idle."""
    shapes = [experts.rows(module, w).shape for w in experts.expert_weights(module)]
    share = -(-shapes[0][0] // distributed.count())
    return min(share, experts_at_once(max(shape[2] for shape in shapes)))


def _unit(job: Job, name: str, stats: ExpertStats | Captured | None, start: int, end: int) -> Unit:
    """Experts start to end of a module solved, or as an earlier run solved them."""
    if job.units is not None:
        known = job.units.load(name, start, end, job.schemes[name])
        if known is not None:
            return known
    module = job.model.get_submodule(name)
    feedback = job.refits and isinstance(stats, Captured)
    part = None
    if isinstance(stats, Captured):
        part = stats.part(start, end, second=not feedback)
    elif stats is not None:
        part = stats.part(start, end)
    borrowed: list[int] = []
    if stats is not None and part is not None:
        check_finite(name, part.first, part.second)
        if not job.config.applies_awq:
            borrowed = borrow_rare(job, module, part, stats, start)
    first, second = (experts.stack(module, w, start, end) for w in experts.expert_weights(module))
    solved = _solve(job, name, first, None if part is None else part.first)
    hessian = None if part is None else part.second
    if isinstance(stats, Captured) and feedback:
        there = dequantize(solved.quantized.to(first.device))
        cross, hessian = second_moments(stats, start, there, job.config.min_tokens)
        check_finite(name, cross, hessian)
        second = refit(second, cross, hessian, job.config.damp)
    # Contiguous: some families keep their experts transposed, and so is what is fitted then.
    fitted = second.to(CPU).contiguous() if feedback and job.config.tune else None
    unit = Unit([solved, _solve(job, name, second, hessian)], borrowed, fitted)
    if job.units is not None:
        job.units.save(name, start, end, unit)
    return unit


def borrow_rare(
    job: Job, module: nn.Module, part: ExpertStats, whole: ExpertStats | Captured, start: int
) -> list[int]:
    """Top up the rare experts of a part that begins at expert `start`; returns which those were."""
    first = experts.expert_weights(module)[0]

    def middle(e: int, x: Tensor) -> Tensor:
        there = x.to(getattr(module, first).device)
        mid = experts.activation(module, experts.product(module, first, start + e, there))
        return mid.to(x.device)

    rare = borrow(part, middle, job.config.min_tokens, average_weight(whole))
    return [start + e for e in rare]


def check_finite(name: str, *moments: Tensor) -> None:
    """CalibrationError unless all these sums are finite."""
    if not all(moment.isfinite().all() for moment in moments):
        raise CalibrationError(f"{name}: calibration gave NaN or Inf; the model overflows on it")


def _solve(job: Job, name: str, weight: Tensor, hessian: Tensor | None) -> Solved:
    config = job.config
    solved = solve(
        weight,
        hessian,
        job.schemes[name],
        config.method,
        scale_dtype=job.scale_dtype,
        act_order=config.act_order,
        damp=config.damp,
        search_grid=config.search_grid,
    )
    check_errors(name, solved)
    return solved


def check_errors(name: str, solved: Solved) -> None:
    """CalibrationError unless what was lost is known."""
    if not all(map(math.isfinite, solved.error)):
        raise CalibrationError(
            f"{name}: its weights times its inputs are too large for float32, so that nothing can "
            "be said of what rounding loses; use --method rtn"
        )


def entry_of(solved: Solved, single: bool) -> dict[str, Any]:
    error = [round(e, 6) for e in solved.error]
    entry: dict[str, Any] = {}
    if error:
        entry["error"] = error[0] if single else error
    if solved.damped:
        entry["damped"] = {str(e): amount for e, amount in solved.damped.items()}
    if solved.rounded:
        entry["rounded"] = solved.rounded
    if solved.bounded:
        dtype = str(solved.quantized.scale.dtype).removeprefix("torch.")
        rows = {str(e): count for e, count in solved.bounded.items()}
        entry["bounded"] = {"dtype": dtype, "rows": rows}
    return entry
