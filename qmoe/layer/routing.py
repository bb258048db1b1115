"""What a layer's routers choose, and how far their logits are from the original model's.

A token that goes to another expert is lost altogether, however small the difference of logits that
sent it there; at 4 bits such tokens, one in a hundred, are half of the KL.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qmoe.errors import CalibrationError
from qmoe.layer.at_hand import LayerAtHand
from qmoe.model import experts

Parameters = dict[str, Tensor]


def router_parameters(layer: LayerAtHand) -> Parameters:
    """The weight matrices by which routers of the layer score experts, by name. A router that is no
    linear is among them beside fused experts only: beside others its scores may be anything."""
    blocks = {name.rpartition(".")[0] for name in layer.experts}
    found: Parameters = {}
    for name in layer.structure.routers:
        module = layer.submodule(name)
        if isinstance(module, nn.Linear) or name.rpartition(".")[0] in blocks:
            own = module.named_parameters(recurse=False)
            found |= {f"{name}.{key}": p for key, p in own if p.dim() == 2}
    return found


def routers(layer: LayerAtHand) -> dict[str, str]:
    """By experts module: the name of its router's weight [E, H], where there is one with a row for
    each expert."""
    found = {}
    for name, module in layer.experts.items():
        block = name.rpartition(".")[0] + "."
        first = experts.rows(module, experts.expert_weights(module)[0])
        for key, weight in router_parameters(layer).items():
            fits = len(weight) >= len(first) and weight.shape[1] == first.shape[2]
            if key.startswith(block) and fits:
                found[name] = key
    return found


@dataclass
class Seen:
    """What the experts modules of a layer were given, by module; `see` for LayerAtHand.run.

    routes: the chosen experts [T, A] of every call.
    inputs: the hidden states [T, H] of every call, until `router_logits` takes them.
    """

    routes: dict[str, list[Tensor]] = field(default_factory=dict)
    inputs: dict[str, list[Tensor]] = field(default_factory=dict)

    def routed(self, name: str, x: Tensor, ids: Tensor, routing_weights: Tensor) -> None:
        self.routes.setdefault(name, []).append(ids.cpu())

    def given(self, name: str, x: Tensor, ids: Tensor, routing_weights: Tensor) -> None:
        self.inputs.setdefault(name, []).append(x)

    def both(self, *what: Any) -> None:
        self.routed(*what)
        self.given(*what)


def routes_kept(before: list[Tensor], after: list[Tensor], experts: int) -> float:
    """Share of the experts chosen for each token, [T, A] a call, that are chosen again."""
    same = chosen = 0
    for a, b in zip(before, after, strict=True):
        again = (a[:, :, None] == b[:, None]).any(2) & (a < experts)
        same, chosen = same + int(again.sum()), chosen + int((a < experts).sum())
    return same / max(chosen, 1)


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
