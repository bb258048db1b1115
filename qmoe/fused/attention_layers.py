"""Attention layers of a model on a CPU in a few calls of C, instead of thirty operations.

Most families write theirs alike: projections of queries, keys and values, perhaps norms of these,
rotary positions, attention, an output projection. A layer is recognized by its parts and by what
it computes: at its first call, what the calls of C give for probing tokens has to equal, bit for
bit, what its own code gives. Until then, and for gradients, adapters and hooks, that code runs.
"""

import inspect
from collections.abc import Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from qmoe.fused.attention import NAME, attention_forward
from qmoe.kernels.cpu.attention import WIDEST, rms_norm_now
from qmoe.kernels.cpu.layout import TYPES
from qmoe.kernels.cpu.ops import linears_now
from qmoe.kernels.cpu.rotary import HeadNorm, turn_now
from qmoe.kernels.cpu.stack import CpuStack
from qmoe.runtime.modules import PackedLinear

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
NORMS = ("q_norm", "k_norm")
TAKEN = ["self", "hidden_states", "position_embeddings", "attention_mask", "past_key_values"]
PROBES = 4  # tokens
Rotary = tuple[Tensor, Tensor]


def fuse_attention_layers(modules: Iterable[nn.Module]) -> int:
    """Replace the forward of every attention layer that has the parts; returns their number. Names,
    parameters and classes (by isinstance) stay."""
    found = 0
    module: Any
    for module in modules:
        cls: Any = type(module)
        if _is_written_so(cls) and has_the_parts(module):
            module.__class__ = _fused(cls)
            found += 1
    return found


@cache
def _is_written_so(cls: type[Any]) -> bool:
    """Whether the forward takes what most families' takes."""
    return [*inspect.signature(cls.forward).parameters] == [*TAKEN, "kwargs"]


def has_the_parts(module: Any) -> bool:
    """Whether an attention layer has the projections and heads that C takes."""
    width = getattr(module, "head_dim", None)
    if not isinstance(width, int) or not 0 < width <= WIDEST:
        return False
    if not isinstance(getattr(module, "scaling", None), float) or not hasattr(module, "layer_idx"):
        return False
    # With more parts than these, such as an indexer, it computes more.
    if not {*PROJECTIONS, *NORMS} >= module._modules.keys() or not may_be_fused(module):
        return False
    q, k, v, o = (module._modules[name] for name in PROJECTIONS)
    whole = all(linear.out_features % width == 0 for linear in (q, k, v))
    return whole and v.out_features == k.out_features and o.in_features == q.out_features


def may_be_fused(module: Any) -> bool:
    """Whether the parts are packed linears and recognized norms, as they were when loaded."""
    parts = module._modules
    for name in PROJECTIONS:
        linear = parts.get(name)
        if type(linear) is not PackedLinear or linear.rotation or not is_left_alone(linear):
            return False
        if is_trained(linear):
            return False
        if type(linear.stack) is not CpuStack:
            return False
    for name in NORMS:
        norm = parts.get(name)
        if norm is not None and not is_plain_norm(norm):
            return False
    return True


def is_plain_norm(norm: nn.Module) -> bool:
    """Whether a module is a recognized norm itself and no wrapper, and computes as it did."""
    return "qmoe_norm" in norm.__dict__ and is_left_alone(norm) and not is_trained(norm)


def is_trained(module: nn.Module) -> bool:
    """Whether a parameter of the module itself wants a gradient."""
    if not torch.is_grad_enabled():
        return False
    return any(p is not None and p.requires_grad for p in module._parameters.values())


def is_left_alone(module: nn.Module) -> bool:
    """Whether nothing looks at or replaces what this module computes."""
    hooks = module._forward_hooks or module._forward_pre_hooks
    return not hooks and "forward" not in module.__dict__


@cache
def _fused(cls: type[Any]) -> type[Any]:
    def forward(
        self: Any,
        hidden_states: Tensor,
        position_embeddings: Any = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Any:
        rest = (position_embeddings, attention_mask, past_key_values)
        if not takes(self, hidden_states, position_embeddings):
            return cls.forward(self, hidden_states, *rest, **kwargs)
        if self.__dict__.get("qmoe_computes_alike") is None:
            self.qmoe_computes_alike = _computes_alike(
                cls, self, hidden_states, position_embeddings
            )
        if not self.qmoe_computes_alike:
            return cls.forward(self, hidden_states, *rest, **kwargs)
        return _attended(self, hidden_states, position_embeddings, *rest[1:], **kwargs)

    return type(f"Fused{cls.__name__}", (cls,), {"forward": forward, "qmoe_attends_in_c": True})


def takes(self: Any, x: Tensor, rotary: Any) -> bool:
    """Whether an attention layer takes rows x [B, T, H] with these positions in C: cosines, sines
    [1 or B, T, R]. Llama 4 has complex numbers."""
    if not isinstance(rotary, tuple) or len(rotary) != 2:
        return False
    if torch.compiler.is_compiling() or self.training or x.requires_grad or x.dim() != 3:
        return False
    if x.device.type != "cpu" or x.dtype not in TYPES or not x.numel():
        return False
    cos, sin = rotary
    if cos.dtype != x.dtype or sin.dtype != x.dtype or cos.dim() != 3 or cos.shape != sin.shape:
        return False
    if cos.shape[0] not in (1, len(x)) or cos.shape[1] != x.shape[1]:
        return False
    if cos.shape[2] > self.head_dim or cos.shape[2] % 2:
        return False
    return getattr(
        getattr(self, "config", None), "_attn_implementation", None
    ) == NAME and may_be_fused(self)


@torch.no_grad()
def _computes_alike(cls: type[Any], self: Any, x: Tensor, rotary: Rotary) -> bool:
    """Whether a few random tokens at the first positions of a call come out the same."""
    cos, sin = (part[:1, :PROBES] for part in rotary)
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(1, cos.shape[1], x.shape[2], generator=generator).to(x.dtype)
    found = cls.forward(self, probe, (cos, sin), None, None)
    return torch.equal(found[0], _attended(self, probe, (cos, sin), None, None)[0])


def _attended(
    self: Any, x: Tensor, rotary: Rotary, mask: Tensor | None, cache: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    """x [B, T, H] through the layer, in the dtype of x."""
    B, T, _ = x.shape
    D, parts = self.head_dim, self._modules
    rows = x.reshape(B * T, -1)
    linears = [parts[name] for name in PROJECTIONS[:3]]
    q, k, v = linears_now(rows, [(part.stack.only(), part.stack.exact) for part in linears])
    for part, y in zip(linears, (q, k, v), strict=True):
        if part.bias is not None:
            y += part.bias
    q, q_norm = _normed(q, parts.get("q_norm"), D)
    k, k_norm = _normed(k, parts.get("k_norm"), D)
    q, k = q.view(B * T, -1, D), k.view(B * T, -1, D)
    cos, sin = (part.reshape(-1, part.shape[-1]) for part in rotary)
    turn_now([(q, q_norm), (k, k_norm)], cos, sin)
    q, k, v = (heads.view(B, T, -1, D).transpose(1, 2) for heads in (q, k, v))
    if cache is not None:
        k, v = cache.update(k, v, self.layer_idx)
    y, _ = attention_forward(self, q, k, v, mask, scaling=self.scaling, **kwargs)
    return parts["o_proj"](y.reshape(B, T, -1)), None


def _normed(y: Tensor, norm: Any, width: int) -> tuple[Tensor, HeadNorm | None]:
    """y [T, N] with a norm over whole rows applied, or the norm of each head that is left."""
    if norm is None:
        return y, None
    (weight,) = norm._parameters.values()
    if len(weight) == width:
        return y, HeadNorm(weight, norm.qmoe_norm)
    return rms_norm_now(y, weight, norm.qmoe_norm), None
