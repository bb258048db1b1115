"""The planned model against the uniform one of the same bytes, on text that neither has seen."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qmoe.calibration.text import load_texts
from qmoe.checkpoint.model_folder import ModelFolder
from qmoe.measure.logits import make_batches, resident, streamed
from qmoe.measure.scores import Batches, score
from qmoe.measure.tails import percentiles, pooled
from qmoe.model.source import open_source
from qmoe.packed.load import load

BATCH = 8  # samples at once


@dataclass(frozen=True)
class GuardText:
    """text: as in `load_texts`. seqlen: tokens in a sample. samples: of each domain."""

    text: str | list[str] = "heldout"
    seqlen: int = 256
    samples: int = 16


def batches_of(folder: ModelFolder, given: GuardText) -> tuple[Batches, list[str]]:
    """The text in batches, and in words what of it is not as asked for. Raises a QmoeError for text
    that cannot be read, or is too short."""
    tokenizer, texts = folder.tokenizer(folder.config()), load_texts(given.text)
    return make_batches(tokenizer, texts, samples=given.samples, seqlen=given.seqlen, batch=BATCH)


@torch.no_grad()
def divergences(
    original: ModelFolder, folders: dict[str, Path], given: GuardText
) -> dict[str, dict[str, float]]:
    """KL of each folder's predictions to the original's, nats per token, by domain of the text,
    "overall", their mean, and "p99", which 99 % of the tokens do not exceed. All models run in
    float32; the original is streamed."""
    batches, _ = batches_of(original, given)
    trust = original.trust_remote_code
    models: dict[str, Any] = {
        name: load(path, torch.float32, progress=False, trust_remote_code=trust)[0]
        for name, path in folders.items()
    }
    source = open_source(original, torch.float32)
    logits = {name: resident(model, batches) for name, model in models.items()}
    found = score(batches, streamed(source, batches, torch.float32), logits, torch.float32)
    by_domain = {
        name: {domain: each.summary()["kl"] for domain, each in found[name].items()}
        for name in folders
    }
    return {
        name: kl
        | {"overall": sum(kl.values()) / len(kl), "p99": percentiles(pooled(found[name]))["p99"]}
        for name, kl in by_domain.items()
    }


def better(kl: dict[str, dict[str, float]]) -> str:
    """Which of "planned" and "uniform" is to be written: the planned one where both its mean and
    its 99th percentile are no worse, or where there is no other."""
    planned, rival = kl["planned"], kl.get("uniform")
    worse = rival is not None and any(planned[key] > rival[key] for key in ("overall", "p99"))
    return "uniform" if worse else "planned"
