"""Dense linears one behind the other: each is fitted to what those before it give once quantized.

The layer runs again for every step, up to the linears in question and no further.
"""

from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from qmoe.calibration.stats import LinearStats, add_products, check_finite
from qmoe.layer.at_hand import LayerAtHand, LayerSettings
from qmoe.model.hooks import hooked
from qmoe.model.layerwise import Call
from qmoe.solvers.refit import refit
from qmoe.system import distributed


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
    layer: LayerAtHand,
    settings: LayerSettings,
    names: list[str],
    calls: list[Call],
    inputs: list[Tensor],
) -> LinearStats:
    """Fit the weights of linears that share an input to what the layer as it is now gives them;
    returns the statistics of that. inputs: what they got before, a tensor [.., K] for each of
    `calls`."""
    first = layer.linears[names[0]]
    # In float64, so that sums over batches are the same for any number of ranks: what is fitted to
    # them magnifies a last digit.
    stats = LinearStats.empty(first.in_features, torch.float64)
    cross = torch.zeros_like(stats.hessian)
    before = iter(inputs)

    def collect(module: Any, args: tuple[Any, ...]) -> None:
        now = args[0].reshape(-1, args[0].shape[-1]).float()
        then = next(before).reshape(now.shape).to(now)
        stats.add(now)
        add_products(cross, then, now)
        raise _Reached

    with hooked([(first, collect)]):
        for call in calls:
            with suppress(_Reached):
                next(layer.run([call]))
    for total in (stats.tokens, stats.hessian, cross):
        distributed.all_reduce(total)
    check_finite(names[0], stats.hessian, cross)
    stats.hessian = stats.hessian.float()
    for name in names:
        weight = layer.linears[name].weight
        damp = settings.config.damp
        moved = refit(weight[None], cross[None].float(), stats.hessian[None], damp)
        weight.data.copy_(moved[0])
    return stats
