"""Attention of a packed model on a CPU, through transformers' own interface for it."""

import inspect
import re
import sys
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from qmoe.kernels import uses_arena
from qmoe.kernels.cpu.attention import WIDEST, attention
from qmoe.kernels.cpu.layout import TYPES
from qmoe.kernels.cpu.stack import uses_cpu_kernels
from qmoe.runtime.run_on import RunOn

NAME = "qmoe_cpu"


def fuse_attention(model: Any, run: RunOn) -> None:
    """Let a model whose attention is torch's SDPA use the C kernel, where packed weights run in C.
    A model of which some code asks which implementation is set, or cannot be read, keeps torch's.
    """
    if uses_arena(run.device) or not uses_cpu_kernels(run.device):
        return
    files = {type(module).__module__ for module in model.modules()}
    files = {name for name in files if not name.startswith(("torch.", "qmoe."))}
    if model.config._attn_implementation == "sdpa" and not any(map(_asks, files)):
        AttentionInterface.register(NAME, attention_forward)
        AttentionMaskInterface.register(NAME, sdpa_mask)
        model.set_attn_implementation(NAME)
        model.init_continuous_batching = partial(_batch_continuously, model)


def _batch_continuously(model: Any, *args: Any, **kwargs: Any) -> Any:
    """transformers' `init_continuous_batching`, which takes no attention but its own."""
    if model.config._attn_implementation == NAME:
        model.set_attn_implementation("sdpa")
    return type(model).init_continuous_batching(model, *args, **kwargs)


@cache
def _asks(module: str) -> bool:
    """Whether the code of a module compares the implementation's name with others."""
    try:
        code = inspect.getsource(sys.modules[module])
    except (KeyError, OSError, TypeError):
        return True
    return bool(re.search(r"_attn_implementation\s*(==|!=|in\b|not in\b)", code))


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention function as transformers calls it; torch's SDPA computes what the kernel does
    not: gradients, dropout, masks that are added, paged caches, heads wider than 256."""
    rest = (dropout, scaling, is_causal)
    unusual = ("softcap", "output_attentions", "position_bias", "cache")
    if dropout or any(kwargs.get(name) is not None for name in unusual):
        return sdpa_attention_forward(module, query, key, value, attention_mask, *rest, **kwargs)  # type: ignore[no-any-return]
    if not _takes(query, key, value, attention_mask):
        return sdpa_attention_forward(module, query, key, value, attention_mask, *rest, **kwargs)  # type: ignore[no-any-return]
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    causal = query.shape[2] > 1 and attention_mask is None and causal
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return attention(query, key, value, attention_mask, scale, causal), None


def _takes(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> bool:
    if q.device.type != "cpu" or q.requires_grad or k.requires_grad or v.requires_grad:
        return False
    if q.dtype not in TYPES or k.dtype != q.dtype or v.dtype != q.dtype:
        return False
    if len(q) != len(k) or q.shape[1] % k.shape[1] or max(q.shape[3], v.shape[3]) > WIDEST:
        return False
    if mask is None:
        return True
    return mask.dtype == torch.bool and mask.dim() == 4 and mask.shape[3] == k.shape[2]
