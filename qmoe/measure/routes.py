"""Which experts tokens go to while a model is scored: by domain, and beside the original's choices.

Only experts that are one fused module are seen: lists of experts that are modules of their own are
never given the choices.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qmoe.layer.routing import routes_kept
from qmoe.measure.scores import Batches
from qmoe.model.experts import is_experts
from qmoe.model.hooks import hooked

Routes = dict[str, list[Tensor]]  # by experts module: the experts [T, A] chosen in each batch


@contextmanager
def recorded(model: nn.Module) -> Iterator[Routes]:
    """Inside, what is chosen in every batch that runs through the model."""
    routes: Routes = {name: [] for name, module in model.named_modules() if is_experts(module)}

    def note(name: str) -> Any:
        return lambda module, args: routes[name].append(args[1].to("cpu", torch.int32))

    with hooked([(model.get_submodule(name), note(name)) for name in routes]):
        yield routes


def experts_used(routes: Routes, batches: Batches, model: nn.Module) -> dict[str, Any]:
    """{domain: {experts module: tokens that went to each expert}}."""
    found: dict[str, dict[str, Any]] = {}
    for name, chosen in routes.items():
        if not chosen:  # a part of the model that text does not reach
            continue
        experts = _count(model, name)
        for (domain, _), ids in zip(batches, chosen, strict=True):
            # Ids past the last expert stand for no expert.
            counts = torch.bincount(ids[ids < experts], minlength=experts)
            so_far = found.setdefault(domain, {}).get(name, 0)
            found[domain][name] = so_far + counts
    return {
        domain: {name: counts.tolist() for name, counts in modules.items()}
        for domain, modules in found.items()
    }


def kept(before: Routes, after: Routes, model: nn.Module) -> dict[str, float]:
    """By experts module: the share of the experts chosen in `before` that are chosen in `after`."""
    return {
        name: routes_kept(chosen, after[name], _count(model, name))
        for name, chosen in before.items()
        if chosen and len(chosen) == len(after.get(name, []))
    }


def _count(model: nn.Module, name: str) -> int:
    return int(model.get_submodule(name).num_experts)  # type: ignore[arg-type]
