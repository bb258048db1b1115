"""Layers that predict tokens beyond the next, as a finished folder holds them: quantized like all
others, or carried over as they were; never lost without a word."""

from collections.abc import Mapping
from typing import Any

import torch

from qmoe.model.source import Source
from qmoe.system.sizes import format_size

CARRIED = "prediction 16-bit"  # the kind of such bytes, beside those of audit.py


def findings(original: Source, packed: Source) -> list[str]:
    """In words, what of the original's prediction layers is not in a quantized folder: tensors that
    were to be carried over byte for byte, and a layer that was to be quantized."""
    found = []
    there = set(packed.weights.carried)
    for name in original.weights.carried:
        if name not in there:
            found.append(f"is missing of a prediction layer: {name}")
        elif not torch.equal(original.checkpoint.tensor(name), packed.checkpoint.tensor(name)):
            found.append(f"is not as it was in the source: {name}")
        original.checkpoint.release()
        packed.checkpoint.release()
    wanted = original.prediction
    if wanted is not None and quantizes(original) and packed.prediction != wanted:
        found.append(f"is not stored as a quantized prediction layer: {wanted.layer}")
    return found


def quantizes(original: Source) -> bool:
    """Whether there is a prediction layer with something to quantize in it."""
    last = original.structure.layers[-1]
    return original.predicts(last.name) and bool(last.experts or last.dense or last.unfused)


def described(packed: Source) -> dict[str, Any]:
    """What the report says of prediction layers, nothing if there are none. layer: the one that is
    quantized, with its bytes. carried: bytes of what is stored as it was, by name."""
    weights, checkpoint = packed.weights, packed.checkpoint
    out: dict[str, Any] = {}
    if packed.prediction is not None:
        outer = packed.prediction.norm.partition(".")[0]
        inside = weights.sources(packed.prediction.layer)
        if not packed.prediction.join.startswith(f"{packed.prediction.layer}."):
            inside = weights.sources(outer)
        nbytes = sum(map(checkpoint.tensor_bytes, inside))
        out |= {"layer": packed.prediction.layer, "bytes": nbytes}
    if weights.carried:
        out["carried"] = {name: checkpoint.tensor_bytes(name) for name in weights.carried}
    return out


def in_words(found: Mapping[str, Any]) -> list[str]:
    """The same for people. found: what `described` gave."""
    lines = []
    if "layer" in found:
        lines.append(
            f"{found['layer']}: predicts tokens beyond the next; quantized, "
            f"{format_size(found['bytes'])}"
        )
    if carried := found.get("carried"):
        first, *others = carried
        more = f" and {len(others)} more" if others else ""
        lines.append(
            f"not quantized, of layers that predict tokens beyond the next: {first}{more}, "
            f"{format_size(sum(carried.values()))}"
        )
    return lines
