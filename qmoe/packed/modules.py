"""Packed weights inside a transformers model: linears are replaced, experts modules are kept.

An experts module keeps its class (its gate, its attributes); its weight stacks become stored
tensors on the meta device (`declare_*`), are filled by the loader, and turned into the runtime's
form (`finish`). From then on transformers' experts interface sends its forward to
`experts_forward` below, so every decorated family runs packed without code of its own.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from qmoe.config import Scheme
from qmoe.errors import CheckpointError, ConfigError
from qmoe.format.compressed_tensors import SUFFIXES
from qmoe.format.grid import FAR, far_scales, stored_scale
from qmoe.format.hadamard import rotate
from qmoe.format.packing import packed_words, unpack_rows, unpack_zeros
from qmoe.format.quantized import Quantized
from qmoe.kernels import uses_arena
from qmoe.kernels.activation import Activation, recognize
from qmoe.kernels.cpu.stack import CpuStack, uses_cpu_kernels
from qmoe.kernels.moe import moe_forward
from qmoe.kernels.stack import PackedStack
from qmoe.model import experts

NAME = "qmoe_packed"
UNPACKED = 8  # experts unpacked at once


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
    if hasattr(self, "qmoe_arena"):
        return self.qmoe_arena.experts(x, ids, routing_weights, between, biases)  # type: ignore[no-any-return]
    return moe_forward(x, ids, routing_weights, self.qmoe_first, self.qmoe_second, between, biases)


class PackedLinear(nn.Module):
    """A linear whose weight is a packed stack with E = 1. parts: matrices that its rows are stored
    as (a fused gate and up)."""

    def __init__(self, linear: nn.Linear, scheme: Scheme, parts: int = 1):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias, self.rotation = linear.bias, scheme.rotation
        _declare(
            self,
            "weight",
            (linear.out_features, linear.in_features),
            scheme,
            parts,
            linear.weight.dtype,
        )

    def forward(self, x: Float[Tensor, "*batch K"]) -> Float[Tensor, "*batch N"]:
        rows = rotate(x, self.rotation).reshape(-1, self.in_features)
        y: Tensor = self.stack.matmul(rows, 0).view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias

    @property
    def weight(self) -> Float[Tensor, "N K"]:
        """The weight expanded, for code that multiplies with it by hand (Jamba's dt_proj)."""
        return rotate(self.stack.expand(0), self.rotation)

    def finish(self, where: str, device: torch.device) -> None:
        """Turn the loaded tensors into the runtime's form on `device`; CheckpointError if they
        disagree."""
        (quantized,) = take_to_run(self, where).values()
        if uses_arena(device):
            self.stack: Any = _arena_stack([quantized], device, None)
        elif uses_cpu_kernels(device):
            self.stack = CpuStack([quantized], quantized.scale.dtype)
        else:
            self.stack = PackedStack(quantized, quantized.scale.dtype)


def declare_experts(module: Any, scheme: Scheme) -> None:
    """Replace the weight stacks of an experts module by empty stored tensors on the meta device."""
    for name in experts.expert_weights(module):
        weight = experts.stack(module, name)
        delattr(module, name)
        parts = len(experts.matrices_of(module, name))
        _declare(module, name, tuple(weight.shape), scheme, parts, weight.dtype)


def finish_experts(
    module: Any, where: str, device: torch.device, home: torch.device | None = None
) -> None:
    """Turn the loaded tensors into the runtime's form for `device`, route the forward to it. home:
    the memory their bytes stay in, if it is another (qmoe/packed/offload.py)."""
    first, second = experts.expert_weights(module)
    stored = take_to_run(module, where)
    module.qmoe_rotations = (stored[first].scheme.rotation, stored[second].scheme.rotation)
    for name, ours in ((first, "qmoe_first_bias"), (second, "qmoe_second_bias")):
        values = experts.bias_stack(module, name)
        if values is not None:
            delattr(module, f"{name}_bias")
            setattr(module, ours, nn.Parameter(values.contiguous(), requires_grad=False))
    if uses_arena(device):
        module.qmoe_arena = _arena_stack([stored[first], stored[second]], device, home, module)
    elif uses_cpu_kernels(device):
        stacks = [stored[first], stored[second]]
        module.qmoe_arena = CpuStack(stacks, stacks[0].scale.dtype, _fused(module, stacks))
    else:
        module.qmoe_first = PackedStack(stored[first], stored[first].scale.dtype)
        module.qmoe_second = PackedStack(stored[second], stored[second].scale.dtype)
    ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)
    module.config._experts_implementation = NAME


def _arena_stack(
    stacks: list[Quantized], device: torch.device, home: torch.device | None, module: Any = None
) -> nn.Module:
    """The form of the Triton kernels, which only machines that have Triton can import."""
    from qmoe.kernels.arena_stack import ArenaStack

    dtype = stacks[0].scale.dtype
    if module is None or not module.has_gate or any(module.qmoe_rotations):
        return ArenaStack(stacks, dtype, device, home=home)
    return ArenaStack(stacks, dtype, device, _fused(module, stacks), paired=True, home=home)


def _fused(module: Any, stacks: list[Quantized]) -> Activation | None:
    """The activation that kernels can compute between the two products; None if there is none."""
    # One that a kernel computes cannot be followed by a rotation.
    if not module.has_gate or any(module.qmoe_rotations):
        return None
    width = stacks[0].q.shape[1]
    return recognize(lambda product: experts.stack_activation(module, product), width)


def held(model: nn.Module, target: str) -> Tensor | None:
    """What a loaded model has of a parameter or buffer that is not packed, as its class lays it
    out; None if there is no such thing."""
    owner, _, name = target.rpartition(".")
    module: Any = model.get_submodule(owner)
    if isinstance(found := getattr(module, name, None), Tensor):
        return found
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
    for name, module in model.named_modules():
        if hasattr(module, "nbytes"):
            yield name, module


def _declare(
    module: Any, name: str, shape: tuple[int, ...], scheme: Scheme, parts: int, dtype: torch.dtype
) -> None:
    """Stored tensors of a weight [*, N, K] made of `parts` matrices, each packed on its own."""
    *stack, n, k = shape
    groups = scheme.groups(k)
    stored = {
        "_packed": torch.empty(
            *stack, n, packed_words(k, scheme.bits), dtype=torch.int32, device="meta"
        ),
        "_scale": torch.empty(*stack, n, groups, dtype=dtype, device="meta"),
        "_shape": torch.empty(*stack, 2 * parts, dtype=torch.int64, device="meta"),
    }
    if not scheme.symmetric:
        words = parts * packed_words(n // parts, scheme.bits)
        stored["_zero_point"] = torch.empty(*stack, words, groups, dtype=torch.int32, device="meta")
    for suffix, tensor in stored.items():
        module.register_parameter(name + suffix, nn.Parameter(tensor, requires_grad=False))
    if not hasattr(module, "_qmoe_stored"):
        module._qmoe_stored = {}
    module._qmoe_stored[name] = (shape, scheme, parts, dtype)


def stored_stacks(model: nn.Module) -> Iterator[tuple[str, int | None, int]]:
    """Every weight with stored tensors: its parameter, experts (None for a linear), and of how many
    matrices its rows (per expert) are made."""
    for name, module in model.named_modules():
        for weight, (shape, _, parts, _) in getattr(module, "_qmoe_stored", {}).items():
            yield f"{name}.{weight}", shape[0] if len(shape) == 3 else None, parts


def take_stored(module: nn.Module, where: str) -> dict[str, Quantized]:
    """Remove the stored tensors of a module's weights and read them, by weight name, as stacks
    [E, N, K]. Raises CheckpointError if they contradict the model or each other."""
    return {
        name: _take(module, name, f"{where}.{name}") for name in getattr(module, "_qmoe_stored", {})
    }


def take_to_run(module: Any, where: str) -> dict[str, Quantized]:
    """The same with scales in the dtype that the model runs in. ConfigError if it has no number
    near one of them; scales of nothing but zeros may become anything."""
    out = {}
    for name, stored in take_stored(module, where).items():
        dtype, scale = module._qmoe_stored[name][3], stored.scale.float()
        made = stored_scale(scale, dtype)
        far = far_scales(scale, made, FAR)
        if far.any():
            zero = 0 if stored.zero is None else stored.zero[..., None]
            used = stored.q.unflatten(-1, (scale.shape[-1], -1)) != zero
            far &= used.any(-1)
        if far.any():
            raise ConfigError(
                f"dtype: {where}.{name} has {int(far.sum())} scales that {dtype} cannot hold, such "
                f"as {float(scale[far].min()):.1e}; load the model in bfloat16 or float32"
            )
        out[name] = replace(stored, scale=made.to(dtype))
    return out


def _take(module: Any, name: str, where: str) -> Quantized:
    shape, scheme, parts, _ = module._qmoe_stored[name]
    e, n, k = (1,) * (3 - len(shape)) + shape
    stored: dict[str, Any] = {s: getattr(module, name + s, None) for s in SUFFIXES}
    for suffix, tensor in stored.items():
        if tensor is not None:
            delattr(module, name + suffix)
    wanted = torch.tensor([n // parts, k]).repeat(parts)
    found = stored["_shape"].view(e, -1)
    if not (found == wanted).all():
        raise CheckpointError(
            f"{where}: weight_shape says {found.tolist()}, the model needs {wanted.tolist()}"
        )
    zero = stored["_zero_point"]
    if zero is not None:
        halves = zero.data.view(e, -1, zero.shape[-1]).chunk(parts, dim=1)
        zero = torch.cat([unpack_zeros(z, scheme.bits, n // parts) for z in halves], dim=1)
    # A copy: what safetensors gives may be a view that keeps the whole file mapped.
    scale = stored["_scale"].data.view(e, n, -1).clone()
    if not (scale.isfinite() & (scale > 0)).all():
        raise CheckpointError(f"{where}: weight_scale has values that are not positive numbers")
    # A few experts at a time: unpacking takes several times what it gives.
    words = stored["_packed"].data.view(e, n, -1).split(UNPACKED)
    q = torch.cat([unpack_rows(part, scheme.bits, k) for part in words])
    return Quantized(q, scale, zero, scheme)
