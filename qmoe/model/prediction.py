"""The layer that predicts a token beyond the next (multi-token prediction), which transformers'
classes of the families leave out: found by its names in a checkpoint, built from the family's own
decoder layer, and put into the model where those names say.

Two kinds are known. DeepSeek-V3, GLM-4.5 and others store one more decoder layer behind the last,
with `eh_proj`, `enorm`, `hnorm` and `shared_head.norm` in it, and copies of the embedding and of
the output projection, which transformers and vLLM take from the model itself. Qwen3-Next stores a
decoder layer below `mtp.layers`, with `fc`, `pre_fc_norm_embedding`, `pre_fc_norm_hidden` and
`norm` beside it. Both compute the same (DeepSeek-V3, arXiv 2412.19437, section 2.2): the model's
last hidden state, behind its final norm, and the embedding of the token that follows are normed,
joined and projected. They go through the layer and a norm, and the model's output projection makes
of them the logits of the token after the one that follows.

The layer's own parts are those of one of the model's layers, of which it is a copy. A checkpoint
with other parts, or with more than one such layer, is not described here.
"""

import re
from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qmoe.model.layerwise import Call
from qmoe.model.leftovers import TABLES, by_layer

JOINS = "joins the hidden state and the embedding, which engines read in 16 bits"
# In a NextN layer: what joins, what norms, and copies of parts of the model.
JOIN, EMBEDDING, HIDDEN, NORM = "eh_proj", "enorm", "hnorm", "shared_head.norm"
COPIES = ("embed_tokens.weight", "shared_head.head.weight")
# The same beside the layer of a model that has them apart.
APART, APART_LAYERS = "mtp", "mtp.layers"
OUTER = {JOIN: "fc", EMBEDDING: "pre_fc_norm_embedding", HIDDEN: "pre_fc_norm_hidden", NORM: "norm"}
# How a packed matrix is stored, in place of its weight.
STORED = re.compile(r"(\.weight)?(_packed|_scale|_zero_point|_shape|\.(trellis|suh|svh|mcg|mul1))$")
PACKED, CODED = ".weight_packed", ".trellis"
EXPERTS = re.compile(r"(.*\bexperts)\..*")


@dataclass(frozen=True)
class Prediction:
    """Names of modules. layer: the decoder layer. like: the model's own layer of which it is a
    copy, and whose arguments it takes. join, embedding_norm, hidden_norm, norm: what is around
    it."""

    layer: str
    like: str
    join: str
    embedding_norm: str
    hidden_norm: str
    norm: str

    @property
    def before(self) -> tuple[str, str, str]:
        """What makes the layer's input."""
        return self.embedding_norm, self.hidden_norm, self.join


def find_prediction(model: nn.Module, names: Iterable[str]) -> Prediction | None:
    """The prediction layer of a checkpoint by the names of its tensors, packed or not; None if it
    has none, or one that is not described here."""
    stems = {STORED.sub(".weight", name) for name in names}
    layers = {place: _parts(tails) for place, tails in by_layer(stems).items()}
    extras = {f"{part}.weight" for part in OUTER}
    found = [place for place, tails in layers.items() if extras <= tails]
    if len(found) == 1:
        [(place, i)] = found
        prefix, names_of = f"{place}.{i}.", {part: part for part in OUTER}
        own = layers.pop((place, i)) - extras - set(COPIES)
        if not _is_next(model, place, i):
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


def attach(model: Any, found: Prediction) -> None:
    """Put the layer into a model without weights. Its forward does not run it."""
    like = model.get_submodule(found.like)
    layer = deepcopy(like)
    named = [m for n, m in like.named_children() if "norm" in n]
    norm = next(m for m in named if getattr(getattr(m, "weight", None), "ndim", 0) == 1)
    (size,) = norm.weight.shape
    join = nn.Linear(2 * size, size, bias=False, device="meta", dtype=model.dtype)
    join.qmoe_kept = JOINS
    owner, _, number = found.layer.rpartition(".")
    if found.layer.startswith(f"{APART}."):
        model.add_module(APART, nn.Module())
        model.get_submodule(APART).add_module("layers", nn.ModuleList([layer]))
    else:
        assert int(number) == len(model.get_submodule(owner))
        model.get_submodule(owner).append(layer)
        layer.add_module(NORM.partition(".")[0], nn.Module())
    _put(model, found.join, join)
    for name in (found.embedding_norm, found.hidden_norm, found.norm):
        _put(model, name, deepcopy(norm))
    model.requires_grad_(False)
    model._qmoe_prediction = found


def prediction_of(model: Any) -> Prediction | None:
    """The layer that was put into a model."""
    return getattr(model, "_qmoe_prediction", None)


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    owner, _, last = name.rpartition(".")
    model.get_submodule(owner).add_module(last, module)


def detach(model: Any, found: Prediction) -> None:
    """Take the layer out again."""
    del model._qmoe_prediction
    if found.layer.startswith(f"{APART}."):
        delattr(model, APART)
    else:
        del model.get_submodule(found.layer.rpartition(".")[0])[-1]


def joined(model: Any, found: Prediction, hidden: Tensor, ids: Tensor) -> Tensor:
    """The layer's input [B, L, H]. hidden: [B, L, H], what the output projection is given. ids:
    [B, L]. The last token of a row, which nothing follows, is taken twice."""
    following = torch.cat([ids[:, 1:], ids[:, -1:]], dim=1)
    embedded = model.get_input_embeddings()(following).to(hidden.device)
    embedding_norm, hidden_norm, join = map(model.get_submodule, found.before)
    both = torch.cat([embedding_norm(embedded), hidden_norm(hidden)], dim=-1)
    return join(both)  # type: ignore[no-any-return]


def with_states(call: Call, states: Tensor | None) -> Call:
    """The arguments of a decoder layer with these hidden states."""
    if "hidden_states" in call.kwargs:
        return Call(call.args, call.kwargs | {"hidden_states": states})
    return Call((states, *call.args[1:]), call.kwargs)


def drafts(model: Any, found: Prediction, output: Any) -> Tensor:
    """The most likely token after the one that follows each place: [B, L], by the output of the
    layer."""
    states = output[0] if isinstance(output, tuple) else output
    logits = model.get_output_embeddings()(model.get_submodule(found.norm)(states))
    return logits.argmax(-1)  # type: ignore[no-any-return]
