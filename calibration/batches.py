"""Windows of token ids from text, the same for the same tokenizer, text and seed."""

import hashlib
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from qmoe.errors import CalibrationError


def tokenize(tokenizer: Any, text: str, window: int) -> Int[Tensor, "n L"]:
    """All whole windows of a text. Each starts with BOS if the tokenizer starts texts with it."""
    start = [i for i in tokenizer("")["input_ids"][:1] if i == tokenizer.bos_token_id]
    ids = _ids(tokenizer, text)
    body = window - len(start)
    rows = torch.tensor(ids[: len(ids) // body * body], dtype=torch.long).view(-1, body)
    return torch.cat([torch.tensor(start, dtype=torch.long).expand(len(rows), -1), rows], dim=1)


def _ids(tokenizer: Any, text: str) -> list[int]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None and hasattr(backend, "encode_batch_fast"):
        tokenizer("")  # takes back any truncation and padding that the tokenizer's file asks for
        # Twice as fast: it leaves out where in the text tokens stand.
        ids: list[int] = backend.encode_batch_fast([text], add_special_tokens=False)[0].ids
    else:
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def sample_windows(
    tokenizer: Any, texts: dict[str, str], count: int, window: int, seed: int
) -> Int[Tensor, "n L"]:
    """`count` windows, spread evenly over the domains and drawn at random inside each.

    A domain too short for its share gives what it has (fewer windows come back then). Raises
    CalibrationError if no domain holds even one window.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = []
    for i, text in enumerate(texts.values()):
        share = count // len(texts) + (i < count % len(texts))
        rows = tokenize(tokenizer, text, window)
        picked = torch.randperm(len(rows), generator=generator)[:share]
        chosen.append(rows[picked.sort().values])
    windows = torch.cat(chosen)
    if not len(windows):
        raise CalibrationError(
            f"the text is shorter than one window of {window} tokens (domains: "
            f"{', '.join(texts)}); give more text or a smaller window"
        )
    return windows


def fingerprint(windows: Int[Tensor, "n L"]) -> str:
    """SHA-256 of the token ids, to say which text a result was calibrated on."""
    return hashlib.sha256(windows.numpy().tobytes()).hexdigest()
