"""Running one layer on all batches, and gathering what its matrices get there."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any

import torch
from torch import nn

from qmoe.calibration.capture import Captured
from qmoe.calibration.collect import (
    Ended,
    collecting_experts,
    collecting_linears,
    ending_at,
    sampling,
    watching_experts,
)
from qmoe.calibration.stats import LayerStats, LinearStats
from qmoe.errors import UnsupportedModelError
from qmoe.layer import unfused
from qmoe.layer.job import Job, Result
from qmoe.layer.solve import check_finite
from qmoe.model.layerwise import Call
from qmoe.model.structure import Layer
from qmoe.system import distributed
from qmoe.system.devices import CPU, moved, whereabouts

Forward = Callable[..., Any]
SAMPLE = 256  # tokens of the layer kept for experts that saw too few of their own
EVERY = 4  # of so many batches one says how far a layer that is not tuned is from the original


def run_layer(model: nn.Module, layer: Layer, forward: Forward, calls: list[Call]) -> Iterator[Any]:
    """The layer's output for each batch, with experts run by qmoe: they may be in 16 bits, whatever
    the activations are. Batches come to where the layer is, and outputs go back."""
    device = whereabouts(model.get_submodule(layer.name))
    with collecting_experts([model.get_submodule(n) for n in layer.experts]):
        for call in calls:
            args, kwargs = call.moved(device)
            yield moved(forward(*args, **kwargs), CPU)


def gather(
    job: Job, names: list[str], forward: Forward, calls: list[Call], result: Result, keep: bool
) -> list[Any]:
    """Run the layer on all batches and add the statistics of `names` to the result. Returns the
    outputs of some of them if they are to be kept, with None for the others."""
    experts = [n for n in names if n in job.layer.experts]
    modules: dict[str, Any] = {name: job.model.get_submodule(name) for name in names}
    stride = max(1, job.tokens // SAMPLE)
    for name in experts:
        # One experts module, nothing behind it that is gathered, no output kept: not computed.
        last = not keep and names == experts == [name]
        captured = Captured(modules[name], job.config.routing_weighted, stride, job.scratch, last)
        result.captured[name] = modules[name]._qmoe_captured = captured
    linears = {n: m for n, m in modules.items() if n not in experts}
    lists = unfused.modules_of(job, names)
    sampled = sampling(lists, stride, result.stats.samples)
    shared = {n: m for n, m in linears.items() if n in job.layer.dense}
    own = {n: m for n, m in linears.items() if n not in shared}  # an expert's: many, and small sums
    collected = collecting_linears(shared, result.stats, torch.float64)
    with sampled, collected, collecting_linears(own, result.stats):
        if not experts and not lists:
            outputs = run_some(job, forward, calls, result.stats, keep)
        else:
            outputs = [
                job.scratch.keep(out) if keep else None
                for out in run_layer(job.model, job.layer, forward, calls)
            ]
    _add_ranks(result.stats, list(linears), list(lists))
    for name in experts:
        del modules[name]._qmoe_captured
        _finish(job, name, modules[name], result)
    for name, tensor in result.stats.tensors()[0].items():
        check_finite(name.partition("|")[0], tensor)
    for name in lists:
        if not any(unfused.count(job, name, result)):
            raise UnsupportedModelError(f"{name}: no calibration token reached its experts")
    return outputs if keep else []


def run_some(
    job: Job, forward: Forward, calls: list[Call], stats: LayerStats, keep: bool
) -> list[Any]:
    """The outputs of every EVERY-th batch if they are to be kept. The others run as far as there is
    something to gather: not through the experts, unless a linear behind them adds to `stats`."""
    modules = {name: job.model.get_submodule(name) for name in job.layer.experts}
    outputs, ends = [None] * len(calls), False
    at_experts: list[dict[str, int]] = []
    ahead = sum(
        distributed.all_gather_object(len(calls))[: distributed.rank()]
    )  # batches of the ranks before this one

    def tokens() -> dict[str, int]:
        return {name: int(linear.tokens) for name, linear in stats.linears.items()}

    for i, call in enumerate(calls):
        watched: AbstractContextManager[None] = nullcontext()
        kept = keep and (ahead + i) % EVERY == 0
        if i == 0:
            watched = watching_experts(modules, lambda *_: at_experts.append(tokens()))
        elif ends and not kept:
            watched = ending_at(list(modules.values()))
        with watched, suppress(Ended):
            [output] = run_layer(job.model, job.layer, forward, [call])
            outputs[i] = job.scratch.keep(output) if kept else None
        ends = ends or (i == 0 and at_experts[:1] == [tokens()])
    return outputs


def _add_ranks(stats: LayerStats, linears: list[str], lists: list[str]) -> None:
    """Sum the statistics of linears over the ranks, and join the samples of lists of experts."""
    for name in linears if distributed.count() > 1 else []:
        here = stats.linears.get(name)
        size = max(distributed.all_gather_object(0 if here is None else len(here.hessian)))
        if size:  # else no token of any rank came to this linear
            total = LinearStats.empty(size, torch.float64)
            if here is not None:
                total.tokens += here.tokens
                total.hessian += here.hessian
            distributed.all_reduce(total.tokens)
            distributed.all_reduce(total.hessian)
            stats.linears[name] = total
    for linear in stats.linears.values():
        linear.hessian = linear.hessian.float()
    for name in lists:
        found = [
            sample
            for sample in distributed.all_gather_object(stats.samples.get(name))
            if sample is not None
        ]
        if found:
            stats.samples[name] = torch.cat(found)


def _finish(job: Job, name: str, module: nn.Module, result: Result) -> None:
    """All batches ran: have the statistics of an experts module ready."""
    captured = result.captured[name]
    if not captured.called():
        kind = type(module).__name__
        raise UnsupportedModelError(f"{name} ({kind}): no calibration token reached its experts")
    captured.finish()
    check_finite(name, *captured.received())
    if job.whole:
        result.stats.experts[name] = captured.part(0, len(captured.tokens))
        del result.captured[name]
