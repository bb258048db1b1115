"""Logits of batches of text: of a model in memory, or of one that is streamed layer by layer. Both
are iterators, so that they are compared alike."""

from typing import Any

import torch

from qmoe.calibration.batches import samples_of, shortage, too_short
from qmoe.calibration.text import Texts
from qmoe.measure.scores import Batches, Logits
from qmoe.model.layerwise import Call, suspended
from qmoe.model.skeleton import free
from qmoe.model.source import Source
from qmoe.system.progress import Track


def make_batches(
    tokenizer: Any, texts: Texts, *, samples: int, seqlen: int, batch: int
) -> tuple[Batches, list[str]]:
    """The first `samples` samples of every domain; and in words, what of the text was of no use and
    which domains have fewer. Raises CalibrationError if one has none."""
    batches: Batches = []
    notes, found = list(texts.notes), {}
    for domain, parts in texts.domains.items():
        rows, unused = samples_of(tokenizer, domain, parts, seqlen, samples, None)
        rows, notes = rows[:samples], notes + unused
        if not len(rows):
            raise too_short([domain], seqlen, unused)
        batches += [(domain, part) for part in rows.split(batch)]
        found[domain] = (len(rows), samples)
    return batches, notes + shortage(found, seqlen)


def resident(model: Any, batches: Batches) -> Logits:
    """Logits of a model that is in memory."""
    for _, ids in batches:
        with torch.no_grad():
            logits = model(input_ids=ids.to(model.device), use_cache=False).logits.to(ids.device)
        yield logits  # not inside, which would leave gradients off in whoever asks


def streamed(source: Source, batches: Batches, dtype: torch.dtype, track: Track) -> Logits:
    """Logits of an original model with one of its layers in memory at a time."""
    weights, modules = source.weights, source.stages()
    layers = iter(track(source.structure.layers, "running the original"))

    def visit(i: int, forward: Any, calls: list[Call]) -> list[Any]:
        weights.load(weights.sources(next(layers).name), dtype)
        outputs = [forward(*c.args, **c.kwargs) for c in calls]
        free(modules[i])
        return outputs

    inputs = [{"input_ids": ids, "use_cache": False} for _, ids in batches]
    outputs = suspended(source.model, modules, inputs, visit)
    with torch.no_grad():
        weights.load(source.resident(), dtype)
        weights.tie()
    for _ in batches:
        with torch.no_grad():
            output = next(outputs)
        yield output.logits
    next(layers, None)
