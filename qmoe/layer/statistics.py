"""Running a layer on all batches, and collecting what its matrices are given there."""

from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from qmoe.calibration.collect import collecting_linears, sampling_tokens
from qmoe.calibration.routed_tokens import RoutedTokens
from qmoe.calibration.stats import ExpertStats, LayerStats, LinearStats, check_finite
from qmoe.errors import UnsupportedModelError
from qmoe.layer import unfused
from qmoe.layer.at_hand import LayerAtHand, LayerSettings
from qmoe.model.layerwise import Call
from qmoe.system import distributed

SAMPLE = 256  # tokens of the layer kept for experts that saw too few of their own
EVERY = 4  # of so many batches one says how far a layer that is not tuned is from the original


@dataclass
class CollectedStats(LayerStats):
    """routed: of experts modules whose statistics are made a few experts at a time, what those are
    made from."""

    routed: dict[str, RoutedTokens] = field(default_factory=dict)

    def of_experts(self, name: str) -> ExpertStats | RoutedTokens | None:
        return self.experts.get(name) or self.routed.get(name)

    def add(self, more: "CollectedStats") -> None:
        """Take over what is known of other matrices of the layer."""
        for mine, other in zip(vars(self).values(), vars(more).values(), strict=True):
            mine.update(other)


class _Ended(Exception):
    """A run of a layer that is to go no further than its experts has come there."""


def collect_statistics(
    layer: LayerAtHand, settings: LayerSettings, names: list[str], calls: list[Call], keep: bool
) -> tuple[CollectedStats, list[Any]]:
    """Run the layer on all batches: the statistics of the modules `names`, of all ranks, and if it
    is to `keep` them the outputs of some batches of this one, with None for the others. Raises
    UnsupportedModelError if no token came to the experts."""
    stats, stride = CollectedStats(), max(1, settings.tokens // SAMPLE)
    if not names:
        return stats, []
    weighted, scratch = settings.config.routing_weighted, settings.scratch
    for name in (n for n in names if n in layer.experts):
        stats.routed[name] = RoutedTokens(layer.experts[name], weighted, stride, scratch)
    linears = {n: layer.linears[n] for n in names if n in layer.linears}
    lists = unfused.modules_of(layer, names)
    shared = {n: m for n, m in linears.items() if n in layer.structure.dense}
    own = {n: m for n, m in linears.items() if n not in shared}  # an expert's: many, and small sums
    # Of one experts module the output is not computed where nothing comes of it.
    unused = not keep and names == [*stats.routed][:1]

    def see(name: str, x: Tensor, ids: Tensor, routing_weights: Tensor) -> Tensor | None:
        if name in stats.routed:
            stats.routed[name].saw(x, ids, routing_weights)
        return torch.zeros_like(x) if unused and name in stats.routed else None

    sampled = sampling_tokens(lists, stride, stats.samples)
    collected = collecting_linears(shared, stats, torch.float64)
    with sampled, collected, collecting_linears(own, stats):
        if stats.routed or lists:
            outputs = [scratch.keep(y) if keep else None for y in layer.run(calls, see)]
        else:
            outputs = run_some(layer, settings, calls, stats, keep)
    _add_ranks(stats, list(linears), list(lists))
    _finish(layer, settings, stats)
    for name in lists:
        if not any(unfused.count(layer, name, stats)):
            raise UnsupportedModelError(f"{name}: no calibration token reached its experts")
    return stats, outputs if keep else []


def run_some(
    layer: LayerAtHand, settings: LayerSettings, calls: list[Call], stats: LayerStats, keep: bool
) -> list[Any]:
    """The outputs of every EVERY-th batch if it is to `keep` them. The others run as far as there
    is something to collect: not through the experts, unless a linear behind them adds to `stats`.
    """
    outputs, ends = [None] * len(calls), False
    at_experts: list[dict[str, int]] = []
    ahead = sum(
        distributed.all_gather_object(len(calls))[: distributed.rank()]
    )  # batches of the ranks before this one

    def tokens() -> dict[str, int]:
        return {name: int(linear.tokens) for name, linear in stats.linears.items()}

    def note(*_: Any) -> None:
        at_experts.append(tokens())

    def end(*_: Any) -> None:
        raise _Ended

    for i, call in enumerate(calls):
        wanted = keep and (ahead + i) % EVERY == 0
        see = note if i == 0 else end if ends and not wanted else None
        with suppress(_Ended):
            [output] = layer.run([call], see)
            outputs[i] = settings.scratch.keep(output) if wanted else None
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


def _finish(layer: LayerAtHand, settings: LayerSettings, stats: CollectedStats) -> None:
    """All batches ran: have the statistics of experts modules ready, and check all of them."""
    for name, routed in list(stats.routed.items()):
        if not routed.called():
            kind = type(layer.experts[name]).__name__
            raise UnsupportedModelError(
                f"{name} ({kind}): no calibration token reached its experts"
            )
        routed.finish()
        check_finite(name, *routed.received())
        if settings.needs_all_hessians:
            stats.experts[name] = routed.part(0, len(routed.tokens))
            del stats.routed[name]
    for name, tensor in stats.tensors()[0].items():
        check_finite(name.partition("|")[0], tensor)
