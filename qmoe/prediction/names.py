"""Finding the layer that predicts a token beyond the next (multi-token prediction), which
transformers' classes of the families leave out, by the names of a checkpoint's tensors.

Two kinds are known. DeepSeek-V3, GLM-4.5 and others store one more decoder layer behind the last,
with `eh_proj`, `enorm`, `hnorm` and `shared_head.norm` (Hunyuan 3 and Ling call it
`final_layernorm`) in it, and copies of the embedding and of the output projection, which
transformers and vLLM take from the model itself. Qwen3-Next, Qwen3.5 and EXAONE store a decoder
layer below `mtp.layers`, with `fc`, `pre_fc_norm_embedding`, `pre_fc_norm_hidden` and `norm` beside
it. Both compute the same (DeepSeek-V3, arXiv 2412.19437, section 2.2): the model's
last hidden state, behind its final norm, and the embedding of the token that follows are normed,
joined and projected. They go through the layer and a norm, and the model's output projection makes
of them the logits of the token after the one that follows.

The layer's own parts are those of one of the model's layers, of which it is a copy. A checkpoint
with other parts, or with more than one such layer, is not described here.
"""

import re
from collections.abc import Iterable
from typing import Any

from torch import nn

from qmoe.model.leftovers import TABLES, by_layer
from qmoe.model.structure import Prediction

# In a NextN layer: what joins, what norms, and copies of parts of the model.
JOIN, EMBEDDING, HIDDEN, NORM = "eh_proj", "enorm", "hnorm", "shared_head.norm"
OTHER_NORM = "final_layernorm"
COPIES = ("embed_tokens.weight", "shared_head.head.weight")
# The same beside the layer of a model that has them apart.
APART, APART_LAYERS = "mtp", "mtp.layers"
OUTER = {JOIN: "fc", EMBEDDING: "pre_fc_norm_embedding", HIDDEN: "pre_fc_norm_hidden", NORM: "norm"}
# How a packed matrix is stored, in place of its weight.
STORED = re.compile(r"(\.weight)?(_packed|_scale|_zero_point|_shape|\.(trellis|suh|svh|mcg|mul1))$")
PACKED, CODED = ".weight_packed", ".trellis"
EXPERTS = re.compile(r"(.*\bexperts)\..*")


def find_prediction(model: nn.Module, names: Iterable[str]) -> Prediction | None:
    """The prediction layer of a checkpoint by the names of its tensors, packed or not; None if it
    has none, or one that is not described here."""
    stems = {STORED.sub(".weight", name) for name in names}
    layers = {place: _parts(tails) for place, tails in by_layer(stems).items()}
    found = [place for place, tails in layers.items() if f"{JOIN}.weight" in tails]
    if len(found) == 1:
        [(place, i)] = found
        tails = layers.pop((place, i))
        prefix, names_of = f"{place}.{i}.", {part: part for part in OUTER}
        if f"{OTHER_NORM}.weight" in tails:
            names_of[NORM] = OTHER_NORM
        extras = {f"{part}.weight" for part in names_of.values()}
        own = tails - extras - set(COPIES)
        if not (extras <= tails and _is_next(model, place, i)):
            return None
    elif not found and (APART_LAYERS, 0) in layers:
        place, prefix, names_of = "", f"{APART}.", OUTER
        own = layers.pop((APART_LAYERS, 0))
        beside = {s.removeprefix(prefix) for s in stems if s.startswith(prefix)}
        beside = {stem for stem in beside if not stem.startswith("layers.0.")}
        if beside != {f"{part}.weight" for part in OUTER.values()}:
            return None
    else:
        return None
    alike = [at for at, tails in layers.items() if tails == own and _is_layer(model, *at)]
    if not alike:
        return None
    like = max(alike, key=lambda at: at[1])
    module = model.get_submodule("{}.{}".format(*like))
    if norm_in(module) is None or _has_streams(module):
        return None
    layer = prefix.rstrip(".") if place else f"{APART_LAYERS}.0"
    parts = (JOIN, EMBEDDING, HIDDEN, NORM)
    return Prediction(layer, "{}.{}".format(*like), *(prefix + names_of[part] for part in parts))


def find_quantized(model: nn.Module, names: Iterable[str]) -> Prediction | None:
    """The same in a quantized checkpoint; None if the layer is not quantized."""
    every = list(names)
    found = find_prediction(model, every)
    if found is None:
        return None
    inside = (name for name in every if name.startswith(f"{found.layer}."))
    return found if any(name.endswith((PACKED, CODED)) for name in inside) else None


def norm_in(layer: nn.Module) -> nn.Module | None:
    """A norm of a decoder layer that is as wide as its hidden states, as those around it are."""
    named = [module for name, module in layer.named_children() if "norm" in name]
    return next((m for m in named if getattr(getattr(m, "weight", None), "ndim", 0) == 1), None)


def _has_streams(layer: nn.Module) -> bool:
    """Whether a layer passes on several residual streams (hyper-connections): how a prediction
    layer makes them of one hidden state is not known here."""
    return any(getattr(module, "hc_mult", 1) > 1 for module in layer.modules())


def _parts(tails: Iterable[str]) -> set[str]:
    """What a layer is made of, whether its experts are stored one by one or together."""
    return {EXPERTS.sub(r"\1", tail) for tail in tails if TABLES.search(tail) is None}


def _list(model: nn.Module, place: str) -> Any:
    parent, _, last = place.rpartition(".")
    modules = dict(model.named_modules())
    found = getattr(modules.get(parent), last, None)
    return found if isinstance(found, nn.ModuleList) else []


def _is_next(model: nn.Module, place: str, i: int) -> bool:
    return 0 < len(_list(model, place)) == i


def _is_layer(model: nn.Module, place: str, i: int) -> bool:
    return i < len(_list(model, place))
