"""What the layer that predicts a token beyond the next is given, and the token it drafts."""

from typing import Any

import torch
from torch import Tensor

from qmoe.model.layerwise import Call
from qmoe.model.structure import Prediction


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
