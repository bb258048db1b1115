"""Calibration text that the caller has in memory: texts, conversations, rows of a data set, or
batches of token ids such as a DataLoader gives.
"""

from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from qmoe.calibration.batches import choose_samples
from qmoe.calibration.chat import document
from qmoe.calibration.pieces import Document, Part, Piece, Reading, cut
from qmoe.calibration.tables import COLUMNS
from qmoe.calibration.text import Texts
from qmoe.errors import CalibrationError

IDS, MASK = "input_ids", "attention_mask"
EXPECTED = (
    "expected texts, conversations (lists of messages with role and content), rows with one of "
    f"{', '.join(COLUMNS)}, or batches of token ids (tensors [B, L], or mappings with {IDS} and, "
    f"where rows are padded, {MASK})"
)


def samples_of_given(
    tokenizer: Any, given: Iterable[Any], count: int, seqlen: int, seed: int
) -> tuple[Int[Tensor, "n L"], list[str]]:
    """Samples of `seqlen` tokens, and in words what was of no use.

    Of texts and conversations, which the chat template writes out, `count` samples are drawn as of
    a file (batches.py). Batches of token ids are all used: rows without their padding, one behind
    the other, cut into samples. Raises CalibrationError for anything else, and if there is not one
    sample.
    """
    if isinstance(given, str | Mapping) or not isinstance(given, Iterable):
        raise CalibrationError(f"text: {EXPECTED} in a list or another iterable, got {given!r:.80}")
    items = iter(given)
    first = next(items, None)
    everything = [] if first is None else chain([first], items)
    if first is not None and _tokens(first) is not None:
        return _cut(everything, seqlen)
    documents = [found for i, item in enumerate(everything) if (found := _document(item, i))]

    def read(reading: Reading) -> Iterator[Piece]:
        for each in documents:
            yield from cut(each, reading.piece)

    return choose_samples(tokenizer, Texts({"given": [Part(read)]}), count, seqlen, seed)


def _document(item: Any, i: int) -> Document | None:
    where = f"text: item {i}"
    if isinstance(item, Mapping):
        columns = [name for name in COLUMNS if name in item]
        if not columns:
            raise CalibrationError(f"{where} has {sorted(map(str, item))[:8]}; {EXPECTED}")
        item = item[columns[0]]
    return document(item, where)


def _tokens(item: Any) -> Any:
    """The token ids of a batch, None if it is none."""
    if isinstance(item, Mapping):
        return item.get(IDS)
    numbers = isinstance(item, Tensor)
    if isinstance(item, list | tuple) and item:
        numbers = isinstance(item[0], int | Tensor) or (
            isinstance(item[0], list) and bool(item[0]) and isinstance(item[0][0], int)
        )
    return item if numbers else None


def _cut(batches: Iterable[Any], seqlen: int) -> tuple[Int[Tensor, "n L"], list[str]]:
    parts = []
    for i, batch in enumerate(batches):
        ids = _tokens(batch)
        if isinstance(ids, list | tuple) and ids and isinstance(ids[0], Tensor):
            ids = ids[0]  # of a TensorDataset
        rows = None if ids is None else torch.as_tensor(ids)
        if rows is None or rows.dim() not in (1, 2) or rows.is_floating_point():
            raise CalibrationError(f"text: item {i} holds no token ids [B, L]; {EXPECTED}")
        mask = batch.get(MASK) if isinstance(batch, Mapping) else None
        if mask is not None:
            rows = rows[torch.as_tensor(mask).bool()]
        parts.append(rows.reshape(-1).long().cpu())
    ids = torch.cat(parts)
    samples = ids[: len(ids) // seqlen * seqlen].view(-1, seqlen)
    if not len(samples):
        raise CalibrationError(
            f"text: the batches hold {len(ids)} tokens, less than one sample of {seqlen}; give "
            "more, or ask for a smaller seqlen"
        )
    left = len(ids) - samples.numel()
    return samples, [f"text: {left} tokens behind the last whole sample are left out"] * bool(left)
