"""A forward pass on tensors without data: what a model's cache and its activations take.

A model's own code says how its cache grows: whole keys and values, the last ones of a sliding
window, a latent vector (MLA), a state of fixed size (Mamba, linear attention). So the model is run
on fake tensors, which have a shape and a dtype and no memory, and what it leaves in its cache is
counted. No family needs code of its own here. Routed experts are left out of the pass, since how
many rows each gets depends on values; plan/sizes.py adds what they take.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.func import functional_call
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from qmoe.errors import UnsupportedModelError
from qmoe.model.experts import is_experts
from qmoe.model.skeleton import inputs_of

# What the forward of a family raises that looks at values, or that has no cache.
CANNOT = (
    DataDependentOutputException,
    DynamicOutputShapeException,
    ValueError,
    NotImplementedError,
)


@dataclass(frozen=True)
class CacheKind:
    """layers: how many layers keep a cache of this kind. name: what transformers calls it, such as
    "sliding window". nbytes: of all of them."""

    name: str
    layers: int
    nbytes: int


@dataclass(frozen=True)
class Pass:
    """cache: what the cache takes once the context is full. activations: the most bytes that the
    activations of a part of the prompt take at once, routed experts left out. chosen: of each
    experts module, to how many of its experts a token goes."""

    cache: list[CacheKind]
    activations: int
    chosen: dict[str, int]

    @property
    def cache_bytes(self) -> int:
        return sum(kind.nbytes for kind in self.cache)


def dry_run(
    model: Any,
    context: int,
    batch: int,
    dtype: torch.dtype,
    at_once: int = 512,
    keep: Callable[[Any], None] | None = None,
) -> Pass:
    """Run `batch` sequences of `context` tokens through a model on the meta device.

    dtype: of weights and activations, and so of the cache. at_once: tokens of a sequence in one
    forward pass; the last part of the context is the one whose activations are counted. keep: what
    is done to a cache after a forward pass, such as putting it into 8 bits. Raises
    UnsupportedModelError for a family whose forward looks at values, which fake tensors lack, and
    for an encoder-decoder, whose cache grows with two texts.
    """
    if model.config.is_encoder_decoder:
        raise UnsupportedModelError(
            f"{type(model).__name__}: its cache grows with two texts, that of the encoder and that "
            "of the decoder; such models are not planned"
        )
    last = min(at_once, context)
    with FakeTensorMode(allow_non_fake_inputs=True), _experts_left_out(model) as chosen:
        fakes = {
            name: tensor.new_empty(tensor.shape, dtype=_as_run(tensor, dtype), device="cpu")
            for name, tensor in (*model.named_parameters(), *model.named_buffers())
        }
        ids = torch.zeros(batch, context, dtype=torch.long)
        try:
            with _Peak(fakes.values()) as peak:
                cache = None
                if context > last:
                    cache = _forward(model, fakes, ids[:, :-last], None)
                    if keep is not None:
                        keep(cache)
                peak.most = peak.now
                cache = _forward(model, fakes, ids[:, -last:], cache)
                if keep is not None:
                    keep(cache)
        except CANNOT as error:
            raise UnsupportedModelError(
                f"{type(model).__name__}: what its cache takes cannot be found without running the "
                f"model ({type(error).__name__}: {str(error).splitlines()[0]})"
            ) from error
    kinds: dict[str, list[int]] = defaultdict(list)
    for layer in cache.layers:
        nbytes = sum(tensor.nbytes for tensor in _tensors(vars(layer)))
        if nbytes:
            kinds[_in_words(type(layer).__name__)].append(nbytes)
    found = [CacheKind(name, len(sizes), sum(sizes)) for name, sizes in kinds.items()]
    chosen = _told(model) | chosen
    return Pass(found, peak.most - sum(kind.nbytes for kind in found), chosen)


def _as_run(tensor: Tensor, dtype: torch.dtype) -> torch.dtype:
    return dtype if tensor.is_floating_point() else tensor.dtype


def _forward(model: Any, tensors: dict[str, Tensor], ids: Tensor, cache: Any) -> Any:
    """The cache after a forward pass over ids [B, L], of which only the last gets logits."""
    inputs = inputs_of(model, ids) | {"use_cache": True, "past_key_values": cache}
    with torch.no_grad(), _FusedAttention():
        return functional_call(
            model, tensors, kwargs=inputs | {"logits_to_keep": 1}
        ).past_key_values


@contextmanager
def _experts_left_out(model: Any) -> Iterator[dict[str, int]]:
    """Experts modules give back what they are given. Yields, by their names, to how many experts a
    token went, once they have run."""
    modules = {name: module for name, module in model.named_modules() if is_experts(module)}
    own = {name: vars(module).get("forward") for name, module in modules.items()}  # adapters.py
    chosen: dict[str, int] = {}
    for name, module in modules.items():
        module.forward = partial(_not_computed, chosen, name)
    try:
        yield chosen
    finally:
        for name, module in modules.items():
            del module.forward
            if own[name] is not None:
                module.forward = own[name]


def _told(model: Any) -> dict[str, int]:
    """To how many experts a token goes by the config: of modules that are called without ids (as
    Llama 4's, with each token once for every expert)."""
    told = getattr(model.config.get_text_config(), "num_experts_per_tok", None)
    names = [name for name, module in model.named_modules() if is_experts(module)]
    return dict.fromkeys(names, told) if isinstance(told, int) else {}


def _not_computed(
    chosen: dict[str, int], name: str, hidden: Tensor, top_k_index: Tensor | None = None, *_: Any
) -> Tensor:
    if top_k_index is not None:
        chosen[name] = top_k_index.shape[-1]
    return hidden


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def _in_words(name: str) -> str:
    """DynamicSlidingWindowLayer -> sliding window. Int8Layer: whole keys and values, rounded."""
    if name == "Int8Layer":
        return "full in 8 bits"
    words = re.findall(r"[A-Z][a-z]+", name.removesuffix("Layer").removeprefix("Dynamic"))
    return " ".join(words).lower() or "full"


class _FusedAttention(TorchFunctionMode):
    """Attention in one kernel, as it runs where there are numbers: fake tensors would take the way
    by a matrix of all scores."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is scaled_dot_product_attention:
            query, _, value, *_ = args
            return query.new_empty(*query.shape[:-1], value.shape[-1])
        return func(*args, **(kwargs or {}))


class _Peak(TorchDispatchMode):
    """The most bytes that tensors made in here took at once, but for views of the weights."""

    def __init__(self, weights: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.most = 0
        self.known = WeakIdKeyDictionary()
        for tensor in weights:
            self.known[tensor.untyped_storage()] = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in _tensors(out):
            storage = tensor.untyped_storage()
            if storage not in self.known:
                self.known[storage] = _Freed(self, storage.nbytes())
        return out


class _Freed:
    """Counts bytes while it lives, which is as long as the storage that it belongs to."""

    def __init__(self, peak: _Peak, nbytes: int) -> None:
        self.peak, self.nbytes = peak, nbytes
        peak.now += nbytes
        peak.most = max(peak.most, peak.now)

    def __del__(self) -> None:
        self.peak.now -= self.nbytes
