"""Where the quantizable parts of a model are, found without code per model."""

from dataclasses import dataclass

from torch import nn

from qmoe.errors import UnsupportedModelError
from qmoe.experts import is_experts


@dataclass(frozen=True)
class Layer:
    """One decoder layer. Names are relative to the model.

    experts: fused experts modules. dense: linears to quantize with the dense scheme, in module
    order. in_block: those of `dense` inside the block that holds the experts (shared experts).
    kept: linears that stay as they are, with the reason.
    """

    name: str
    experts: list[str]
    dense: list[str]
    in_block: list[str]
    kept: dict[str, str]


@dataclass(frozen=True)
class Structure:
    layers: list[Layer]
    lm_head: str | None


def find(model: nn.Module) -> Structure:
    """The decoder layers of a model and what is in them.

    Raises UnsupportedModelError for a dense model and for experts that do not follow the interface.
    """
    modules = dict(model.named_modules())
    experts = [name for name, module in modules.items() if is_experts(module)]
    if not experts:
        raise UnsupportedModelError(
            f"{type(model).__name__}: found no fused experts; it is a dense model, or an MoE whose "
            "experts do not use transformers' experts interface"
        )
    lists = {_outermost_list(name, modules) for name in experts}
    layers = []
    for holder in modules:  # module order, so encoder before decoder
        if holder in lists:
            layers += [_layer(f"{holder}.{i}", modules) for i in range(len(modules[holder]))]
    head = next(
        (n for n, m in modules.items() if n == "lm_head" and isinstance(m, nn.Linear)), None
    )
    return Structure(layers, head)


def _outermost_list(name: str, modules: dict[str, nn.Module]) -> str:
    parts = name.split(".")
    for i in range(1, len(parts)):
        if isinstance(modules[".".join(parts[:i])], nn.ModuleList):
            return ".".join(parts[:i])
    raise UnsupportedModelError(f"{name}: expected experts inside a list of decoder layers")


def _layer(name: str, modules: dict[str, nn.Module]) -> Layer:
    inside = {n: m for n, m in modules.items() if n.startswith(name + ".")}
    experts = [n for n, m in inside.items() if is_experts(m)]
    blocks = {n.rpartition(".")[0]: inside[n] for n in experts}
    dense, in_block, kept = [], [], {}
    for linear, module in inside.items():
        if not isinstance(module, nn.Linear):
            continue
        block = next((b for b in blocks if linear.startswith(b + ".")), None)
        if block is not None and _routes(module, blocks[block]):
            kept[linear] = "router"
            continue
        dense.append(linear)
        if block is not None:
            in_block.append(linear)
    return Layer(name, experts, dense, in_block, kept)


def _routes(linear: nn.Linear, experts: nn.Module) -> bool:
    """A linear beside the experts with one output per expert is their router; one with a single
    output is the gate of a shared expert. Both decide where tokens go, for a handful of bytes."""
    return linear.out_features in (1, experts.num_experts)
