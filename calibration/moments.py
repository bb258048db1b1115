"""What matrices get before and after those that feed them are quantized: moments of both."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from qmoe.calibration.coverage import average_weight, borrowed_weight
from qmoe.calibration.routed_tokens import RoutedTokens
from qmoe.calibration.stats import add_products
from qmoe.model import experts
from qmoe.model.hooks import hooked
from qmoe.system.spill import Scratch


def second_moments(
    routed: RoutedTokens, start: int, quantized: Float[Tensor, "E N H"], min_tokens: int
) -> tuple[Float[Tensor, "E I I"], Float[Tensor, "E I I"]]:
    """Of experts from `start` on, whose module holds the original weights: sum(w x y') and
    sum(w y y') with x what their second matrix gets and y what it gets behind a first stack
    `quantized`. Tokens that rare experts borrow are among them."""
    module, I = routed.module, routed.intermediate  # noqa: E741
    first, _ = experts.expert_weights(module)
    cross, hessian = torch.zeros(2, len(quantized), I, I)
    biases = experts.bias_stack(module, first)
    sample, average = routed.sample(), average_weight(routed)
    for i, matrix in enumerate(quantized):
        e = start + i
        borrowed = []
        if routed.tokens[e] < min_tokens:
            weight = borrowed_weight(routed.tokens[e], min_tokens, average, sample)
            borrowed.append((sample, weight))
        own = ((x, weight) for x, _, weight in routed.inputs(e))
        for x, weight in chain(own, borrowed):
            there = x.to(matrix.device)
            mid = experts.activation(module, experts.product(module, first, e, there))
            y = there @ matrix.T
            y = experts.stack_activation(module, y if biases is None else y + biases[e])
            root = weight.sqrt()[:, None].to(matrix.device)
            weighted = y.float() * root
            add_products(cross[i], mid.float() * root, weighted)
            add_products(hessian[i], weighted, weighted)
    return cross, hessian


@dataclass
class Inputs:
    """What linears got, one tensor [.., K] for every run of their layer. tensors: by the first of
    the linears that got it. owners: that linear for every linear, "" for those that got what the
    first linear of the layer got, which is not kept, or that were called more than once in a run.
    """

    tensors: dict[str, list[Tensor]] = field(default_factory=dict)
    owners: dict[str, str] = field(default_factory=dict)


@contextmanager
def keeping_inputs(linears: dict[str, nn.Module], scratch: Scratch) -> Iterator[Inputs]:
    """The inputs of these linears. In bfloat16: an error of rounding has no part in any moment."""
    inputs = Inputs()
    run: list[tuple[Tensor, str]] = []  # tensors of this run of the layer, and who got them first
    called: set[str] = set()
    odd: set[str] = set()

    def hook(name: str) -> Any:
        def keep(module: nn.Module, args: tuple[Any, ...]) -> None:
            if name == next(iter(inputs.owners), name):  # the layer runs anew
                run.clear()
                called.clear()
            owner = next((o for x, o in run if x is args[0]), name if run else "")
            if name in called or inputs.owners.setdefault(name, owner) != owner:
                odd.update((name, owner))
            if owner == name:
                inputs.tensors.setdefault(name, []).append(scratch.keep(args[0].bfloat16()))
            called.add(name)
            run.append((args[0], owner))

        return keep

    with hooked((module, hook(name)) for name, module in linears.items()):
        yield inputs
    run.clear()
    for name, owner in inputs.owners.items():
        if owner in odd:
            inputs.owners[name] = ""
            inputs.tensors.pop(owner, None)
