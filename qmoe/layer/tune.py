"""Tuning a solved layer by gradient, so that its output is the original model's.

Solvers see one matrix at a time and its error under the inputs it gets. Here the whole layer is
run on what reaches it in the quantized model and held against what the original layer gives in the
original model, so it also makes up for the layers before it. What moves: integers (a latent value
that is rounded, straight-through gradient), scales, and what stays in 16 bits beside them, norms
and routers. EXL3's codes stay as they are; their scales of inputs and outputs move. The family of
AutoRound (Cheng et al., 2023, arXiv 2309.05516) and OmniQuant (Shao et al., 2023, arXiv
2308.13137), started from GPTQ's solution instead of from plain rounding.

The loss is each token's squared error over its squared size: norms divide every token by its size,
and a few huge ones (attention sinks) must not outweigh the rest. To it comes that of the router's
logits, or tuning would send tokens to other experts (routing.py).
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from qmoe.calibration.collect import collecting_experts
from qmoe.config import QuantConfig
from qmoe.errors import CalibrationError
from qmoe.format.trellis import Stack, Trellis
from qmoe.layer.at_hand import LayerAtHand, LayerSettings, QuantizedLayer
from qmoe.layer.coded import CodedMatrix, tuned_codes
from qmoe.layer.latent import Matrix, latent_experts, tuned_integers
from qmoe.layer.output_error import hidden, output_error
from qmoe.layer.routing import (
    Parameters,
    Seen,
    logits_error,
    relative_error,
    router_logits,
    router_parameters,
    routers,
    routes_kept,
)
from qmoe.layer.solve import hold
from qmoe.layer.trainable import as_stored, linear_weights, movable, run_with, running
from qmoe.model.layerwise import Call
from qmoe.system.devices import CPU, moved

# Adam's rates at the first step; they fall to zero in equal steps. A rate is roughly how far a
# value moves in a step: integers in units of 1, scales relative to what they are. Norms and routers
# make up for rounding, whose error halves with every bit: moved further they only add noise.
INTEGERS, SCALES, UNQUANTIZED = 0.01, 0.003, 0.0005  # of two bits, the last
AnyMatrix = Matrix | CodedMatrix
LOGITS = 0.3  # of the routers' error in the loss
BETAS = (0.9, 0.95)


@dataclass
class TuningTargets:
    """What the original layer gives and chooses. outputs and logits (routing.py): one for each
    batch. routes: the chosen experts [T, A] of every call of an experts module."""

    outputs: list[Any] = field(default_factory=list)
    logits: list[Parameters] = field(default_factory=list)
    routes: dict[str, list[Tensor]] = field(default_factory=dict)


def tuning_targets(layer: LayerAtHand, settings: LayerSettings, calls: list[Call]) -> TuningTargets:
    """Run a layer that is not quantized yet. calls: its inputs in the original model."""
    seen, targets = Seen(), TuningTargets()
    weights, names = router_parameters(layer), routers(layer)
    for output in layer.run(calls, seen.both):
        targets.outputs.append(settings.scratch.keep(output))
        targets.logits.append(moved(router_logits(seen.inputs, names, weights), CPU))
    targets.routes = seen.routes
    return targets


def tune_and_record(
    layer: LayerAtHand,
    settings: LayerSettings,
    calls: list[Call],
    targets: TuningTargets,
    made: QuantizedLayer,
) -> None:
    """Tune, and record before and after: the error of the layer's output, and what share of the
    original's choices of experts it makes."""
    for when in ("solved", "tuned"):
        if when == "tuned":
            tune(layer, settings, calls, targets, made)
        seen = Seen()
        outputs = [settings.scratch.keep(y) for y in layer.run(calls, seen.routed)]
        made.record.tuning[when] = output_error(layer.name, outputs, targets.outputs)
        for name, module in layer.experts.items():
            before, after = targets.routes.get(name, []), seen.routes.get(name, [])
            share = routes_kept(before, after, module.num_experts)
            made.record.experts[name].routing_kept[when] = round(share, 6)


def tune(
    layer: LayerAtHand,
    settings: LayerSettings,
    calls: list[Call],
    targets: TuningTargets,
    made: QuantizedLayer,
) -> None:
    """Tune a layer whose weights are solved, for `settings.config.tune` steps of one batch each.

    calls: the layer's inputs in the quantized model, one for each batch. Replaces the weights in
    `made` and in the layer; CalibrationError if it diverges.
    """
    device, steps = layer.device, settings.config.tune
    matrices = {
        target: _matrices(stack, made.originals[target], device)
        for target, stack in made.weights.items()
    }
    unquantized = {n: p.detach().clone().requires_grad_() for n, p in movable(layer).items()}
    optimizer, schedule = _optimizer(settings.config, matrices, [*unquantized.values()])
    order = _order(len(calls), steps, settings.config.calibration.seed)
    seen, names, fixed = Seen(), routers(layer), router_parameters(layer)
    with (
        torch.enable_grad(),
        latent_experts(layer.experts, matrices),
        collecting_experts(layer.experts, seen.given),
        running(layer),
    ):
        for i in order:
            stored = {n: as_stored(p, settings.stored_dtype(n)) for n, p in unquantized.items()}
            given = linear_weights(layer, matrices) | stored
            output = run_with(layer, given, calls[i].moved(device))
            logits = router_logits(seen.inputs, names, fixed | given)
            loss = relative_error(hidden(output), hidden(targets.outputs[i]).to(device))
            loss = loss + LOGITS * logits_error(logits, targets.logits[i])
            if not loss.isfinite():
                raise CalibrationError(f"{layer.name}: tuning gave NaN or Inf; use --tune 0")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    _put_back(layer, settings, matrices, unquantized, made)


def _matrices(stack: Stack, original: Tensor, device: torch.device) -> list[AnyMatrix]:
    if isinstance(stack, Trellis):
        return [CodedMatrix(stack, e, device) for e in range(len(stack.scale))]
    return [Matrix(stack, original, e, device) for e in range(len(stack.q))]


def _optimizer(
    config: QuantConfig, matrices: dict[str, list[AnyMatrix]], unquantized: list[Tensor]
) -> tuple[torch.optim.Adam, torch.optim.lr_scheduler.LambdaLR]:
    every = [m for group in matrices.values() for m in group]
    groups = [
        {"params": [m.latent for m in every if m.latent is not None], "lr": INTEGERS},
        {"params": [ratio for m in every for ratio in m.ratios], "lr": SCALES},
        {"params": unquantized, "lr": UNQUANTIZED * 2.0 ** (2 - config.experts.bits)},
    ]
    optimizer = torch.optim.Adam(groups, betas=BETAS)
    falling = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / config.tune)
    return optimizer, falling


def _order(calls: int, steps: int, seed: int) -> list[int]:
    """Which batch each step takes: all of them in an order of their own, again and again."""
    generator = torch.Generator().manual_seed(seed)
    rounds = -(-steps // calls)
    drawn = torch.cat([torch.randperm(calls, generator=generator) for _ in range(rounds)])
    order: list[int] = drawn[:steps].tolist()
    return order


def _put_back(
    layer: LayerAtHand,
    settings: LayerSettings,
    matrices: dict[str, list[AnyMatrix]],
    unquantized: dict[str, Tensor],
    made: QuantizedLayer,
) -> None:
    for target, group in matrices.items():
        old = made.weights[target]
        new: Stack
        if isinstance(old, Trellis):
            new = tuned_codes(old, [m for m in group if isinstance(m, CodedMatrix)])
        else:
            new = tuned_integers(old, [m for m in group if isinstance(m, Matrix)])
        made.weights[target] = new
        hold(layer, target, new)
    for name, value in unquantized.items():
        parameter = layer.parameter(name)
        parameter.data.copy_(as_stored(value, settings.stored_dtype(name)).detach())
        made.changed.add(name)
