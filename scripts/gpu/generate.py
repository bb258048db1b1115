"""Decoding with a static cache, launch by launch or as one CUDA graph per token."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import StaticCache

from gpu.clock import captured


class Stepper:
    """A model, a cache of fixed size and the last token of every sequence; `step` decodes one more.

    Everything is kept in tensors of fixed places, so that `step` can be captured.
    """

    def __init__(self, model: Any, prompt: Tensor, tokens: int):
        self.model = model
        length = prompt.shape[1] + tokens + 8
        self.cache = StaticCache(config=model.config, max_cache_len=length)
        self.history = torch.zeros(len(prompt), length, dtype=torch.long, device=prompt.device)
        self.at = torch.zeros(1, dtype=torch.long, device=prompt.device)
        with torch.no_grad():
            logits = model(input_ids=prompt, past_key_values=self.cache).logits
        self.last = logits[:, -1:].argmax(-1)
        self.logits = logits[:, -1]

    def step(self) -> None:
        with torch.no_grad():
            logits = self.model(input_ids=self.last, past_key_values=self.cache).logits
        self.history.index_copy_(1, self.at, self.last)
        self.last.copy_(logits[:, -1:].argmax(-1))
        self.at.add_(1)

    def ready(self, graph: bool) -> Callable[[], Any]:
        """`step`, or the replay of its graph; making that decodes a few tokens."""
        return captured(self.step, self.last.device) if graph else self.step


def generate(model: Any, prompt: Tensor, tokens: int, graph: bool) -> Tensor:
    """The next `tokens` tokens, greedily: [sequences, tokens]."""
    stepper = Stepper(model, prompt, tokens)
    run = stepper.ready(graph)
    while int(stepper.at) < tokens:
        run()
    return stepper.history[:, :tokens].clone()
