"""A cache of keys and values that has room for tokens to come.

transformers' DynamicCache copies all earlier keys and values for every token that is decoded. On a
CPU that takes longer than the attention itself.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer


class GrowingLayer(DynamicLayer):  # type: ignore[misc]
    """A DynamicLayer whose keys and values are the front part of larger tensors."""

    keys: Any  # a tensor, once it is initialized
    values: Any
    room: tuple[Tensor, Tensor] | None = None
    last: tuple[Any, Any] = (None, None)  # keys and values as the last update left them

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values [B, H, T, D]; returns all of them. What was returned before is
        never written to again."""
        if not self.is_initialized or key_states.requires_grad or torch.compiler.is_compiling():
            self.room = None
            return super().update(key_states, value_states, *args, **kwargs)  # type: ignore[no-any-return]
        start, tokens = self.keys.shape[-2], key_states.shape[-2]
        keys, values = self.with_room_for(tokens)
        keys[:, :, start : start + tokens] = key_states
        values[:, :, start : start + tokens] = value_states
        return self.take(tokens)

    def with_room_for(self, tokens: int) -> tuple[Tensor, Tensor]:
        """The tensors whose front part keys and values are, with room for so many more behind."""
        start = self.keys.shape[-2]
        end = start + tokens
        if self.room is None or not self._fits(end):
            spare = max(256, start // 4)
            self.room = (_with_room(self.keys, end + spare), _with_room(self.values, end + spare))
        return self.room

    def take(self, tokens: int) -> tuple[Tensor, Tensor]:
        """Count so many tokens, which have been written behind the others, as keys and values."""
        assert self.room is not None
        end = self.keys.shape[-2] + tokens
        self.keys, self.values = (part[:, :, :end] for part in self.room)
        self.last = (self.keys, self.values)
        return self.last

    def __copy__(self) -> "GrowingLayer":
        made = type(self).__new__(type(self))
        made.__dict__ |= {**self.__dict__, "room": None, "last": (None, None)}
        return made

    def _fits(self, end: int) -> bool:
        """Whether keys and values are still the views that the last update left, with room behind
        them: cropping, reordering and copying put others in their place."""
        assert self.room is not None
        same = self.keys is self.last[0] and self.values is self.last[1]
        same = same and self.keys.data_ptr() == self.room[0].data_ptr()
        usable = torch.is_inference_mode_enabled() or not self.room[0].is_inference()
        return same and usable and end <= self.room[0].shape[-2]


def _with_room(states: Tensor, length: int) -> Tensor:
    B, H, T, D = states.shape
    room = states.new_empty(B, H, length, D)
    room[:, :, :T] = states
    return room


def let_caches_grow(model: nn.Module) -> None:
    """Give every layer of a DynamicCache that this model fills room for more tokens."""

    def after(module: nn.Module, args: Any, output: Any) -> None:
        cache = getattr(output, "past_key_values", None)
        if isinstance(cache, DynamicCache):
            for layer in cache.layers:
                if type(layer) is DynamicLayer:
                    layer.__class__ = GrowingLayer

    model.register_forward_hook(after)
