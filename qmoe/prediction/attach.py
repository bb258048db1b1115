"""Putting the layer that predicts a token beyond the next into a model without weights.

It is a copy of the family's own layer, with what is around it, where its names say. The model's
forward does not run it.
"""

from copy import deepcopy
from typing import Any

from torch import nn

from qmoe.checkpoint.reader import Checkpoint
from qmoe.model.structure import Prediction, find
from qmoe.model.weight_map import WeightMap
from qmoe.prediction.names import APART, NORM, find_prediction, find_quantized, norm_in

JOINS = "joins the hidden state and the embedding, which engines read in 16 bits"


def add_prediction(model: Any, checkpoint: Checkpoint) -> Prediction | None:
    """Find the layer in an unquantized checkpoint and put it into the model, unless its tensors are
    not those of the layer it is like; None if that is so, or there is none."""
    found = find_prediction(model, checkpoint.names())
    if found is None:
        return None
    without = WeightMap(model, checkpoint)
    before = _problems(without)
    attach(model, found)
    weights = WeightMap(model, checkpoint)
    last = find(model).layers[-1].name == found.layer
    if last and _problems(weights) == before and len(weights.carried) < len(without.carried):
        return found
    detach(model, found)
    return None


def add_quantized(model: Any, checkpoint: Checkpoint) -> Prediction | None:
    """The same in a quantized checkpoint, if the layer is quantized there."""
    found = find_quantized(model, checkpoint.names())
    if found is not None:
        attach(model, found)
    return found


def _problems(weights: WeightMap) -> int:
    return len(weights.misshapen()) + len(weights.missing()) + len(weights.doubled())


def attach(model: Any, found: Prediction) -> None:
    """Put the layer into a model without weights. Its forward does not run it."""
    like = model.get_submodule(found.like)
    layer = deepcopy(like)
    norm: Any = norm_in(like)
    (size,) = norm.weight.shape
    join: Any = nn.Linear(2 * size, size, bias=False, device="meta", dtype=model.dtype)
    join.qmoe_kept = JOINS
    owner, _, number = found.layer.rpartition(".")
    if found.layer.startswith(f"{APART}."):
        model.add_module(APART, nn.Module())
        model.get_submodule(APART).add_module("layers", nn.ModuleList([layer]))
    else:
        assert int(number) == len(model.get_submodule(owner))
        model.get_submodule(owner).append(layer)
        if found.norm.endswith(NORM):
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
