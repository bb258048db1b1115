"""Packed weights inside a transformers model: linears are replaced, experts modules are kept.

An experts module keeps its class (its gate, its attributes); its weight stacks become stored
tensors on the meta device (`declare_*`), are filled by the loader, and turned into the runtime's
form (`finish`). From then on transformers' experts interface sends its forward to
`experts_forward` below, so every decorated family runs packed without code of its own.
"""

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from qmoe.config import Scheme
from qmoe.errors import ConfigError
from qmoe.format.compressed_tensors import SUFFIXES
from qmoe.format.hadamard import rotate
from qmoe.format.quantized import Quantized
from qmoe.kernels import uses_arena
from qmoe.kernels.activation import Activation, recognize
from qmoe.kernels.cpu.cache import StaleCache
from qmoe.kernels.cpu.layout import Packed, arrange
from qmoe.kernels.cpu.stack import CpuStack, uses_cpu_kernels
from qmoe.kernels.cpu.trellis_stack import TrellisStack
from qmoe.kernels.moe import Experts, moe_forward
from qmoe.kernels.stack import MixedStack, PackedStack, packed_stack
from qmoe.model import experts
from qmoe.runtime.coded import take_coded
from qmoe.runtime.gradients import (
    ExpandedStack,
    Placeholder,
    expanding,
    is_adapted,
    needs_gradient,
    product,
    unchangeable,
)
from qmoe.runtime.run_on import RunOn
from qmoe.runtime.stored import Declared, declare, take_to_run

NAME = "qmoe_packed"


def experts_forward(
    self: Any,
    hidden_states: Float[Tensor, "T H"],
    top_k_index: Int[Tensor, "T A"],
    top_k_weights: Float[Tensor, "T A"],
) -> Float[Tensor, "T H"]:
    """The experts function registered with transformers for packed experts."""
    if not self.has_post_expert_norm:
        return _routed(self, hidden_states, top_k_index, top_k_weights)
    # The norm comes before the gate: every assignment is computed for itself.
    T, A = top_k_index.shape
    ones = torch.ones_like(top_k_weights).view(-1, 1)
    each = _routed(self, hidden_states.repeat_interleave(A, 0), top_k_index.view(-1, 1), ones)
    routing_weights = torch.where(top_k_index < self.num_experts, top_k_weights, 0)
    y = (experts.after(self, each).view(T, A, -1) * routing_weights[..., None]).sum(1)
    return y.to(hidden_states.dtype)


def _routed(self: Any, x: Tensor, ids: Tensor, routing_weights: Tensor) -> Tensor:
    first, second = self.qmoe_rotations
    x = rotate(x, first)

    def between(product: Tensor) -> Tensor:
        return rotate(experts.stack_activation(self, product), second)

    biases = (getattr(self, "qmoe_first_bias", None), getattr(self, "qmoe_second_bias", None))
    if needs_gradient(x, routing_weights) or is_adapted(self):
        stacks = packed_experts(self)
        up, down = (
            ExpandedStack(self, weight, expanding(stacks, i))
            for i, weight in enumerate(experts.expert_weights(self))
        )
        return moe_forward(x, ids, routing_weights, up, down, between, biases)
    if hasattr(self, "qmoe_arena"):
        arena: Experts = self.qmoe_arena
        return arena.experts(x, ids, routing_weights, between, biases)
    return moe_forward(x, ids, routing_weights, self.qmoe_first, self.qmoe_second, between, biases)


class PackedLinear(nn.Linear):
    """A linear whose weight is a packed stack with E = 1. parts: matrices that its rows are stored
    as (a fused gate and up). It is a Linear for what puts adapters on those."""

    def __init__(self, linear: nn.Linear, scheme: Scheme, parts: int = 1):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias, self.rotation = linear.bias, scheme.rotation
        shape = (linear.out_features, linear.in_features)
        declare(self, "weight", Declared(shape, scheme, parts, linear.weight.dtype))

    def forward(self, x: Float[Tensor, "*batch K"]) -> Float[Tensor, "*batch N"]:
        rows = (rotate(x, self.rotation) if self.rotation else x).reshape(-1, self.in_features)
        trained = torch.is_grad_enabled() and x.requires_grad
        y = product(rows, self.stack.expand, 0) if trained else self.stack.matmul(rows, 0)
        y = y.view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias

    @property
    def weight(self) -> Float[Tensor, "N K"]:  # type: ignore[override]
        """The weight expanded, for code that multiplies with it by hand (Jamba's dt_proj). Merging
        an adapter into it is a ConfigError."""
        return unchangeable(rotate(self.stack.expand(0), self.rotation))

    def finish(self, where: str, run: RunOn) -> None:
        """Turn the loaded tensors into the runtime's form; CheckpointError if they disagree."""
        if uses_cpu_kernels(run.device) and not uses_arena(run.device):
            self.stack: Any = _cpu_stack(self, where, run, None)
            return
        (stored,) = take_to_run(self, where).values()
        quantized = stored.unpack()
        if uses_arena(run.device):
            self.stack = _arena_stack([quantized], run, None, where)
        else:
            self.stack = PackedStack(quantized, quantized.scale.dtype)


class CodedLinear(PackedLinear):
    """A linear whose weight is in EXL3's codes; its places are declared (coded.py)."""

    def __init__(self, linear: nn.Linear):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias, self.rotation = linear.bias, 0
        self._parameters |= linear._parameters
        self._qmoe_coded = linear._qmoe_coded

    def finish(self, where: str, run: RunOn) -> None:
        declared: Any = self._qmoe_coded
        self.stack = _coded_stack(self, where, declared["weight"].dtype, run, None)


def declare_experts(module: Any, schemes: dict[str, tuple[Scheme, tuple[int, ...]]]) -> None:
    """Replace the weight stacks of an experts module by empty stored tensors on the meta device.
    schemes: by stack, with bits of each expert's matrix where they differ."""
    names = experts.expert_weights(module)
    module._qmoe_family_shapes = {name: tuple(getattr(module, name).shape) for name in names}
    for name in names:
        weight = experts.stack(module, name)
        delattr(module, name)
        parts = len(experts.matrices_of(module, name))
        scheme, widths = schemes[name]
        shape = tuple(weight.shape)
        declare(module, name, Declared(shape, scheme, parts, weight.dtype, widths))


def finish_experts(module: Any, where: str, run: RunOn) -> None:
    """Turn the loaded tensors into the runtime's form, route the forward to it."""
    first, second = experts.expert_weights(module)
    coded = getattr(module, "_qmoe_coded", None)
    declared = getattr(module, "_qmoe_stored", {})
    module.qmoe_rotations = tuple(
        declared[name].scheme.rotation if coded is None else 0 for name in (first, second)
    )
    for name, ours in ((first, "qmoe_first_bias"), (second, "qmoe_second_bias")):
        values = experts.bias_stack(module, name)
        if values is not None:
            delattr(module, f"{name}_bias")
            setattr(module, ours, nn.Parameter(values.contiguous(), requires_grad=False))
    if coded is not None:
        _finish_coded(module, where, run)
        return
    activation = _fused(module, declared[first].shape[1])
    if uses_cpu_kernels(run.device) and not uses_arena(run.device):
        module.qmoe_arena = _cpu_stack(module, where, run, activation)
    else:
        stored = take_to_run(module, where)
        stacks = [stored[first].unpack(), stored[second].unpack()]
        if uses_arena(run.device):
            module.qmoe_arena = _arena_stack(stacks, run, activation, where)
        else:
            module.qmoe_first, module.qmoe_second = (
                packed_stack(stack, stack.scale.dtype) for stack in stacks
            )
    ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)
    module.config._experts_implementation = NAME


def _finish_coded(module: Any, where: str, run: RunOn) -> None:
    declared = module._qmoe_coded[experts.expert_weights(module)[0]]
    activation = _fused(module, declared.shape[1])
    module.qmoe_arena = _coded_stack(module, where, declared.dtype, run, activation)
    ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)
    module.config._experts_implementation = NAME


def _coded_stack(
    module: Any, where: str, dtype: torch.dtype, run: RunOn, activation: Activation | None
) -> nn.Module:
    """The form in which a module's codes are computed: the Triton kernels' or the C kernels'."""
    stacks = take_coded(module, where)
    names = ["weight"] if isinstance(module, nn.Linear) else experts.expert_weights(module)
    ordered = [stacks[name] for name in names]
    if not uses_arena(run.device):
        return TrellisStack(ordered, dtype, activation, run.exact)
    from qmoe.kernels.coded.stack import CodedStack

    try:
        return CodedStack(ordered, dtype, run.device, activation, run.home)
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from error


def _arena_stack(
    stacks: list[Quantized], run: RunOn, activation: Activation | None, where: str
) -> nn.Module:
    """The form of the Triton kernels, which only machines that have Triton can import."""
    from qmoe.kernels.arena_stack import ArenaStack
    from qmoe.kernels.hosted.hybrid import HybridStack

    dtype, paired = stacks[0].scale.dtype, activation is not None
    if run.how is not None and where in run.hot:
        return HybridStack(stacks, dtype, run.device, activation, run.hot[where], run.how)
    return ArenaStack(stacks, dtype, run.device, activation, paired, home=run.home)


def _cpu_stack(module: Any, where: str, run: RunOn, activation: Activation | None) -> CpuStack:
    """The form of the C kernels, of the stored tensors or of buffers that are prepared."""
    declared = module._qmoe_stored
    if run.prepared is None:
        stacks: list[Any] = [stored.runs() for stored in take_to_run(module, where).values()]
    else:
        paired = [activation is not None and i == 0 for i in range(len(declared))]
        stacks = [
            _as_prepared(declared[name], run.prepared[f"{where}.{i}"], paired[i])
            for i, name in enumerate(declared)
        ]
        for name in declared:
            for suffix in SUFFIXES:
                module._parameters.pop(name + suffix, None)
    one: Declared = next(iter(declared.values()))
    stack = CpuStack(stacks, one.dtype, activation, run.exact or one.dtype == torch.float32)
    stack.scheme = one.scheme
    return stack


def _as_prepared(declared: Declared, buffer: Tensor, paired: bool) -> Packed:
    """A declared weight whose bytes are in the kernels' layout; StaleCache if they cannot be."""
    (*stack, n, k), scheme, dtype = declared.shape, declared.scheme, declared.dtype
    each = declared.widths or (scheme.bits,) * (stack[0] if stack else 1)
    kinds = [(bits, scheme.groups(k), not scheme.symmetric) for bits in each]
    shape, table, size = arrange(kinds, n, k, dtype, paired)
    if buffer.numel() != size:
        raise StaleCache(
            f"prepared weights: expected {size} bytes for [{n}, {k}], found {buffer.numel()}; "
            "remove the file in the cache directory"
        )
    return Packed(shape, buffer, table)


def _fused(module: Any, width: int) -> Activation | None:
    """The activation that kernels can compute between the two products; None if there is none.
    width: rows of the first."""
    # One that a kernel computes cannot be followed by a rotation.
    if not module.has_gate or any(module.qmoe_rotations):
        return None
    return recognize(lambda product: experts.stack_activation(module, product), width)


def held(model: nn.Module, target: str) -> Tensor | None:
    """What a loaded model has of a parameter or buffer that is not packed, as its class lays it
    out; None if there is no such thing."""
    owner, _, name = target.rpartition(".")
    module: Any = model.get_submodule(owner)
    found = getattr(module, name, None)
    if isinstance(found, Tensor):
        return None if type(found) is Placeholder else found
    if not name.endswith("_bias") or not hasattr(module, "qmoe_rotations"):
        return None
    weight = name.removesuffix("_bias")
    ours = "qmoe_second_bias" if weight == "down_proj" else "qmoe_first_bias"
    return experts.family_rows(module, weight, getattr(module, ours))


def packed_experts(module: nn.Module) -> list[Any]:
    """The stacks of a finished experts module: an arena, or first and second; empty if it is not
    packed."""
    if hasattr(module, "qmoe_arena"):
        return [module.qmoe_arena]
    stacks = [getattr(module, name, None) for name in ("qmoe_first", "qmoe_second")]
    return stacks if None not in stacks else []


def packed_stacks(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Every packed stack in a model, of experts and of linears, by name; each tells `nbytes()`.
    Forms are told by that: PackedStack, ArenaStack, Nf4Stack."""
    inside: tuple[str, ...] = ()  # of mixed stacks, which are made of others
    for name, module in model.named_modules():
        if hasattr(module, "nbytes") and not name.startswith(inside):
            inside = (*inside, f"{name}.") if isinstance(module, MixedStack) else inside
            yield name, module
