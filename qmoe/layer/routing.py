"""What a layer's routers choose, and how far their logits are from the original model's.

A token that goes to another expert is lost altogether, however small the difference of logits that
sent it there; at 4 bits such tokens, one in a hundred, are half of the KL.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qmoe.calibration.collect import watching_experts
from qmoe.errors import CalibrationError
from qmoe.layer.job import Job
from qmoe.model import experts

Parameters = dict[str, Tensor]


def router_parameters(job: Job) -> Parameters:
    """The routers' weight matrices in the layer, by name; a router is what a family has instead of
    a linear beside its experts, or what the layer's structure calls one."""
    found: Parameters = {}
    blocks = {name.rpartition(".")[0] for name in job.layer.experts}
    layer = job.model.get_submodule(job.layer.name)
    for name, module in layer.named_modules(prefix=job.layer.name):
        beside = name.rpartition(".")[0] in blocks and name not in job.layer.experts
        if job.layer.kept.get(name) == "router" or (beside and not isinstance(module, nn.Linear)):
            own = module.named_parameters(recurse=False)
            found |= {f"{name}.{key}": p for key, p in own if p.dim() == 2}
    return found


def routers(job: Job) -> dict[str, str]:
    """By experts module: the name of its router's weight [E, H], where there is one with a row for
    each expert."""
    found = {}
    for name in job.layer.experts:
        block, module = name.rpartition(".")[0] + ".", job.model.get_submodule(name)
        first = experts.rows(module, experts.expert_weights(module)[0])
        for key, weight in router_parameters(job).items():
            fits = len(weight) >= len(first) and weight.shape[1] == first.shape[2]
            if key.startswith(block) and fits:
                found[name] = key
    return found


@contextmanager
def recording_routes(modules: dict[str, Any]) -> Iterator[dict[str, list[Tensor]]]:
    """The experts [T, A] that every call of these modules sends its tokens to, by module."""
    routes: dict[str, list[Tensor]] = {name: [] for name in modules}

    def see(name: str, hidden: Tensor, index: Tensor) -> None:
        routes[name].append(index.cpu())

    with watching_experts(modules, see):
        yield routes


@contextmanager
def recording_inputs(modules: dict[str, Any]) -> Iterator[dict[str, list[Tensor]]]:
    """What every call of these modules is given, [T, H], by module, until `router_logits`."""
    inputs: dict[str, list[Tensor]] = {name: [] for name in modules}

    def see(name: str, hidden: Tensor, index: Tensor) -> None:
        inputs[name].append(hidden)

    with watching_experts(modules, see):
        yield inputs


def router_logits(
    inputs: dict[str, list[Tensor]], routers: dict[str, str], weights: Parameters
) -> Parameters:
    """Router logits [T, E] of one batch, by experts module: its router's weight times what the
    experts get. Biases, scores and groups come after that; a norm of the router's own is left out
    here, in the original as in the quantized model. Empties `inputs`."""
    logits = {}
    for name, given in inputs.items():
        if name in routers and given:
            x = torch.cat(given)
            logits[name] = x @ weights[routers[name]].T.to(x.dtype)
        given.clear()
    return logits


def logits_error(logits: Parameters, wanted: Parameters) -> Tensor | float:
    """Mean over tokens of the squared error of router logits over their squared size, both less
    their mean, which chooses nothing; summed over routers. CalibrationError where the quantized
    layer's experts are given other tokens."""
    total: Tensor | float = 0.0
    for name, aim in wanted.items():
        made = logits.get(name)
        if made is None or made.shape != aim.shape:
            found = None if made is None else tuple(made.shape)
            raise CalibrationError(
                f"{name}: its experts are given other tokens than the original's (logits {found}, "
                f"expected {tuple(aim.shape)}), so that it cannot be tuned; use --tune 0"
            )
        aim = aim.to(made.device)
        total = total + relative_error(
            made - made.mean(-1, keepdim=True), aim - aim.mean(-1, keepdim=True)
        )
    return total


def relative_error(output: Tensor, target: Tensor) -> Tensor:
    """Mean over tokens of squared error over squared size."""
    size = target.float().square().sum(-1)
    lost = (output.float() - target.float()).square().sum(-1)
    return torch.where(size > 0, lost / size.clamp(min=torch.finfo(torch.float32).tiny), 0).mean()
