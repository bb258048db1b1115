"""Quantizing one decoder layer that is in memory: gather, fold, solve, put the result back.

After `quantize_layer` the layer holds the dequantized weights, so that the layers behind it see
what they will see at run time.
"""

import math
from collections.abc import Callable
from typing import Any

import torch

from qmoe.calibration.coverage import routes_kept
from qmoe.calibration.moments import Inputs, keeping_inputs
from qmoe.calibration.stats import LayerStats
from qmoe.errors import CalibrationError
from qmoe.layer import unfused
from qmoe.layer.awq import TOLERANCE, fold_experts, fold_norm
from qmoe.layer.job import Job, Result
from qmoe.layer.refit import refit_linears, steps
from qmoe.layer.routing import (
    recording_inputs,
    recording_routes,
    router_logits,
    router_parameters,
    routers,
)
from qmoe.layer.solve import borrow_rare, solve_parts
from qmoe.layer.statistics import Forward, gather, run_layer
from qmoe.layer.tune import Aims, hidden, tune
from qmoe.model import experts as routed
from qmoe.model.experts import packed_parameters
from qmoe.model.layerwise import Call
from qmoe.model.norm_readers import find_folds, with_weights
from qmoe.system import distributed
from qmoe.system.devices import CPU, moved


def quantize_layer(
    job: Job,
    forward: Forward,
    calls: list[Call],
    given: LayerStats | None,
    originals: list[Call],
) -> tuple[Result, list[Any]]:
    """Quantize everything in the layer; returns the result and its outputs: for `originals` those
    of the original layer, then for `calls` those with quantized weights (of the last layer, some).

    Attention first, then the rest on inputs that come from quantized attention. With `given`
    statistics (empty ones for plain rounding) nothing is run and no outputs come back. originals:
    the inputs of the same batches in the original model, for a layer that is to be tuned.
    """
    layer, result = job.layer, Result()
    result.record = {"name": layer.name, "experts": {}, "dense": {}, "kept": layer.kept}
    aims = _original(job, forward, originals)
    targets = aims.outputs
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
        fed = names if i == 0 and given is None and job.refits else []
        if given is None:
            keep = before is None and not targets
            with keeping_inputs(_modules(job, fed), job.scratch) as inputs:
                outputs = gather(job, names, forward, calls, result, keep)
            before = before if before is not None else outputs
            if job.save is not None and not any(parts[i + 1 :]):
                job.save(result.stats)
        unfused.borrow(job, names, result)
        if job.config.applies_awq:
            _borrow_whole(job, names, result)
            _fold(job, names, forward, calls, result)
        if fed:
            _solve_in_steps(job, names, forward, calls, inputs, result)
        else:
            solve_parts(job, names, result)
    if given is not None:
        result.record["error"] = None
        return result, []
    result.captured.clear()
    if targets:
        _tune(job, forward, calls, aims, result)
    reference = targets or before or [None] * len(calls)
    after: list[Any] = [None] * len(calls)
    for i, call in enumerate(calls):
        if reference[i] is not None or not job.last:
            [output] = run_layer(job.model, job.layer, forward, [call])
            after[i] = job.scratch.keep(output)
    result.record["error"] = _output_error(layer.name, after, reference)
    return result, targets + after


def _original(job: Job, forward: Forward, originals: list[Call]) -> Aims:
    """What the layer gives and chooses before it is touched."""
    aims, modules = Aims(), _experts(job)
    weights, names = router_parameters(job), routers(job)
    with recording_routes(modules) as aims.routes, recording_inputs(modules) as inputs:
        for output in run_layer(job.model, job.layer, forward, originals):
            aims.outputs.append(job.scratch.keep(output))
            aims.logits.append(moved(router_logits(inputs, names, weights), CPU))
    return aims


def _solve_in_steps(
    job: Job, names: list[str], forward: Forward, calls: list[Call], inputs: Inputs, result: Result
) -> None:
    """Solve linears one behind the other. Ranks without a batch do as the others do."""
    owners = next((o for o in distributed.all_gather_object(inputs.owners) if o), {})
    for owner, step in steps(names, owners):
        if owner:
            before = inputs.tensors.pop(owner, [])
            refit_linears(job, step, forward, calls, before, result)
        solve_parts(job, step, result)


def _tune(job: Job, forward: Forward, calls: list[Call], aims: Aims, result: Result) -> None:
    """Tune, and record before and after: the error of the layer's output, and what share of the
    original's choices of experts it makes."""
    errors = result.record["tuning"] = {}
    for when in ("solved", "tuned"):
        if when == "tuned":
            tune(job, forward, calls, aims, result)
        with recording_routes(_experts(job)) as chosen:
            outputs = [job.scratch.keep(y) for y in run_layer(job.model, job.layer, forward, calls)]
        errors[when] = _output_error(job.layer.name, outputs, aims.outputs)
        for name, module in _experts(job).items():
            kept = routes_kept(aims.routes[name], chosen[name], module.num_experts)
            result.record["experts"][name].setdefault("routing_kept", {})[when] = round(kept, 6)


def _modules(job: Job, names: list[str]) -> dict[str, Any]:
    return {name: job.model.get_submodule(name) for name in names}


def _experts(job: Job) -> dict[str, Any]:
    return _modules(job, job.layer.experts)


def _borrow_whole(job: Job, names: list[str], result: Result) -> None:
    for name in (n for n in names if n in result.stats.experts):
        stats, module = result.stats.experts[name], job.model.get_submodule(name)
        result.record["experts"][name] = {"borrowed": borrow_rare(job, module, stats, stats, 0)}


def _fold(job: Job, names: list[str], forward: Forward, calls: list[Call], result: Result) -> None:
    """Fold AWQ's scales wherever that leaves the layer's output as it is."""

    def run(some: list[Call]) -> list[Any]:
        return list(run_layer(job.model, job.layer, forward, some))

    plain = run(calls)
    not_folded = result.record.setdefault("not_folded", [])

    def keep_if_equal(undo: Callable[[], None], what: str, changed: set[str]) -> None:
        if not _relative_rms(run(calls), plain) <= TOLERANCE:  # also where it is no number
            undo()
            not_folded.append(what)
        else:
            result.changed |= changed

    modules = with_weights(job.model.get_submodule(job.layer.name), job.layer.name)
    for fold in find_folds(modules, lambda: run(calls[:1])):
        quantized = {r for r in fold.readers if r in job.schemes}
        if not quantized & set(names):
            continue
        if quantized <= set(names):
            undo, changed = fold_norm(job.model, fold, result.stats, job.schemes, job.scale_dtype)
            keep_if_equal(undo, fold.norm, changed - packed_parameters(job.model, job.schemes))
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


def _output_error(name: str, outputs: list[Any], reference: list[Any]) -> float:
    """`_relative_rms`; CalibrationError where it is no number."""
    error = _relative_rms(outputs, reference)
    if not math.isfinite(error):
        raise CalibrationError(
            f"{name}: its output has NaN or Inf on the calibration text; the model overflows"
        )
    return error


def _relative_rms(outputs: list[Any], reference: list[Any]) -> float:
    """RMS of the difference over RMS of the reference, all batches that it has together."""
    both = zip(outputs, reference, strict=True)
    pairs = [(hidden(a), hidden(b)) for a, b in both if b is not None]
    errors = sum(float((a.float() - b.float()).square().sum()) for a, b in pairs)
    sizes = sum(float(b.float().square().sum()) for _, b in pairs)
    lost, total = (sum(distributed.all_gather_object(part)) for part in (errors, sizes))
    return (lost / total) ** 0.5 if total else 0.0
