"""The routed experts of a layer, however their family names, lays out and calls them.

Everything else sees stacks [E, N, K]: the first (gate and up, or up) and the second (down), gate
rows before up rows. transformers gives decorated classes one interface and leaves their layout on
the instance (`is_transposed`, `is_concatenated`, `has_bias`, `has_gate`); those attributes are
read, shapes are never guessed at. adapters.py gives them to classes that lack them.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn


def is_experts(module: nn.Module) -> bool:
    """Whether a module follows transformers' experts interface, by itself or by an adapter."""
    return hasattr(module, "is_concatenated") and hasattr(module, "_apply_gate")


def expert_weights(experts: nn.Module) -> tuple[str, str]:
    """Names of the first (gate and up, or up) and second weight stack of an experts module."""
    return ("gate_up_proj" if experts.has_gate else "up_proj"), "down_proj"


def matrices_of(experts: nn.Module, name: str) -> list[str]:
    """The matrices that a stack's rows are made of, by their usual names."""
    return ["gate_proj", "up_proj"] if name == "gate_up_proj" else [name]


def matrix(experts: Any, name: str, e: int) -> Float[Tensor, "N K"]:
    """One expert's matrix, a view, with its rows in the family's order."""
    weight: Tensor = getattr(experts, name)[e]
    return weight.T if experts.is_transposed else weight


def bias(experts: Any, name: str) -> Float[Tensor, "E N"] | None:
    """The biases of a stack in the family's order."""
    return getattr(experts, f"{name}_bias") if experts.has_bias else None


def rows(experts: Any, name: str) -> Float[Tensor, "E N K"]:
    """A weight stack as a view, with rows in the family's order."""
    weight: Tensor = getattr(experts, name)[: experts.num_experts]
    return weight.mT if experts.is_transposed else weight


def up_rows(experts: Any, first: Tensor) -> Tensor:
    """Of a first stack (or its biases) in the family's order: a view of what comes from up."""
    return first[:, first.shape[1] // 2 :] if experts.is_concatenated else first[:, 1::2]


def stack(
    experts: Any, name: str, start: int = 0, end: int | None = None
) -> Float[Tensor, "E N K"]:
    """A weight stack, or experts start to end of it; a view unless the family interleaves gate and
    up rows."""
    weight = rows(experts, name)[start:end]
    return _concatenated(weight) if _interleaved(experts, name) else weight


def bias_stack(experts: Any, name: str) -> Float[Tensor, "E N"] | None:
    """The biases of a stack, gate before up."""
    values = bias(experts, name)
    if values is None or not _interleaved(experts, name):
        return values
    return _concatenated(values)


def put(experts: Any, name: str, weight: Float[Tensor, "E N K"], start: int = 0) -> None:
    """Overwrite a weight stack from expert `start` on, from the form that `stack` gives."""
    rows(experts, name)[start : start + len(weight)].data.copy_(family_rows(experts, name, weight))


def as_stored(experts: Any, name: str, weight: Float[Tensor, "N K"]) -> Tensor:
    """One matrix in the form that `stack` gives, as the family's own code wants to find it."""
    mine = family_rows(experts, name, weight[None])[0]
    return mine.T if experts.is_transposed else mine


def product(experts: Any, name: str, e: int, x: Float[Tensor, "M K"]) -> Float[Tensor, "M N"]:
    """x through one expert's matrix and bias, features in the family's order."""
    y = x @ matrix(experts, name, e).T.to(x.dtype)
    values = bias(experts, name)
    return y if values is None else y + values[e]


def activation(experts: Any, first: Float[Tensor, "M N"]) -> Float[Tensor, "M I"]:
    """What the family does between its matrices, to a product in its own order."""
    mid: Tensor = experts._apply_gate(first) if experts.has_gate else experts.act_fn(first)
    return mid


def stack_activation(experts: Any, first: Float[Tensor, "M N"]) -> Float[Tensor, "M I"]:
    """The same for a product with the form that `stack` gives."""
    if _interleaved(experts, expert_weights(experts)[0]):
        first = torch.stack(first.chunk(2, dim=-1), dim=-1).flatten(-2)
    return activation(experts, first)


def after(experts: Any, y: Float[Tensor, "M H"]) -> Float[Tensor, "M H"]:
    """What the family does to each expert's output before its gate."""
    # transformers has it since 5.20; scripts/gpu_check.py also runs on older ones.
    return experts.post_expert_norm(y) if getattr(experts, "has_post_expert_norm", False) else y


def _interleaved(experts: Any, name: str) -> bool:
    return not experts.is_concatenated and name == "gate_up_proj"


def family_rows(experts: Any, name: str, weight: Tensor) -> Tensor:
    """Rows [E, N, ..] in the family's order, from the one that `stack` and `bias_stack` give."""
    if _interleaved(experts, name):
        return torch.stack(weight.chunk(2, dim=1), dim=2).flatten(1, 2)
    return weight


def stack_order(experts: Any, name: str, y: Float[Tensor, "M N"]) -> Float[Tensor, "M N"]:
    """A product with a matrix in the family's order, with its features in the order that `stack`
    has rows in."""
    return _concatenated(y) if _interleaved(experts, name) else y


def _concatenated(both: Tensor) -> Tensor:
    """[E, N, ..]: even rows, then odd rows."""
    return torch.cat([both[:, 0::2], both[:, 1::2]], dim=1)


def packed_parameters(modules: dict[str, nn.Module]) -> set[str]:
    """The parameters of these modules, linears and experts by name, that are stored packed."""
    found = set()
    for name, module in modules.items():
        weights = expert_weights(module) if is_experts(module) else ("weight",)
        found |= {f"{name}.{weight}" for weight in weights}
    return found
