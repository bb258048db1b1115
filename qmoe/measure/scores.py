"""Scores of logits: perplexity, KL divergence to the original and top-1 agreement, by domain.

Every model is an iterator over the logits of the same batches. Metrics are computed in float32 from
logits in whatever dtype the model gives.
"""

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from qmoe.errors import CalibrationError
from qmoe.system.progress import progress

Batches = list[tuple[str, Int[Tensor, "_ _"]]]
Logits = Iterator[Float[Tensor, "_ _ _"]]


@dataclass
class Score:
    """Sums over the predicted tokens of one domain, and the mean loss of each of its samples. kls,
    decided: of each batch, the KL of every token [T], and log-probabilities of the watched tokens
    there [T, D], on the CPU."""

    tokens: int = 0
    loss: float = 0.0
    kl: float = 0.0
    agree: float = 0.0
    samples: list[float] = field(default_factory=list)
    kls: list[Tensor] = field(default_factory=list)
    decided: list[Tensor] = field(default_factory=list)

    def summary(self) -> dict[str, float]:
        """Perplexity and its logarithm, KL to the original in nats per token, share of equal top-1
        tokens."""
        n = max(self.tokens, 1)
        return {
            "perplexity": perplexity(self.loss / n),
            "loss": self.loss / n,
            "kl": self.kl / n,
            "agreement": self.agree / n,
        }


def perplexity(loss: float) -> float:
    """Of a mean loss in nats per token; infinite where no float is as large."""
    return math.exp(loss) if loss < math.log(sys.float_info.max) else math.inf


def score(
    batches: Batches,
    reference: Logits | None,
    models: dict[str, Logits],
    dtype: torch.dtype | None = None,
    watched: Int[Tensor, " D"] | None = None,
) -> dict[str, dict[str, Score]]:
    """Score by model and domain; the reference, if there is one, is scored as "original". dtype:
    what the models run in, if not that of their logits. watched: tokens whose probability is kept
    at every place. CalibrationError if a model has no
    predictions there: a token without numbers has no score, and is never one that agrees."""
    named = ({"original": reference} if reference is not None else {}) | models
    scores: dict[str, dict[str, Score]] = {
        name: {domain: Score() for domain, _ in batches} for name in named
    }
    for domain, ids in progress(batches, "evaluating"):
        base: Tensor | None = None
        for name, logits in named.items():
            given = next(logits)[:, :-1]
            _check_numbers(given, f"{name}: {domain}", dtype or given.dtype)
            log_p = given.float().log_softmax(-1)
            if name == "original" and reference is not None:
                base = log_p
            _add(scores[name][domain], log_p, ids[:, 1:], base)
            if watched is not None:
                scores[name][domain].decided.append(log_p[..., watched].flatten(0, 1).cpu())
    return scores


def _check_numbers(logits: Tensor, what: str, dtype: torch.dtype) -> None:
    """Words that can never come may have -inf; a token where any has NaN or inf, or all have -inf,
    has no prediction."""
    best = logits.amax(-1)  # NaN if any is
    lost = int((~best.isfinite()).sum())
    if not lost:
        return
    remedy = {
        torch.float16: f"the model overflows in {dtype}; use bfloat16 or float32 (--dtype)",
        torch.bfloat16: f"the model overflows in {dtype}; use float32 (--dtype)",
    }.get(dtype, f"no dtype is wider than {dtype}, so its weights are at fault")
    raise CalibrationError(
        f"{what}: {lost} of {best.numel()} tokens have no prediction, their logits are NaN or Inf: "
        + remedy
    )


def _add(total: Score, log_p: Tensor, target: Tensor, base: Tensor | None) -> None:
    loss = -log_p.gather(-1, target[..., None])[..., 0].double()
    total.tokens += target.numel()
    total.loss += float(loss.sum())
    total.samples += loss.mean(1).tolist()
    if base is not None:
        p = base.exp()
        each = torch.where(p > 0, p * (base - log_p), 0)  # a word that cannot come costs nothing
        kl = each.sum(-1)
        total.kl += float(kl.double().sum())
        total.kls.append(kl.flatten().cpu())
        total.agree += float((base.argmax(-1) == log_p.argmax(-1)).sum())


def summaries(
    scores: dict[str, dict[str, Score]], with_reference: bool
) -> dict[str, dict[str, dict[str, float]]]:
    """{model: {domain: {perplexity, loss, kl, agreement}}}, the first two without a reference."""
    keys = ["perplexity", "loss", *(["kl", "agreement"] if with_reference else [])]
    return {
        name: {d: {k: s.summary()[k] for k in keys} for d, s in domains.items()}
        for name, domains in scores.items()
    }


def not_better(ours: dict[str, Score], rival: dict[str, Score], name: str) -> list[str]:
    """In words, every domain where our perplexity is not below the rival's, and whether the
    difference stands out from its noise (paired over samples, two standard errors)."""
    notes = []
    for domain, mine in ours.items():
        gaps = torch.tensor(mine.samples) - torch.tensor(rival[domain].samples)
        gap, n = float(gaps.mean()), len(gaps)
        if gap < 0:
            continue
        if not math.isfinite(gap):
            notes.append(f"{domain}: perplexity is not below that of {name}; its loss is infinite")
            continue
        error = float(gaps.std()) / n**0.5 if n > 1 else math.inf
        verdict = "more than noise" if gap > 2 * error else "within noise"
        ratio = relative(mine.summary()["kl"], rival[domain].summary()["kl"])
        if ratio is not None:
            verdict += f"; its KL to the original is {ratio:.2f} of {name}'s"
        notes.append(
            f"{domain}: perplexity is not below that of {name}; loss per token differs by "
            f"{gap:.5f} +- {error:.5f} over {n} samples, {verdict}"
        )
    return notes


def relative(kl: float, to: float) -> float | None:
    """One KL as a share of another; None where that is no number."""
    return kl / to if to > 0 and math.isfinite(kl) and math.isfinite(to) else None


def overall(domains: dict[str, dict[str, float]]) -> dict[str, float]:
    """Over domains: geometric mean of perplexities, plain mean of the rest."""
    out = {}
    for key in next(iter(domains.values())):
        values = [d["loss" if key == "perplexity" else key] for d in domains.values()]
        mean = sum(values) / len(values)
        out[key] = perplexity(mean) if key == "perplexity" else mean
    return out
