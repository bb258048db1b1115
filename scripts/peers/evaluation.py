"""One evaluation for every method's result: per token, in float32, against the original.

The original's log-probabilities and routes on the test samples are computed once and kept on disk,
a batch a file. Of a result are kept, per predicted token, its divergence, its loss, and whether
both models rank the same token first, so that any mean can be taken later: over a domain, or over
the tokens that a rare expert saw.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer

from qmoe.calibration.text import load_texts
from qmoe.checkpoint.model_folder import ModelFolder
from qmoe.measure.baselines import original
from qmoe.measure.logits import make_batches
from qmoe.measure.scores import Batches
from qmoe.model.structure import find
from qmoe.packed.load import load

WINDOWS, WINDOW, BATCH = 64, 256, 16  # samples of each domain, tokens in one, samples at once


@cache
def test_batches(model: Path, corpus: Path) -> Batches:
    """The first samples of every domain's test text, domains in order of their names."""
    texts = load_texts(str(corpus / "*.test.txt"))
    tokenizer = AutoTokenizer.from_pretrained(model)
    return make_batches(tokenizer, texts, samples=WINDOWS, seqlen=WINDOW, batch=BATCH)[0]


@contextmanager
def routes_of(model: Any) -> Iterator[list[Tensor]]:
    """A list that a forward pass fills with each MoE layer's chosen experts [T, A], int16."""
    seen: list[Tensor] = []

    def note(module: Any, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        chosen = named["top_k_index"] if "top_k_index" in named else args[1]
        seen.append(chosen.to(torch.int16).cpu())

    names = [name for layer in find(model).layers for name in layer.experts]
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(note, with_kwargs=True)
        for name in names
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def run(model: Any, batches: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Of every batch the log-probabilities [B, L-1, V] and the routes [layers, B*L, A]."""
    with routes_of(model) as seen:
        for ids in batches:
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
            yield logits.log_softmax(-1), torch.stack(seen)
            seen.clear()


def open_result(folder: Path) -> Any:
    """A result as a model in float32: packed by qmoe.load if it is one of ours."""
    if (folder / "qmoe_report.json").is_file():
        return load(folder, torch.float32)[0]
    return original(ModelFolder(folder), torch.float32)


def make_reference(model: Path, batches: Batches, folder: Path) -> None:
    """Compute what `score` compares with, once; files that are there already are kept."""
    done = folder / "done"
    if done.is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    found = run(original(ModelFolder(model), torch.float32), [ids for _, ids in batches])
    for i, (log_p, routes) in enumerate(found):
        save_file({"log_p": log_p.contiguous(), "routes": routes}, _batch(folder, i))
    done.touch()


def _batch(folder: Path, i: int) -> Path:
    return folder / f"{i:03}.safetensors"


def score(result: Path, batches: Batches, reference: Path) -> dict[str, Tensor]:
    """Per predicted token kl [N] in nats, loss [N], agree [N]; kept [layers], the share of the
    original's experts that the result picks too. N runs over batches, samples, positions."""
    columns: dict[str, list[Tensor]] = {"kl": [], "loss": [], "agree": [], "kept": []}
    found = run(open_result(result), [ids for _, ids in batches])
    for i, (log_q, routes) in enumerate(found):
        base = load_file(_batch(reference, i))
        log_p, ids = base["log_p"], batches[i][1]
        columns["kl"].append((log_p.exp() * (log_p - log_q)).sum(-1).flatten())
        loss = -log_q.gather(-1, ids[:, 1:, None])[..., 0]
        columns["loss"].append(loss.flatten())
        columns["agree"].append((log_p.argmax(-1) == log_q.argmax(-1)).flatten())
        columns["kept"].append(_kept(base["routes"], routes))
    kept = torch.stack(columns.pop("kept")).mean(0)
    return {name: torch.cat(parts) for name, parts in columns.items()} | {"kept": kept}


def _kept(before: Tensor, after: Tensor) -> Tensor:
    """Share of the experts in `before` [layers, T, A] that are in `after` too, per layer."""
    return (before[..., :, None] == after[..., None, :]).any(-1).double().mean((1, 2))


def expert_counts(model: Path, tokens: Tensor) -> Tensor:
    """How many of these tokens [n, L] the original sends to each expert [layers, E]."""
    loaded = original(ModelFolder(model), torch.float32)
    experts = loaded.get_submodule(find(loaded).layers[0].experts[0]).num_experts
    counts: Tensor | int = 0
    for _, routes in run(loaded, list(tokens.split(BATCH))):
        counts = counts + torch.stack([r.flatten().long().bincount(minlength=experts)
                                       for r in routes])  # fmt: skip
    assert isinstance(counts, Tensor)
    return counts


def rare_tokens(reference: Path, batches: Batches, rare: Tensor) -> Tensor:
    """Which predicted tokens [N] were at a position the original sent, in any layer, to an expert
    that is `rare` [layers, E]."""
    found = []
    for i, (_, ids) in enumerate(batches):
        routes = load_file(_batch(reference, i))["routes"].long()
        layers = torch.arange(len(routes))[:, None, None]
        hit = rare[layers, routes].any(-1).any(0)
        found.append(hit.view(ids.shape)[:, :-1].flatten())
    return torch.cat(found)
