"""Greedy answers to a few prompts: how long they are beside the original's, and how much of them is
repetition. A model that never stops thinking shows here, and in no mean over text."""

from collections.abc import Sequence
from typing import Any

import torch

from qmoe.measure.scores import Batches
from qmoe.system.progress import progress

PROMPTS = (
    "What is the capital of France? Answer in one sentence.",
    "Explain in two sentences why the sky is blue.",
    "List three uses of a brick.",
    "If a train travels 60 miles in 45 minutes, what is its speed in miles per hour?",
)
TOKENS = 128  # of an answer at most
WORDS = 4  # tokens of what counts as said before


def prompts(tokenizer: Any) -> list[torch.Tensor]:
    """The prompts as token ids [1, L], by the chat template if the tokenizer has one."""
    found = []
    for text in PROMPTS:
        if getattr(tokenizer, "chat_template", None):
            talk = [{"role": "user", "content": text}]
            made = tokenizer.apply_chat_template(
                talk, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        else:
            made = tokenizer(text, return_tensors="pt")
        found.append(made["input_ids"])
    return found


@torch.no_grad()
def answers(model: Any, questions: Sequence[torch.Tensor], ends: set[int]) -> list[list[int]]:
    """The greedy answer to each prompt, as token ids, its end included if it came within TOKENS."""
    found = []
    for ids in progress(list(questions), "answering"):
        made = model.generate(
            ids.to(model.device),
            attention_mask=torch.ones_like(ids).to(model.device),
            max_new_tokens=TOKENS,
            do_sample=False,
            pad_token_id=next(iter(ends), 0),
            eos_token_id=sorted(ends) or None,
        )
        found.append(made[0, ids.shape[1] :].tolist())
    return found


def summary(
    mine: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]], ends: set[int]
) -> dict[str, float]:
    """Means over answers: tokens, the share that ended by themselves, the share of repetition; and
    the tokens that are the original's before the first that differs. theirs: the original's."""
    n = len(mine)
    return {
        "tokens": sum(map(len, mine)) / n,
        "ended": sum(bool(a) and a[-1] in ends for a in mine) / n,
        "repeated": sum(map(repeated, mine)) / n,
        "same": sum(_common(a, b) for a, b in zip(mine, theirs, strict=True)) / n,
    }


def repeated(answer: Sequence[int]) -> float:
    """The share of an answer's runs of WORDS tokens that it has had before; 0 for a shorter one."""
    runs = [tuple(answer[i : i + WORDS]) for i in range(len(answer) - WORDS + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    pairs = zip(a, b, strict=False)
    return next((i for i, (x, y) in enumerate(pairs) if x != y), min(len(a), len(b)))


def as_batches(questions: Sequence[torch.Tensor], given: Sequence[Sequence[int]]) -> Batches:
    """Prompts with their answers, one a batch, to be scored like any text."""
    return [
        ("answers", torch.cat([ids, torch.tensor([list(answer)], dtype=ids.dtype)], dim=1))
        for ids, answer in zip(questions, given, strict=True)
        if answer
    ]
