"""Decoder layers of a model on a CPU as one call of C for a token that is decoded.

A layer is recognized by its parts (an attention layer as in attention_layers.py, two norms, a
router, experts) and by what it computes: at the first token that is decoded, what the call of C
gives for a probing token has to equal, bit for bit, what the layer's own code gives. Until then,
and for longer inputs, masks, gradients, adapters and hooks, that code runs.
"""

import inspect
from collections.abc import Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from qmoe.fused.attention_layers import (
    PROJECTIONS,
    is_left_alone,
    is_plain_norm,
    is_trained,
    may_be_fused,
    takes,
)
from qmoe.fused.growing_cache import GrowingLayer
from qmoe.kernels.cpu.decoder import MOST_SEQUENCES, Layer, LayerStruct, Norm, decode
from qmoe.kernels.cpu.library import StackStruct
from qmoe.kernels.cpu.ops import stack_struct
from qmoe.kernels.cpu.stack import CpuStack
from qmoe.model.experts import is_experts

NORMS = ("input_layernorm", "post_attention_layernorm")
TAKEN = {"self", "hidden_states", "attention_mask", "position_embeddings", "past_key_values"}
PAST = 3  # tokens that the probing token sees
Addresses = tuple[int | None, ...]


def fuse_decoder_layers(modules: Iterable[nn.Module]) -> int:
    """Replace the forward of every decoder layer that has the parts; returns their number. Names,
    parameters and classes (by isinstance) stay."""
    found = 0
    module: Any
    for module in modules:
        cls: Any = type(module)
        if _is_written_so(cls) and _has_the_parts(module):
            module.__class__ = _fused(cls)
            found += 1
    return found


class Known:
    """What is known of a layer: whether C computes the same, and its description for C, which is
    made anew when a tensor has moved. Copies start without either: they have other addresses."""

    alike: bool | None = None
    dtypes: tuple[torch.dtype, ...] = ()
    addresses: Addresses = ()
    struct: LayerStruct | None = None

    def __reduce__(self) -> tuple[type["Known"], tuple[()]]:
        return Known, ()


@cache
def _is_written_so(cls: type[Any]) -> bool:
    return set(inspect.signature(cls.forward).parameters) >= {*TAKEN, "kwargs"}


def _has_the_parts(module: Any) -> bool:
    attention, norms, mlp = _parts(module)
    if not hasattr(attention, "qmoe_attends_in_c") or None in norms or mlp is None:
        return False
    if set(module._modules) != {"self_attn", *NORMS, "mlp"} or len(mlp._modules) != 2:
        return False
    router, experts = _router_and_experts(mlp)
    if router is None or experts is None or list(mlp.parameters(recurse=False)):
        return False
    stack = getattr(experts, "qmoe_arena", None)
    return type(stack) is CpuStack and stack.activation is not None and _may_be_fused(module)


def _parts(module: Any) -> tuple[Any, tuple[Any, Any], Any]:
    parts = module._modules
    return parts.get("self_attn"), (parts.get(NORMS[0]), parts.get(NORMS[1])), parts.get("mlp")


def _router_and_experts(mlp: Any) -> tuple[Any, Any]:
    router = experts = None
    for part in mlp._modules.values():
        if "qmoe_routing" in part.__dict__:
            router = part
        elif is_experts(part):
            experts = part
    return router, experts


def _may_be_fused(module: Any) -> bool:
    """Whether the parts are still what they were, and nothing looks at what they compute."""
    attention, norms, mlp = _parts(module)
    router, experts = _router_and_experts(mlp)
    if router is None or experts is None or "weight" not in router._parameters:
        return False
    if is_trained(router):
        return False
    if "qmoe_arena" not in experts._modules or "parametrizations" in experts._modules:
        return False
    return (
        all(is_plain_norm(norm) for norm in norms)
        and all(is_left_alone(part) for part in (attention, mlp, router, experts))
        and may_be_fused(attention)
    )


@cache
def _fused(cls: type[Any]) -> type[Any]:
    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        layer = _cached(self, hidden_states, args, kwargs)
        if layer is None:
            return cls.forward(self, hidden_states, *args, **kwargs)
        known = self.__dict__.setdefault("qmoe_known", Known())
        dtypes = (hidden_states.dtype, *(t.dtype for t in _tensors(self) if t is not None))
        if known.dtypes != dtypes:
            known.alike, known.struct, known.dtypes = None, None, dtypes
        if known.alike is None:
            known.alike = _computes_alike(cls, self, hidden_states, kwargs)
        if not known.alike:
            return cls.forward(self, hidden_states, *args, **kwargs)
        return _decoded(self, hidden_states, kwargs["position_embeddings"], layer)

    return type(f"Fused{cls.__name__}", (cls,), {"forward": forward})


def _cached(self: Any, x: Tensor, args: Any, kwargs: dict[str, Any]) -> GrowingLayer | None:
    """The cache of this layer, if one token of each sequence is to be decoded behind it alone."""
    if args or x.dim() != 3 or x.shape[1] != 1 or not 0 < len(x) <= MOST_SEQUENCES:
        return None
    rotary = kwargs.get("position_embeddings")
    cache_of_model: Any = kwargs.get("past_key_values")
    if kwargs.get("attention_mask") is not None or self.training:
        return None
    if type(cache_of_model) is not DynamicCache:  # others may look at every token
        return None
    layers = cache_of_model.layers
    attention = self._modules["self_attn"]
    if attention.layer_idx >= len(layers):
        return None
    layer = layers[attention.layer_idx]
    if type(layer) is not GrowingLayer or not layer.is_initialized or not layer.keys.shape[-2]:
        return None
    if layer.keys.dtype != x.dtype or len(layer.keys) != len(x) or layer.keys.requires_grad:
        return None
    return layer if takes(attention, x, rotary) and _may_be_fused(self) else None


def _decoded(self: Any, x: Tensor, rotary: tuple[Tensor, Tensor], layer: GrowingLayer) -> Tensor:
    """x [B, 1, H] through the layer; its keys and values are added to the cache's."""
    known = self.qmoe_known
    addresses = _addresses(self)
    if known.struct is None or known.addresses != addresses:
        known.struct, known.addresses = _layer(self, x.dtype).struct(), addresses
    keys, values = layer.with_room_for(1)
    cos, sin = (part.reshape(-1, part.shape[-1]).contiguous() for part in rotary)
    rows = x.reshape(len(x), -1)
    y = decode(known.struct, rows, (cos, sin), keys, values, layer.keys.shape[-2])
    layer.take(1)
    return y.view(x.shape)


def _layer(self: Any, dtype: torch.dtype) -> Layer:
    attention, norms, mlp = _parts(self)
    router, experts = _router_and_experts(mlp)
    linears = [attention._modules[name] for name in PROJECTIONS]
    stack = experts.qmoe_arena
    return Layer(
        [(linear.stack.only(), linear.bias) for linear in linears],
        tuple(_norm(norm) for norm in (*norms, *_head_norms(attention))),
        attention.head_dim,
        attention.scaling,
        (router._parameters["weight"], router._parameters.get("bias"), router.qmoe_routing),
        [_with_bias(stack.matrix(i), bias) for i, bias in enumerate(_expert_biases(experts))],
        stack.activation,
        dtype,
        stack.exact,
    )


def _with_bias(matrix: tuple[Tensor, Tensor, list[int]], bias: Tensor | None) -> StackStruct:
    buffer, table, numbers = matrix
    return stack_struct(buffer, table, numbers, bias)


def _head_norms(attention: Any) -> tuple[Any, Any]:
    return attention._modules.get("q_norm"), attention._modules.get("k_norm")


def _norm(norm: Any) -> Norm | None:
    if norm is None:
        return None
    (weight,) = norm._parameters.values()
    return Norm(weight, norm.qmoe_norm)


def _expert_biases(experts: Any) -> tuple[Tensor | None, Tensor | None]:
    return getattr(experts, "qmoe_first_bias", None), getattr(experts, "qmoe_second_bias", None)


def _tensors(self: Any) -> list[Tensor | None]:
    """Every tensor that the description for C points at."""
    attention, norms, mlp = _parts(self)
    router, experts = _router_and_experts(mlp)
    linears = [attention._modules[name] for name in PROJECTIONS]
    found: list[Tensor | None] = [linear.bias for linear in linears]
    for norm in (*norms, *_head_norms(attention)):
        found += norm._parameters.values() if norm is not None else [None]
    found += [router._parameters["weight"], router._parameters.get("bias")]
    for stack in (*(linear.stack for linear in linears), experts.qmoe_arena):
        found += stack._buffers.values()
    return [*found, *_expert_biases(experts)]


def _addresses(self: Any) -> Addresses:
    return tuple(None if t is None else t.data_ptr() for t in _tensors(self))


@torch.no_grad()
def _computes_alike(cls: type[Any], self: Any, x: Tensor, kwargs: dict[str, Any]) -> bool:
    """Whether a random token behind a few others comes out the same, with the same cache."""
    if any(t is not None and not _is_usable(t, x.dtype) for t in _tensors(self)):
        return False
    attention = self._modules["self_attn"]
    exact = {attention._modules[name].stack.exact for name in PROJECTIONS}
    router, experts = _router_and_experts(self._modules["mlp"])
    if exact != {experts.qmoe_arena.exact} or router.qmoe_routing.choices > experts.num_experts:
        return False
    cos, sin = kwargs["position_embeddings"]
    rotary = (cos[:1], sin[:1])
    generator = torch.Generator().manual_seed(0)
    heads = attention._modules["k_proj"].out_features // attention.head_dim
    past = torch.randn(2, 1, heads, PAST, attention.head_dim, generator=generator).to(x.dtype)
    probe = torch.randn(1, 1, x.shape[2], generator=generator).to(x.dtype)
    caches = [_holding(past, attention.layer_idx) for _ in range(2)]
    rest = {**kwargs, "position_embeddings": rotary, "past_key_values": caches[0]}
    wanted = cls.forward(self, probe, **rest)
    found = _decoded(self, probe, rotary, caches[1].layers[-1])
    one, other = (cache.layers[-1] for cache in caches)
    return (
        isinstance(wanted, Tensor)
        and torch.equal(found, wanted)
        and torch.equal(one.keys, other.keys)
        and torch.equal(one.values, other.values)
    )


def _is_usable(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether C can read a tensor as it is: codes, tables, or floats in the dtype of the rows."""
    floats = (dtype, torch.float32) if tensor.dim() == 1 else (dtype,)
    right = not tensor.is_floating_point() or tensor.dtype in floats
    return right and tensor.is_contiguous() and tensor.device.type == "cpu"


def _holding(past: Tensor, layer_idx: int) -> DynamicCache:
    """A cache of which this layer has keys and values [2, B, G, S, D]."""
    layer, cache = GrowingLayer(), DynamicCache()
    layer.update(*past)
    cache.layers = [layer] * (layer_idx + 1)
    return cache
