"""Quantizing one decoder layer that is in memory: gather, fold, solve, put the result back.

After `quantize_layer` the layer holds the dequantized weights, so that the layers behind it see
what they will see at run time.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from qmoe import experts as routed
from qmoe.calibration.collect import (
    ExpertSink,
    collecting_experts,
    collecting_linears,
)
from qmoe.calibration.coverage import borrow
from qmoe.calibration.stats import ExpertStats, LayerStats
from qmoe.config import QuantConfig, Scheme
from qmoe.errors import CalibrationError, UnsupportedModelError
from qmoe.fold import TOLERANCE, find_folds, fold_experts, fold_norm
from qmoe.grid import dequantize
from qmoe.solvers.solve import Solved, solve
from qmoe.structure import Layer
from qmoe.suspend import Call
from qmoe.types import Quantized

Forward = Callable[..., Any]
SAMPLE = 256  # tokens of the layer kept for experts that saw too few of their own


@dataclass
class Result:
    """Of one layer. weights: quantized stacks by parameter name. changed: other parameters that
    AWQ rescaled. record: what goes into the report."""

    stats: LayerStats = field(default_factory=LayerStats)
    weights: dict[str, Quantized] = field(default_factory=dict)
    changed: set[str] = field(default_factory=set)
    record: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Job:
    """What is the same for every part of a layer. tokens: of calibration text, in all batches."""

    model: nn.Module
    layer: Layer
    config: QuantConfig
    schemes: dict[str, Scheme]
    scale_dtype: torch.dtype
    tokens: int
    save: Callable[[LayerStats], None] | None = None


def quantize_layer(
    job: Job, forward: Forward, calls: list[Call], given: LayerStats | None
) -> tuple[Result, list[Any]]:
    """Quantize everything in the layer; returns the result and its outputs with quantized weights.

    Attention first, then the rest on inputs that come from quantized attention. With `given`
    statistics (empty ones for plain rounding) nothing is run and no outputs come back.
    """
    layer, result = job.layer, Result()
    result.record = {"name": layer.name, "experts": {}, "dense": {}, "kept": layer.kept}
    if given is not None:
        result.stats = given
        if job.config.method != "rtn":
            _check_given(job, given)
    before: list[Any] | None = None
    outside = [n for n in layer.dense if n not in layer.in_block]
    parts = [outside, [*layer.experts, *layer.loose_linears(), *layer.in_block]]
    parts = [[n for n in part if n in job.schemes] for part in parts]
    if job.save is not None and not any(parts):
        job.save(result.stats)
    for i, names in enumerate(parts):
        if not names:
            continue
        if given is None:
            outputs = _gather(job, names, forward, calls, result)
            before = before if before is not None else outputs
            if job.save is not None and not any(parts[i + 1 :]):
                job.save(result.stats)
        for name in names:
            if name in result.stats.experts:
                _borrow(job, name, result)
        if job.config.method == "awq":
            _fold(job, names, forward, calls, result)
        _solve(job, names, result)
    if given is not None:
        result.record["error"] = None
        return result, []
    after = [forward(*c.args, **c.kwargs) for c in calls]
    result.record["error"] = _relative_rms(after, before or after)
    return result, after


def _gather(
    job: Job, names: list[str], forward: Forward, calls: list[Call], result: Result
) -> list[Any]:
    """Run the layer on all batches and add the statistics of `names` to the result."""
    experts = [n for n in names if n in job.layer.experts]
    modules = {n: job.model.get_submodule(n) for n in names}
    for name in experts:
        module: Any = modules[name]
        first, second = (routed.stack(module, w) for w in routed.expert_weights(module))
        stats = ExpertStats.empty(len(first), first.shape[2], second.shape[2])
        result.stats.experts[name] = stats
        stride = max(1, job.tokens // SAMPLE)
        module._qmoe_sink = ExpertSink(stats, job.config.gate_weighted, stride)
    linears = {n: m for n, m in modules.items() if n not in experts}
    every = [job.model.get_submodule(n) for n in job.layer.experts]
    with collecting_experts(every), collecting_linears(linears, result.stats):
        outputs = [forward(*c.args, **c.kwargs) for c in calls]
    for name, tensor in result.stats.tensors()[0].items():
        if not tensor.isfinite().all():
            raise CalibrationError(
                f"{name.partition('|')[0]}: calibration gave NaN or Inf; the model overflows on it"
            )
    for name, each in job.layer.loose.items():
        if each[0][0] in names and not _count_loose(name, each, result):
            raise UnsupportedModelError(f"{name}: no calibration token reached its experts")
    for name in experts:
        del modules[name]._qmoe_sink
        if not int(result.stats.experts[name].tokens.sum()):
            kind = type(modules[name]).__name__
            raise UnsupportedModelError(
                f"{name} ({kind}): no calibration token reached its experts"
            )
    return outputs


def _count_loose(name: str, linears: list[list[str]], result: Result) -> int:
    """Record how many tokens each expert of a list saw; returns the sum."""
    seen = [result.stats.linears.get(each[0]) for each in linears]
    tokens = [0 if stats is None else int(stats.tokens) for stats in seen]
    result.record["experts"][name] = {"tokens": tokens}
    return sum(tokens)


def _borrow(job: Job, name: str, result: Result) -> None:
    module: Any = job.model.get_submodule(name)
    first = routed.expert_weights(module)[0]
    rare = borrow(
        result.stats.experts[name],
        lambda e, x: routed.activation(module, routed.product(module, first, e, x)),
        job.config.min_tokens,
    )
    result.record["experts"][name] = {"borrowed": rare}


def _fold(job: Job, names: list[str], forward: Forward, calls: list[Call], result: Result) -> None:
    """Fold AWQ's scales wherever that leaves the layer's output as it is."""

    def run(some: list[Call]) -> list[Any]:
        with collecting_experts([job.model.get_submodule(n) for n in job.layer.experts]):
            return [forward(*c.args, **c.kwargs) for c in some]

    plain = run(calls)
    not_folded = result.record.setdefault("not_folded", [])

    def keep_if_equal(undo: Callable[[], None], what: str, changed: set[str]) -> None:
        if _relative_rms(run(calls), plain) > TOLERANCE:
            undo()
            not_folded.append(what)
        else:
            result.changed |= changed

    layer = job.model.get_submodule(job.layer.name)
    for fold in find_folds(layer, job.layer.name, lambda: run(calls[:1])):
        quantized = {r for r in fold.readers if r in job.schemes}
        if not quantized & set(names):
            continue
        if quantized <= set(names):
            undo, changed = fold_norm(job.model, fold, result.stats, job.schemes, job.scale_dtype)
            keep_if_equal(undo, fold.norm, changed - set(_quantized_names(job)))
        elif fold.norm not in not_folded:
            # Attention and experts that read one norm are solved at different times.
            not_folded.append(fold.norm)
    for name in (n for n in names if n in job.layer.experts):
        module: Any = job.model.get_submodule(name)
        if module.has_gate:
            stats = result.stats.experts[name]
            undo = fold_experts(module, stats, job.schemes[name], job.scale_dtype)
            first = f"{name}.{routed.expert_weights(module)[0]}_bias"
            keep_if_equal(undo, f"{name} (up to down)", {first} if module.has_bias else set())


def _quantized_names(job: Job) -> list[str]:
    """Parameters that are stored packed."""
    names = []
    for name in job.schemes:
        module = job.model.get_submodule(name)
        weights = routed.expert_weights(module) if name in job.layer.experts else ("weight",)
        names += [f"{name}.{weight}" for weight in weights]
    return names


def _solve(job: Job, names: list[str], result: Result) -> None:
    for name in names:
        module: Any = job.model.get_submodule(name)
        if name not in job.layer.experts:
            linear = result.stats.linears.get(name)
            hessian = linear.hessian[None] if linear is not None else None
            solved = _solve_one(job, f"{name}.weight", module.weight[None], hessian, result)
            if hessian is None and job.config.method != "rtn":
                # Its family multiplies with the weight by hand; nothing was seen of its inputs.
                solved = replace(solved, rounded=[0])
            module.weight.data.copy_(dequantize(solved.quantized)[0])
            result.record["dense"][name] = _entry(solved, single=True)
            continue
        stats = result.stats.experts.get(name)
        entry = result.record["experts"].setdefault(name, {})
        if stats is not None:
            entry |= {"tokens": stats.tokens.tolist(), "gate_mass": stats.gate_mass.tolist()}
        hessians = (None, None) if stats is None else (stats.first, stats.second)
        for weight, hessian in zip(routed.expert_weights(module), hessians, strict=True):
            stack = routed.stack(module, weight)
            solved = _solve_one(job, f"{name}.{weight}", stack, hessian, result)
            routed.put(module, weight, dequantize(solved.quantized))
            entry[weight] = _entry(solved, single=False)


def _solve_one(
    job: Job, target: str, weight: Tensor, hessian: Tensor | None, result: Result
) -> Solved:
    config = job.config
    solved = solve(
        weight,
        hessian,
        job.schemes[target.rpartition(".")[0]],
        config.method,
        scale_dtype=job.scale_dtype,
        act_order=config.act_order,
        damp=config.damp,
    )
    result.weights[target] = solved.quantized
    return solved


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


def _check_given(job: Job, given: LayerStats) -> None:
    for name in job.layer.experts:
        module = job.model.get_submodule(name)
        weights = [routed.stack(module, w) for w in routed.expert_weights(module)]
        stats = given.experts.get(name)
        found = None if stats is None else (stats.first.shape, stats.second.shape)
        wanted = tuple(torch.Size((len(w), w.shape[2], w.shape[2])) for w in weights)
        if found != wanted:
            raise CalibrationError(
                f"{name}: the saved statistics have {found}, expected {wanted}; gather them again"
            )


def _hidden(output: Any) -> Tensor:
    """The hidden states of a layer's output, which some families wrap in a tuple."""
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


def _relative_rms(outputs: list[Any], reference: list[Any]) -> float:
    """RMS of the difference over RMS of the reference, all batches together."""
    pairs = [
        (_hidden(a).float(), _hidden(b).float()) for a, b in zip(outputs, reference, strict=True)
    ]
    lost = sum(float((a - b).square().sum()) for a, b in pairs)
    total = sum(float(b.square().sum()) for _, b in pairs)
    return (lost / total) ** 0.5 if total else 0.0
