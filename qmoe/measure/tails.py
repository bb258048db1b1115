"""What a mean hides: the tokens where a quantized model is furthest from the original, and the
tokens on which a conversation turns, such as the end of the text or `</think>`."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from qmoe.errors import ConfigError
from qmoe.measure.scores import Batches, Score

WORST = 3  # tokens that are shown
CONTEXT = 16  # tokens before each of them
LIKELY = 0.01  # a decision is looked at where the original gives its token this probability
MANY = 64  # decision tokens at most
ASKED = re.compile(r"think|reason|tool|call|function|end|eot|eos|im_|turn|channel|return|message")


@dataclass(frozen=True)
class Decisions:
    """Tokens on which a conversation turns: ids [D], and what each is called."""

    ids: Int[Tensor, " D"]
    names: Sequence[str]


def decision_tokens(tokenizer: Any, rows: int, more: Sequence[str] = ()) -> Decisions:
    """The end of the text, and added tokens that the chat template names or that are called like
    one that ends or opens a thought, a call or a turn, if the model has them: rows is the number of
    tokens that it predicts. more: others, each of which must be one of its tokens; ConfigError if
    it is not."""
    found: dict[int, str] = {}
    ends = tokenizer.eos_token_id
    for token in ends if isinstance(ends, list) else [ends]:
        if token is not None:
            found[int(token)] = tokenizer.convert_ids_to_tokens(int(token))
    template = str(getattr(tokenizer, "chat_template", None) or "")
    for token, added in getattr(tokenizer, "added_tokens_decoder", {}).items():
        name = str(added.content)
        asked = name in template or ASKED.search(name.lower())
        if asked and len(found) < MANY:
            found[int(token)] = name
    for name in more:
        ids = tokenizer(name, add_special_tokens=False)["input_ids"]
        if len(ids) != 1 or ids[0] >= rows:
            raise ConfigError(
                f"decision tokens: expected one token of the model, {name!r} is {ids} by its "
                "tokenizer"
            )
        found[int(ids[0])] = name
    known = sorted(token for token in found if token < rows)
    return Decisions(torch.tensor(known, dtype=torch.long), [found[i] for i in known])


def tails(
    batches: Batches, scores: dict[str, dict[str, Score]], tokenizer: Any
) -> dict[str, dict[str, Any]]:
    """Of every model but the original: the 95th and 99th percentile and the maximum of KL over
    tokens, by domain and over "all" of them; and the worst tokens with what stood before them."""
    return {
        name: {
            "kl": {domain: percentiles(torch.cat(s.kls)) for domain, s in domains.items()}
            | {"all": percentiles(pooled(domains))},
            "worst": _worst(batches, domains, tokenizer),
        }
        for name, domains in scores.items()
        if name != "original"
    }


def pooled(domains: dict[str, Score]) -> Float[Tensor, " T"]:
    """KL of every token of all domains."""
    return torch.cat([kl for score in domains.values() for kl in score.kls])


def percentiles(kl: Float[Tensor, " T"]) -> dict[str, float]:
    """The smallest KL that 95 %, 99 % or all of the tokens do not exceed."""
    ordered = kl.sort().values
    last = len(ordered) - 1
    at = {"p95": 0.95, "p99": 0.99, "max": 1.0}
    return {name: float(ordered[round(share * last)]) for name, share in at.items()}


def _worst(batches: Batches, domains: dict[str, Score], tokenizer: Any) -> list[dict[str, Any]]:
    """The tokens of the largest KL, each with its context and both models' probability of it."""
    flat, where = [], []
    taken = dict.fromkeys(domains, 0)
    for domain, ids in batches:
        kl = domains[domain].kls[taken[domain]].view(len(ids), -1)
        taken[domain] += 1
        value, place = kl.flatten().topk(min(WORST, kl.numel()))
        for v, p in zip(value.tolist(), place.tolist(), strict=True):
            row, position = divmod(p, kl.shape[1])
            flat.append(v)
            where.append((domain, ids[row], position))
    order = sorted(range(len(flat)), key=lambda i: -flat[i])[:WORST]
    return [_told(flat[i], *where[i], tokenizer) for i in order]


def _told(kl: float, domain: str, ids: Tensor, position: int, tokenizer: Any) -> dict[str, Any]:
    before = ids[max(0, position + 1 - CONTEXT) : position + 1]
    return {
        "kl": kl,
        "domain": domain,
        "context": tokenizer.decode(before),
        "token": tokenizer.decode(ids[position + 1 : position + 2]),
    }


def decided(
    decisions: Decisions, scores: Sequence[dict[str, dict[str, Score]]]
) -> dict[str, dict[str, dict[str, float]]]:
    """Of every model but the original, by decision token, at the places where the original gives it
    a probability of at least LIKELY: how many there are, the mean probability by the original and
    by the model, and the mean KL. Tokens without such a place are left out. scores: of one or more
    texts, with a reference."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name in scores[0]:
        if name == "original":
            continue
        theirs = torch.cat([_all(each["original"], "decided") for each in scores]).exp()
        ours = torch.cat([_all(each[name], "decided") for each in scores]).exp()
        kl = torch.cat([_all(each[name], "kls") for each in scores])
        found[name] = {}
        for i, token in enumerate(decisions.names):
            there = theirs[:, i] >= LIKELY
            if there.any():
                found[name][token] = {
                    "places": int(there.sum()),
                    "original": float(theirs[there, i].mean()),
                    "probability": float(ours[there, i].mean()),
                    "kl": float(kl[there].mean()),
                }
    return found


def _all(domains: dict[str, Score], what: str) -> Tensor:
    return torch.cat([part for score in domains.values() for part in getattr(score, what)])
