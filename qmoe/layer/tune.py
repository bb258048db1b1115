"""Tuning a solved layer by gradient, so that its output is the original model's.

Solvers see one matrix at a time and its error under the inputs it gets. Here the whole layer is
run on what reaches it in the quantized model and held against what the original layer gives in the
original model, so it also makes up for the layers before it. What moves: integers (a latent value
that is rounded, straight-through gradient), scales, and what stays in 16 bits beside them, norms
and routers. The family of AutoRound (Cheng et al., 2023, arXiv 2309.05516) and OmniQuant (Shao et
al., 2023, arXiv 2308.13137), started from GPTQ's solution instead of from plain rounding.

The loss is each token's squared error over its squared size: norms divide every token by its size,
and a few huge ones (attention sinks) must not outweigh the rest. To it comes that of the router's
logits, or tuning would send tokens to other experts (routing.py).
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from qmoe.calibration.collect import collecting_experts
from qmoe.errors import CalibrationError
from qmoe.format.grid import limits, stored_scale
from qmoe.format.hadamard import rotate
from qmoe.format.quantized import Quantized
from qmoe.layer.job import Job, Result
from qmoe.layer.routing import (
    Parameters,
    logits_error,
    recording_inputs,
    relative_error,
    router_logits,
    router_parameters,
    routers,
)
from qmoe.layer.solve import hold
from qmoe.model import experts
from qmoe.model.layerwise import Call
from qmoe.system.devices import whereabouts

# Adam's rates at the first step; they fall to zero in equal steps. A rate is roughly how far a
# value moves in a step: integers in units of 1, scales relative to what they are. Norms and routers
# make up for rounding, whose error halves with every bit: moved further they only add noise.
INTEGERS, SCALES, KEPT = 0.01, 0.003, 0.0005  # of two bits, the last
LOGITS = 0.3  # of the routers' error in the loss
INSIDE = 0.45  # how far from its integer a latent value may start
BETAS = (0.9, 0.95)


class OnGrid(torch.autograd.Function):
    """Latent values [N, K] rounded to a grid; the gradient passes straight through inside it."""

    @staticmethod
    def forward(ctx: Any, latent: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
        qmin, qmax = limits(bits)
        ctx.save_for_backward(latent, scale, zero)
        ctx.range = qmin, qmax
        steps = (latent.round().clamp(qmin, qmax)).unflatten(1, (scale.shape[1], -1))
        weight: Tensor = ((steps - zero[..., None]) * scale[..., None]).flatten(1)
        return weight

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        latent, scale, zero = ctx.saved_tensors
        qmin, qmax = ctx.range
        slope = slopes[0].unflatten(1, (scale.shape[1], -1))
        steps = latent.round().clamp(qmin, qmax).unflatten(1, (scale.shape[1], -1))
        inside = (latent > qmin - 0.5) & (latent < qmax + 0.5)
        to_latent = (slope * scale[..., None]).flatten(1) * inside
        return to_latent, (slope * (steps - zero[..., None])).sum(-1), None, None


class Matrix:
    """One quantized matrix while it is tuned: its latent integers and the change of its scales.

    A latent value starts inside its integer's interval, on the side where the original weight is,
    so that those that were a close call change first."""

    def __init__(self, stack: Quantized, original: Tensor, e: int, device: torch.device):
        self.stack = stack
        self.scale = stack.scale[e].float().to(device)
        no = torch.zeros_like(self.scale)
        zero = no if stack.zero is None else stack.zero[e].float().to(device)
        self.zero = zero
        rotated = rotate(original[e].float().to(device), stack.scheme.rotation)
        groups = rotated.unflatten(1, (self.scale.shape[1], -1))
        aim = (groups / self.scale[..., None] + zero[..., None]).flatten(1)
        q = stack.q[e].float().to(device)
        self.latent: Tensor = (q + (aim - q).clamp(-INSIDE, INSIDE)).requires_grad_()
        self.ratio: Tensor = torch.ones_like(self.scale).requires_grad_()

    def scales(self) -> Tensor:
        """As they will be stored; the gradient passes straight through."""
        exact = self.scale * self.ratio
        stored: Tensor = stored_scale(exact.detach(), self.stack.scale.dtype)
        return exact + (stored - exact).detach()

    def weight(self) -> Tensor:
        scheme = self.stack.scheme
        made: Tensor = OnGrid.apply(self.latent, self.scales(), self.zero, scheme.bits)  # type: ignore[no-untyped-call]
        return rotate(made, scheme.rotation)

    def integers(self) -> Tensor:
        return self.latent.detach().round().clamp(*limits(self.stack.scheme.bits)).to(torch.int8)


class Lazy:
    """Stands for a weight stack in an experts module: gives matrix e, made when it is asked for."""

    def __init__(self, module: Any, name: str, matrices: list[Matrix]):
        self.module, self.name, self.matrices = module, name, matrices

    def __getitem__(self, e: int) -> Tensor:
        return experts.as_stored(self.module, self.name, self.matrices[e].weight())


@dataclass
class Aims:
    """What the original layer gives and chooses. outputs and logits (routing.py): one for each
    batch. routes: the chosen experts [T, A] of every call of an experts module."""

    outputs: list[Any] = field(default_factory=list)
    logits: list[Parameters] = field(default_factory=list)
    routes: dict[str, list[Tensor]] = field(default_factory=dict)


def tune(
    job: Job, forward: Callable[..., Any], calls: list[Call], aims: Aims, result: Result
) -> None:
    """Tune a layer whose weights are solved, for `job.config.tune` steps of one batch each.

    calls: the layer's inputs in the quantized model, one for each batch. Replaces the weights in
    `result` and in the layer; CalibrationError if it diverges.
    """
    layer: Any = job.model.get_submodule(job.layer.name)
    device = whereabouts(layer)
    matrices = {
        target: [Matrix(stack, result.originals[target], e, device) for e in range(len(stack.q))]
        for target, stack in result.weights.items()
        if target.startswith(f"{job.layer.name}.")
    }
    kept = {name: p.detach().clone().requires_grad_() for name, p in _kept(job).items()}
    every = [m for group in matrices.values() for m in group]
    groups = [
        {"params": [m.latent for m in every], "lr": INTEGERS},
        {"params": [m.ratio for m in every], "lr": SCALES},
        {"params": list(kept.values()), "lr": KEPT * 2.0 ** (2 - job.config.experts.bits)},
    ]
    optimizer = torch.optim.Adam(groups, betas=BETAS)
    steps = job.config.tune
    falling = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    order = _order(len(calls), steps, job.config.calibration.seed)
    watched = recording_inputs({name: job.model.get_submodule(name) for name in job.layer.experts})
    names, fixed = routers(job), router_parameters(job)
    with (
        torch.enable_grad(),
        _standing_in(job, matrices),
        _running(layer, forward),
        watched as inputs,
    ):
        for i in order:
            stored = {n: _as_stored(p, job.stored(n)) for n, p in kept.items()}
            given = _plain(job, matrices) | stored
            inside = {n.removeprefix(f"{job.layer.name}."): p for n, p in given.items()}
            output = functional_call(layer, inside, *calls[i].moved(device))
            logits = router_logits(inputs, names, fixed | given)
            loss = relative_error(hidden(output), hidden(aims.outputs[i]).to(device))
            loss = loss + LOGITS * logits_error(logits, aims.logits[i])
            if not loss.isfinite():
                raise CalibrationError(f"{job.layer.name}: tuning gave NaN or Inf; use --tune 0")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            falling.step()
    _put_back(job, matrices, kept, result)


def hidden(output: Any) -> Tensor:
    """The hidden states of a layer's output, which some families wrap in a tuple."""
    states: Tensor = output[0] if isinstance(output, tuple) else output
    return states


def _order(calls: int, steps: int, seed: int) -> list[int]:
    """Which batch each step takes: all of them in an order of their own, again and again."""
    generator = torch.Generator().manual_seed(seed)
    rounds = -(-steps // calls)
    drawn = torch.cat([torch.randperm(calls, generator=generator) for _ in range(rounds)])
    order: list[int] = drawn[:steps].tolist()
    return order


def _kept(job: Job) -> dict[str, Tensor]:
    """What stays in 16 bits and may move: norms and routers."""
    found = router_parameters(job)
    layer = job.model.get_submodule(job.layer.name)
    for name, module in layer.named_modules(prefix=job.layer.name):
        if "norm" in type(module).__name__.lower():
            own = module.named_parameters(recurse=False)
            found |= {f"{name}.{key}": p for key, p in own if p.dim() == 1}
    return found


def _as_stored(parameter: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounded as it will be stored; the gradient passes straight through."""
    stored = parameter.detach().to(dtype).to(parameter.dtype)
    return parameter + (stored - parameter).detach()


def _plain(job: Job, matrices: dict[str, list[Matrix]]) -> dict[str, Tensor]:
    """The weights of linears."""
    owners = {target: target.rpartition(".")[0] for target in matrices}
    return {
        target: matrices[target][0].weight()
        for target, owner in owners.items()
        if owner not in job.layer.experts
    }


@contextmanager
def _standing_in(job: Job, matrices: dict[str, list[Matrix]]) -> Iterator[None]:
    """Experts modules make their matrices one by one, and run through the collecting function."""
    modules = {name: job.model.get_submodule(name) for name in job.layer.experts}
    with ExitStack() as stack:
        stack.enter_context(collecting_experts(list(modules.values())))
        for name, module in modules.items():
            for weight in experts.expert_weights(module):
                lazy = Lazy(module, weight, matrices[f"{name}.{weight}"])
                stack.enter_context(_replaced(module, weight, lazy))
        yield


@contextmanager
def _replaced(module: nn.Module, name: str, value: Any) -> Iterator[None]:
    parameter = module._parameters.pop(name)
    module.__dict__[name] = value
    try:
        yield
    finally:
        del module.__dict__[name]
        module._parameters[name] = parameter


@contextmanager
def _running(layer: Any, forward: Callable[..., Any]) -> Iterator[None]:
    """Calling the layer runs it, though its batches are suspended there."""
    before = layer.forward
    layer.forward = forward
    try:
        yield
    finally:
        layer.forward = before


def _put_back(
    job: Job, matrices: dict[str, list[Matrix]], kept: dict[str, Tensor], result: Result
) -> None:
    for target, group in matrices.items():
        old = result.weights[target]
        scale = torch.stack([m.scales().detach().cpu() for m in group]).to(old.scale.dtype)
        q = torch.stack([m.integers().cpu() for m in group])
        new = Quantized(q, scale, old.zero, old.scheme)
        result.weights[target] = new
        hold(job, target, new)
    for name, value in kept.items():
        parameter = job.model.get_parameter(name)
        parameter.data.copy_(_as_stored(value, job.stored(name)).detach())
        result.changed.add(name)
