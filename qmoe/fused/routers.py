"""Routers of a model on a CPU as one operation each while it decodes.

A router is recognized by what it computes, not by its name: for probing rows, its logits and ids
have to be those of a linear and the largest of them, and its scores, but for rounding, their
probabilities.
"""

import inspect
from collections.abc import Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qmoe.kernels.cpu.router import FEW, Routing, routed

PROBES = 16  # rows


def fuse_routers(routers: Iterable[nn.Module]) -> int:
    """Replace the forward of every router that is recognized, for up to FEW tokens; returns their
    number. Names, parameters and classes (by isinstance) stay; more tokens, and gradients, go
    through the original."""
    found = 0
    module: Any
    for module in routers:
        kind = recognize_router(module)
        if kind is not None:
            module.qmoe_routing = kind
            cls: Any = type(module)
            module.__class__ = _fused(cls)
            found += 1
    return found


def recognize_router(module: nn.Module) -> Routing | None:
    """The kind of a module [T, K] to logits [T, E], scores [T, A] and ids [T, A] with one weight
    [E, K] and perhaps a bias; None for any other."""
    cls: Any = type(module)
    tensors = dict(module.named_parameters()) | dict(module.named_buffers())
    weight, bias = tensors.get("weight"), tensors.get("bias")
    if weight is None or len(tensors) != 1 + (bias is not None) or not _takes_one(cls):
        return None
    if weight.dim() != 2 or weight.is_meta or not weight.is_floating_point():
        return None
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != weight.dtype):
        return None
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(PROBES, weight.shape[1], generator=generator)
    # Logits of about 1: larger ones leave one expert a probability of 1 however scores are made.
    x = (x / (x @ weight.detach().float().T).std().clamp_min(1e-9)).to(weight.dtype)
    with torch.no_grad():
        found = module(x)
        logits = F.linear(x, weight, bias)
        if not (isinstance(found, tuple) and len(found) == 3 and torch.equal(found[0], logits)):
            return None
        return _kind(logits, *found[1:])


def _kind(logits: Tensor, scores: Tensor, ids: Tensor) -> Routing | None:
    """The kind that gives these scores [T, A] and ids [T, A] of logits [T, E]."""
    A, wide = ids.shape[-1], scores.dtype == torch.float32
    top, largest = torch.topk(logits.float(), A, dim=-1)
    if not torch.equal(ids, largest) or scores.dtype not in (torch.float32, logits.dtype):
        return None
    by_all = logits.float().softmax(-1).gather(1, ids)
    for normed, wanted in ((True, top.softmax(-1)), (False, by_all)):
        close = {torch.float32: 1e-5, torch.float16: 1e-3}.get(scores.dtype, 8e-3)
        if torch.allclose(scores.float(), wanted, rtol=close, atol=1e-7):
            return Routing(A, normed, wide)
    return None


@cache
def _takes_one(cls: type[Any]) -> bool:
    """Whether the forward takes one tensor and the class is not torch's own."""
    if cls.__module__.startswith("torch."):
        return False
    return len(inspect.signature(cls.forward).parameters) == 2  # and self


@cache
def _fused(cls: type[Any]) -> type[Any]:
    """The class with a forward that is one operation for few tokens without gradients."""

    def forward(self: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        weight, bias = self._parameters.get("weight"), self._parameters.get("bias")
        if weight is None:  # an adapter has taken its place
            return cls.forward(self, x)  # type: ignore[no-any-return]
        rows = x.reshape(-1, x.shape[-1])
        if not 0 < len(rows) <= FEW or x.dtype != weight.dtype or x.requires_grad:
            return cls.forward(self, x)  # type: ignore[no-any-return]
        if weight.requires_grad:
            return cls.forward(self, x)  # type: ignore[no-any-return]
        return routed(rows, weight, bias, self.qmoe_routing)

    return type(f"Fused{cls.__name__}", (cls,), {"forward": forward})
