"""Experts that are modules of their own, in a list: what each saw, and what rare ones borrow.

They are quantized linear by linear. The policy for those that saw too few tokens is that of stacked
experts (calibration/coverage.py); only gates are not known here, so every token weighs the same.
"""

from torch import nn

from qmoe.calibration.collect import collecting_linears
from qmoe.calibration.stats import LayerStats, LinearStats
from qmoe.layer.job import Job, Result
from qmoe.model.adapters import each_expert


def modules_of(job: Job, names: list[str]) -> dict[str, list[nn.Module]]:
    """The experts of every list whose linears are among `names`."""
    lists = [name for name, each in job.layer.loose.items() if each[0][0] in names]
    found = {name: job.model.get_submodule(name) for name in lists}
    return {n: [m.get_submodule(child) for child in each_expert(m)] for n, m in found.items()}


def count(job: Job, name: str, result: Result) -> list[int]:
    """Record how many tokens each expert of a list saw."""
    seen = [result.stats.linears.get(each[0]) for each in job.layer.loose[name]]
    tokens = [0 if stats is None else int(stats.tokens) for stats in seen]
    result.record["experts"][name] = {"tokens": tokens}
    return tokens


def borrow(job: Job, names: list[str], result: Result) -> None:
    """Top up the Hessians of rare experts with a sample of the tokens that any expert of their list
    was given, run through the expert itself."""
    for name, modules in modules_of(job, names).items():
        sample = result.stats.samples.get(name)
        if sample is None or not len(sample):
            continue
        tokens = count(job, name, result)
        rare = [e for e, n in enumerate(tokens) if n < job.config.min_tokens]
        result.record["experts"][name]["borrowed"] = rare
        for e in rare:
            linears = {n: job.model.get_submodule(n) for n in job.layer.loose[name][e]}
            borrowed = LayerStats()
            with collecting_linears(linears, borrowed):
                where = next(modules[e].parameters()).device
                modules[e](sample.to(where))
            weight = (job.config.min_tokens - tokens[e]) / len(sample)
            for linear, stats in borrowed.linears.items():
                own = result.stats.linears.get(linear) or LinearStats.empty(len(stats.hessian))
                hessian = own.hessian + weight * stats.hessian
                result.stats.linears[linear] = LinearStats(own.tokens, hessian)
