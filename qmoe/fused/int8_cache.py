"""A cache of keys and values in 8 bits: half the memory of 16 bits.

Each token of each head has a scale of its own, whose bytes lie behind its codes, so that
transformers' operations on caches (crop, reorder, select) need not know of it. Attention gets keys
and values in their own dtype again, expanded one layer at a time.
"""

from typing import Any

import torch
from jaxtyping import Float, Int8
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer

from qmoe.fused.growing_cache import GrowingLayer
from qmoe.system.printing import say

MOST = 127


class Int8Layer(DynamicLayer):  # type: ignore[misc]
    """A DynamicLayer whose keys and values are kept in 8 bits."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values [B, H, T, D]; returns all of them, the new ones rounded too."""
        kept = super().update(encode(key_states), encode(value_states), *args, **kwargs)
        keys, values = (decode(codes, key_states.dtype) for codes in kept)
        return keys, values


def encode(states: Float[Tensor, "*rows D"]) -> Int8[Tensor, "*rows bytes"]:
    """Codes of each row, and the bytes of its scale in the dtype of the states."""
    scale = states.abs().amax(-1, keepdim=True) / MOST
    divisor = torch.where(scale > 0, scale, 1).float()
    codes = (states.float() / divisor).round().clamp(-MOST, MOST).to(torch.int8)
    return torch.cat([codes, scale.view(torch.int8)], -1)


def decode(kept: Int8[Tensor, "*rows bytes"], dtype: torch.dtype) -> Float[Tensor, "*rows D"]:
    """The states of a dtype that `encode` was given, rounded."""
    width = kept.shape[-1] - dtype.itemsize
    return kept[..., :width].to(dtype) * kept[..., width:].contiguous().view(dtype)


def to_int8(cache: Any) -> None:
    """Put the whole keys and values of a DynamicCache into 8 bits. Its layers of other kinds (of a
    sliding window, latent vectors that have their own class, states) stay as they are."""
    for layer in cache.layers if isinstance(cache, DynamicCache) else ():
        if type(layer) in (DynamicLayer, GrowingLayer) and layer.is_initialized:
            layer.keys, layer.values = encode(layer.keys), encode(layer.values)
            vars(layer).pop("room", None)
            vars(layer).pop("last", None)
            layer.__class__ = Int8Layer


def keep_caches_in_int8(model: nn.Module) -> None:
    """Put every DynamicCache that this model fills into 8 bits after its first forward pass. One
    line on standard error says so if a cache has nothing that is kept in 8 bits."""
    told = False

    def after(module: nn.Module, args: Any, output: Any) -> None:
        nonlocal told
        cache = getattr(output, "past_key_values", None)
        to_int8(cache)
        small = any(type(layer) is Int8Layer for layer in getattr(cache, "layers", ()))
        if cache is not None and not small and not told:
            told = True
            say(
                f"warning: kv: {type(cache).__name__} has no whole keys and values that are kept "
                "in 8 bits; it stays as it is"
            )

    model.register_forward_hook(after)
