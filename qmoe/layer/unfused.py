"""Experts that are modules of their own, in a list: what each saw, and what rare ones borrow.

They are quantized linear by linear. The policy for those that saw too few tokens is that of stacked
experts (calibration/coverage.py); only routing weights are not known here, so every token weighs
the same.
"""

from torch import nn

from qmoe.calibration.collect import collecting_linears
from qmoe.calibration.stats import LayerStats, LinearStats
from qmoe.layer.at_hand import LayerAtHand
from qmoe.layer.records import ExpertsRecord
from qmoe.model.adapters import each_expert


def modules_of(layer: LayerAtHand, names: list[str]) -> dict[str, list[nn.Module]]:
    """The experts of every list whose linears are among `names`."""
    lists = [name for name, each in layer.structure.unfused.items() if each[0][0] in names]
    found = {name: layer.submodule(name) for name in lists}
    return {n: [m.get_submodule(child) for child in each_expert(m)] for n, m in found.items()}


def count(layer: LayerAtHand, name: str, stats: LayerStats) -> list[int]:
    """How many tokens each expert of a list saw."""
    seen = [stats.linears.get(each[0]) for each in layer.structure.unfused[name]]
    return [0 if linear is None else int(linear.tokens) for linear in seen]


def borrow(
    layer: LayerAtHand, names: list[str], stats: LayerStats, min_tokens: int
) -> dict[str, ExpertsRecord]:
    """Top up the Hessians of experts with fewer than `min_tokens`, in place, with a sample of the
    tokens that any expert of their list was given, run through the expert itself. Returns what each
    list saw and borrowed."""
    records = {}
    for name, modules in modules_of(layer, names).items():
        tokens, sample = count(layer, name, stats), stats.samples.get(name)
        if sample is None or not len(sample):
            if any(tokens):
                records[name] = ExpertsRecord(tokens)
            continue
        rare = [e for e, n in enumerate(tokens) if n < min_tokens]
        records[name] = ExpertsRecord(tokens, borrowed=rare)
        for e in rare:
            linears = {n: layer.linears[n] for n in layer.structure.unfused[name][e]}
            borrowed = LayerStats()
            with collecting_linears(linears, borrowed):
                where = next(modules[e].parameters()).device
                modules[e](sample.to(where))
            weight = (min_tokens - tokens[e]) / len(sample)
            for linear, more in borrowed.linears.items():
                own = stats.linears.get(linear) or LinearStats.empty(len(more.hessian))
                hessian = own.hessian + weight * more.hessian
                stats.linears[linear] = LinearStats(own.tokens, hessian)
    return records
