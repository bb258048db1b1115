"""Solving the weights of a layer whose statistics are known, a few experts at a time."""

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from qmoe import experts
from qmoe.calibration.capture import Captured
from qmoe.calibration.coverage import average_weight, borrow
from qmoe.calibration.stats import ExpertStats
from qmoe.errors import CalibrationError
from qmoe.grid import dequantize
from qmoe.job import Job, Result
from qmoe.solvers.solve import Solved, experts_at_once, join, solve


def solve_parts(job: Job, names: list[str], result: Result) -> None:
    """Quantize these modules; the layer then holds their dequantized weights."""
    for name in names:
        module = job.model.get_submodule(name)
        if name in job.layer.experts:
            _solve_experts(job, name, module, result)
        else:
            _solve_linear(job, name, module, result)


def _solve_linear(job: Job, name: str, module: Any, result: Result) -> None:
    linear = result.stats.linears.get(name)
    hessian = linear.hessian[None] if linear is not None else None
    solved = _solve(job, name, module.weight[None], hessian)
    if hessian is None and job.config.method != "rtn":
        # Its family multiplies with the weight by hand, or no token came to this expert.
        solved = replace(solved, rounded=[0])
    module.weight.data.copy_(dequantize(solved.quantized)[0])
    result.weights[f"{name}.weight"] = solved.quantized
    result.record["dense"][name] = _entry(solved, single=True)


def _solve_experts(job: Job, name: str, module: nn.Module, result: Result) -> None:
    stats = result.stats.experts.get(name) or result.captured.get(name)
    entry = result.record["experts"].setdefault(name, {})
    if stats is not None:
        entry |= {"tokens": stats.tokens.tolist(), "gate_mass": stats.gate_mass.tolist()}
    weights = experts.expert_weights(module)
    stacks = [experts.stack(module, weight) for weight in weights]
    E = len(stacks[0])
    chunk = experts_at_once(max(stack.shape[2] for stack in stacks))
    solved: list[list[Solved]] = [[], []]
    for start in range(0, E, chunk):
        end = min(start + chunk, E)
        part = None if stats is None else stats.part(start, end)
        if stats is not None and part is not None:
            _check_finite(name, part)
            if job.config.method != "awq":  # which borrows before it folds
                rare = borrow_rare(job, module, part, stats, start)
                entry.setdefault("borrowed", []).extend(rare)
        hessians = (None, None) if part is None else (part.first, part.second)
        for i, (weight, hessian) in enumerate(zip(weights, hessians, strict=True)):
            solved[i].append(_solve(job, name, stacks[i][start:end], hessian))
            experts.put(module, weight, dequantize(solved[i][-1].quantized), start)
    for weight, parts in zip(weights, solved, strict=True):
        whole = join(parts)
        result.weights[f"{name}.{weight}"] = whole.quantized
        entry[weight] = _entry(whole, single=False)


def borrow_rare(
    job: Job, module: nn.Module, part: ExpertStats, whole: ExpertStats | Captured, start: int
) -> list[int]:
    """Top up the rare experts of a part that begins at expert `start`; returns which those were."""
    first = experts.expert_weights(module)[0]

    def middle(e: int, x: Tensor) -> Tensor:
        return experts.activation(module, experts.product(module, first, start + e, x))

    rare = borrow(part, middle, job.config.min_tokens, average_weight(whole))
    return [start + e for e in rare]


def _check_finite(name: str, part: ExpertStats) -> None:
    if not (part.first.isfinite().all() and part.second.isfinite().all()):
        raise CalibrationError(f"{name}: calibration gave NaN or Inf; the model overflows on it")


def _solve(job: Job, name: str, weight: Tensor, hessian: Tensor | None) -> Solved:
    config = job.config
    return solve(
        weight,
        hessian,
        job.schemes[name],
        config.method,
        scale_dtype=job.scale_dtype,
        act_order=config.act_order,
        damp=config.damp,
    )


def _entry(solved: Solved, single: bool) -> dict[str, Any]:
    error = [round(e, 6) for e in solved.error]
    entry: dict[str, Any] = {}
    if error:
        entry["error"] = error[0] if single else error
    if solved.damped:
        entry["damped"] = {str(e): amount for e, amount in solved.damped.items()}
    if solved.rounded:
        entry["rounded"] = solved.rounded
    return entry
