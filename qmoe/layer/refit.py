"""Dense linears one behind the other: each is fitted to what those before it give once quantized.

The layer runs again for every step, up to the linears in question and no further.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qmoe.calibration.collect import collecting_experts
from qmoe.calibration.stats import LinearStats, add_products
from qmoe.layer.job import Job, Result
from qmoe.layer.solve import check_finite
from qmoe.model.layerwise import Call
from qmoe.solvers.refit import refit
from qmoe.system import distributed
from qmoe.system.devices import whereabouts


class _Reached(Exception):
    """The linear in question has its input."""


def steps(names: list[str], owners: dict[str, str]) -> list[tuple[str, list[str]]]:
    """These linears in the order in which they are to be solved, those that share an input
    together: whose input it is, and which they are. Those at the layer's front first ("")."""
    behind: dict[str, list[str]] = {owner: [] for owner in owners.values() if owner}
    front = [n for n in names if not owners.get(n)]
    for name in names:
        if owner := owners.get(name):
            behind[owner].append(name)
    return [("", front), *((owner, names) for owner, names in behind.items() if names)]


def refit_linears(
    job: Job,
    names: list[str],
    forward: Callable[..., Any],
    calls: list[Call],
    inputs: list[Tensor],
    result: Result,
) -> None:
    """Fit the weights of linears that share an input, and have their statistics of what the layer
    as it is now gives them. inputs: what they got before, a tensor [.., K] for each of `calls`."""
    first: Any = job.model.get_submodule(names[0])
    # In float64, so that sums over batches are the same for any number of ranks: what is fitted to
    # them magnifies a last digit.
    stats = LinearStats.empty(first.in_features, torch.float64)
    cross = torch.zeros_like(stats.hessian)
    before = iter(inputs)

    def gather(module: Any, args: tuple[Any, ...]) -> None:
        now = args[0].reshape(-1, args[0].shape[-1]).float()
        then = next(before).reshape(now.shape).to(now)
        stats.add(now)
        add_products(cross, then, now)
        raise _Reached

    device = whereabouts(job.model.get_submodule(job.layer.name))
    handle = first.register_forward_pre_hook(gather)
    try:
        with collecting_experts([job.model.get_submodule(n) for n in job.layer.experts]):
            for call in calls:
                args, kwargs = call.moved(device)
                try:
                    forward(*args, **kwargs)
                except _Reached:
                    continue
    finally:
        handle.remove()
    for total in (stats.tokens, stats.hessian, cross):
        distributed.all_reduce(total)
    check_finite(names[0], stats.hessian, cross)
    stats.hessian = stats.hessian.float()
    for name in names:
        linear: Any = job.model.get_submodule(name)
        moved = refit(
            linear.weight[None], cross[None].float(), stats.hessian[None], job.config.damp
        )
        linear.weight.data.copy_(moved[0])
        result.stats.linears[name] = stats
