"""Where the quantizable parts of a model are, found without code per model."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from qmoe.errors import UnsupportedModelError
from qmoe.model.adapters import each_expert, linears_of, unfused_experts
from qmoe.model.experts import is_experts
from qmoe.model.precision import ever_in_float32

ROUTER = "router"  # why a linear beside the experts stays as it is


@dataclass(frozen=True)
class Layer:
    """One decoder layer. Names are relative to the model.

    experts: fused experts modules. unfused: lists of experts that are modules of their own, and the
    linears of each. dense: linears to quantize with the dense scheme, in module order. in_block:
    those of `dense` inside the block that holds the experts (shared experts). unquantized: modules
    that stay as they are, with the reason. routers: those that decide where tokens go.
    """

    name: str
    experts: list[str]
    unfused: dict[str, list[list[str]]]
    dense: list[str]
    in_block: list[str]
    unquantized: dict[str, str]
    routers: list[str] = field(default_factory=list)

    def unfused_linears(self) -> list[str]:
        return [n for experts in self.unfused.values() for linears in experts for n in linears]


@dataclass(frozen=True)
class Structure:
    layers: list[Layer]
    lm_head: str | None


@dataclass(frozen=True)
class Prediction:
    """The layer that predicts tokens beyond the next, by names of modules (prediction/names.py).

    layer: the decoder layer. like: the model's own layer of which it is a copy, and whose arguments
    it takes. join, embedding_norm, hidden_norm, norm: what is around it."""

    layer: str
    like: str
    join: str
    embedding_norm: str
    hidden_norm: str
    norm: str

    @property
    def before(self) -> tuple[str, str, str]:
        """What makes the layer's input."""
        return self.embedding_norm, self.hidden_norm, self.join


def find(model: nn.Module) -> Structure:
    """The decoder layers of a model and what is in them.

    Raises UnsupportedModelError for a dense model and for experts in a form that is not known.
    """
    modules = dict(model.named_modules())
    experts = [
        n for n, m in modules.items() if _holds_experts(n, m) or hasattr(m, "qmoe_unquantized")
    ]
    if not experts:
        raise UnsupportedModelError(
            f"{type(model).__name__}: found no routed experts; it is a dense model, or an MoE "
            "whose experts neither use transformers' interface nor are lists of linears"
        )
    tied = getattr(model, "all_tied_weights_keys", {})
    for name in experts:
        if any(key.startswith(f"{name}.") for key in tied):
            raise UnsupportedModelError(
                f"{name} ({type(modules[name]).__name__}): its weights are tied to another part of "
                "the model; such models are not supported"
            )
    lists = {_outermost_list(name, modules) for name in experts}
    fixed = {name.rpartition(".")[0] for name in ever_in_float32(model)}
    layers = []
    for holder in modules:  # module order, so encoder before decoder
        if holder in lists:
            names = [f"{holder}.{i}" for i in range(len(modules[holder]))]
            layers += [_layer(name, modules, fixed) for name in names]
    lm_head = next(
        (n for n, m in modules.items() if n == "lm_head" and isinstance(m, nn.Linear)), None
    )
    return Structure(layers, lm_head)


def _holds_experts(name: str, module: nn.Module) -> bool:
    return is_experts(module) or (name.endswith("experts") and unfused_experts(module))


def _outermost_list(name: str, modules: dict[str, nn.Module]) -> str:
    parts = name.split(".")
    for i in range(1, len(parts)):
        if isinstance(modules[".".join(parts[:i])], nn.ModuleList):
            return ".".join(parts[:i])
    raise UnsupportedModelError(f"{name}: expected experts inside a list of decoder layers")


def _layer(name: str, modules: dict[str, nn.Module], fixed: set[str]) -> Layer:
    """fixed: modules that the model's class keeps in float32, in some dtype at least."""
    inside = {n: m for n, m in modules.items() if n.startswith(name + ".")}
    holders = {n: m for n, m in inside.items() if _holds_experts(n, m)}
    experts = [n for n, m in holders.items() if is_experts(m)]
    unfused = {n: list(_each_expert(n, m)) for n, m in holders.items() if n not in experts}
    taken = {n for experts in unfused.values() for linears in experts for n in linears}
    blocks = {n.rpartition(".")[0]: m for n, m in holders.items()}
    # What an adapter says of experts that are no matrices, and of their router.
    named = {n: getattr(m, "qmoe_unquantized", {}).items() for n, m in inside.items()}
    unquantized = {f"{n}.{part}": reason for n, parts in named.items() for part, reason in parts}
    dense, in_block = [], []
    for linear, module in inside.items():
        if not isinstance(module, nn.Linear) or linear in taken or linear in unquantized:
            continue
        block = next((b for b in blocks if linear.startswith(b + ".")), None)
        if block is not None and module.out_features in _choices(blocks[block]):
            unquantized[linear] = ROUTER
            continue
        if linear in fixed:
            unquantized[linear] = "its class keeps it in float32"
            continue
        if (reason := getattr(module, "qmoe_kept", None)) is not None:
            unquantized[linear] = reason
            continue
        if type(module).forward is not nn.Linear.forward:
            unquantized[linear] = f"{type(module).__name__} multiplies in its own way"
            continue
        dense.append(linear)
        if block is not None:
            in_block.append(linear)
    routers = [n for n, reason in unquantized.items() if reason == ROUTER]
    routers += [n for n, m in inside.items() if _is_router_module(n, m, holders, unquantized)]
    return Layer(name, experts, unfused, dense, in_block, unquantized, routers)


def _is_router_module(
    name: str, module: nn.Module, holders: dict[str, nn.Module], unquantized: dict[str, str]
) -> bool:
    """What a family has instead of a linear: a module with parameters of its own beside the
    experts."""
    if isinstance(module, nn.Linear) or name in holders or name in unquantized:
        return False
    beside = {holder.rpartition(".")[0] for holder in holders}
    own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    return bool(own) and name.rpartition(".")[0] in beside


def _each_expert(name: str, container: nn.Module) -> Iterator[list[str]]:
    for child in each_expert(container):
        inside = linears_of(container.get_submodule(child))
        yield [f"{name}.{child}.{linear}" for linear in inside]


def _choices(experts: Any) -> set[int]:
    """Output sizes of routers. A linear beside the experts with one output per expert (and per
    identity expert) is their router; one with a single output is the gate of a shared expert. Both
    decide where tokens go, for a handful of bytes."""
    count = experts.num_experts if is_experts(experts) else len(each_expert(experts))
    return {1, count, getattr(experts, "router_outputs", count)}
