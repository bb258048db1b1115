"""Logits of batches of text: of a model in memory, or of one that is streamed layer by layer. Both
are iterators, so that they are compared alike."""

from typing import Any

import torch

from qmoe.calibration.batches import samples_of, shortage, too_short
from qmoe.calibration.text import Texts
from qmoe.measure.scores import Batches, Logits
from qmoe.model.layerwise import Waiting, suspended
from qmoe.model.source import Source
from qmoe.system.progress import progress


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


def streamed(source: Source, batches: Batches, dtype: torch.dtype) -> Logits:
    """Logits of an original model with one of its layers in memory at a time."""
    layers = iter(progress(source.structure.layers, "running the original"))
    inputs = [{"input_ids": ids, "use_cache": False} for _, ids in batches]
    passes = suspended(source.model, source.stages(), inputs)
    with torch.no_grad():
        source.weights.load(source.resident(), dtype)
        source.weights.tie()
    while True:
        with torch.no_grad():  # not around the yield, which would leave gradients off for others
            event = next(passes, None)
            if isinstance(event, Waiting):
                with source.loaded(next(layers).name, dtype):
                    event.go_on([event.forward(*c.args, **c.kwargs) for c in event.calls])
                continue
        if event is None:
            break
        yield event.output.logits
    next(layers, None)  # lets the progress bar close
