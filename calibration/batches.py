"""Windows of token ids from text, the same for the same tokenizer, text and seed."""

import hashlib
from functools import partial
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from qmoe.calibration.chat import render
from qmoe.calibration.pieces import PIECE, SLICE, Part, Reading, choose, slices
from qmoe.calibration.text import Texts
from qmoe.errors import CalibrationError

CHARACTERS = 8  # taken for a token when text is chosen; more is read where that was not enough
MARGIN = 4  # times as much, then


def tokenize(tokenizer: Any, text: str, seqlen: int) -> Int[Tensor, "n L"]:
    """All whole samples of a text. Each starts with BOS if the tokenizer starts texts with it."""
    return _samples(tokenizer, _ids(tokenizer, text), seqlen)


def _samples(tokenizer: Any, ids: Int[Tensor, " m"], seqlen: int) -> Int[Tensor, "n L"]:
    start = [i for i in tokenizer("")["input_ids"][:1] if i == tokenizer.bos_token_id]
    body = seqlen - len(start)
    rows = ids[: len(ids) // body * body].view(-1, body)
    return torch.cat([torch.tensor(start, dtype=torch.long).expand(len(rows), -1), rows], dim=1)


def _ids(tokenizer: Any, text: str) -> Int[Tensor, " n"]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None and hasattr(backend, "encode_batch_fast"):
        tokenizer("")  # takes back any truncation and padding that the tokenizer's file asks for
        # Twice as fast: it leaves out where in the text tokens stand.
        ids: list[int] = backend.encode_batch_fast([text], add_special_tokens=False)[0].ids
    else:
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.long)


def samples_of(
    tokenizer: Any, domain: str, parts: list[Part], seqlen: int, count: int, seed: int | None
) -> tuple[Int[Tensor, "n L"], list[str]]:
    """Windows of a domain to take `count` from, or all that there are if those are fewer; and in
    words, what of its text was of no use. Of long text pieces drawn by the seed are tokenized, or
    without one its beginning."""
    budget = max(SLICE, CHARACTERS * count * seqlen)
    while True:
        reading = Reading(seed, max(PIECE, MARGIN * CHARACTERS * seqlen))
        chosen, whole = choose(parts, budget, reading)
        texts = slices(chosen, partial(render, tokenizer, reading=reading))
        ids = [_ids(tokenizer, text) for text in texts]
        rows = _samples(tokenizer, torch.cat([torch.empty(0, dtype=torch.long), *ids]), seqlen)
        # The last tokens of a text that was cut off may be others than they are in the whole.
        if whole or len(rows) > count:
            return rows, reading.notes(domain)
        budget *= MARGIN


def choose_samples(
    tokenizer: Any, texts: Texts, count: int, seqlen: int, seed: int
) -> tuple[Int[Tensor, "n L"], list[str]]:
    """`count` samples, spread evenly over the domains and drawn at random inside each; and in
    words, what of the text was of no use.

    A domain too short for its share gives what it has (fewer samples come back then, as the words
    say). Raises CalibrationError if no domain holds even one sample.
    """
    generator = torch.Generator().manual_seed(seed)
    notes = list(texts.notes)
    chosen, found = [], {}
    each, more = divmod(count, len(texts.domains))
    # Not the first by name, where there are not enough for all.
    order = range(more) if each else torch.randperm(len(texts.domains), generator=generator)[:more]
    favoured = set(map(int, order))
    for i, (domain, parts) in enumerate(texts.domains.items()):
        share = each + (i in favoured)
        if not share:
            continue
        rows, unused = samples_of(tokenizer, domain, parts, seqlen, share, seed)
        picked = torch.randperm(len(rows), generator=generator)[:share]
        chosen.append(rows[picked.sort().values])
        found[domain] = (len(picked), share)
        notes += unused
    samples = torch.cat(chosen)
    if not len(samples):
        raise too_short(list(found), seqlen, notes)
    if left := len(texts.domains) - len(found):
        notes.append(f"text: {count} samples for {len(texts.domains)} domains, {left} gave none")
    return samples, notes + shortage(found, seqlen)


def too_short(domains: list[str], seqlen: int, notes: list[str]) -> CalibrationError:
    """No domain holds a sample."""
    more = "".join(f"; {note}" for note in notes)
    return CalibrationError(
        f"the text is empty or shorter than one sample of {seqlen} tokens (domains: "
        f"{', '.join(domains)}); give more text or a smaller sample{more}"
    )


def shortage(found: dict[str, tuple[int, int]], seqlen: int) -> list[str]:
    """In words, which domains gave fewer samples than they were to give. found: both numbers."""
    short = [f"{d} {n} of {share}" for d, (n, share) in found.items() if n < share]
    if not short:
        return []
    total, asked = (sum(numbers) for numbers in zip(*found.values(), strict=True))
    more = f" and {len(short) - 8} more" if len(short) > 8 else ""
    return [
        f"text: {asked} samples of {seqlen} tokens were asked for, {total} found: "
        f"{', '.join(short[:8])}{more}; give more text, or ask for fewer or shorter samples"
    ]


def fingerprint(samples: Int[Tensor, "n L"]) -> str:
    """SHA-256 of the token ids, to say which text a result was calibrated on."""
    return hashlib.sha256(samples.numpy().tobytes()).hexdigest()
