"""`evaluate`: how far a quantized model is from the original, beside its baselines."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from qmoe.calibration.text import load_texts
from qmoe.checkpoint.model_folder import ModelFolder
from qmoe.checkpoint.tokenizer import check_vocabulary
from qmoe.errors import ConfigError
from qmoe.measure.baselines import (
    bytes_on_disk,
    check_baselines,
    check_counts,
    nf4,
    rounded_to_nearest,
)
from qmoe.measure.compare import check_same_model
from qmoe.measure.extras import Extras, with_whole_original
from qmoe.measure.logits import make_batches, resident, streamed
from qmoe.measure.routes import Routes, experts_used, kept, recorded
from qmoe.measure.scores import Batches, Score, not_better, overall, score, summaries
from qmoe.measure.tails import Decisions, decided, decision_tokens, tails
from qmoe.model.source import Source, open_source
from qmoe.packed.load import Loading
from qmoe.packed.skeleton import open_packed
from qmoe.pipeline.checks import check_seqlen
from qmoe.prediction.acceptance import of_models, watched
from qmoe.prediction.attach import add_prediction, prediction_of

IN_FLOAT32 = Loading(torch.float32)
NOTHING_MORE = Extras()


def evaluate(
    path: str | Path,
    *,
    against: str | Path | None = None,
    baselines: Sequence[str] = (),
    text: str | Sequence[str] = "heldout",
    samples: int = 16,
    seqlen: int = 256,
    batch: int = 8,
    loading: Loading = IN_FLOAT32,
    extras: Extras = NOTHING_MORE,
) -> dict[str, Any]:
    """Perplexity by domain of a quantized folder; with `against`, also KL and top-1 agreement.

    text: see qmoe.calibration.text.load_texts. The first `samples` samples of every domain are
    scored. loading: how the quantized models are; its dtype is that of all models alike: float32
    shows what the weights lost and nothing else, None, the checkpoint's own, how they run. The
    original is streamed on the CPU, so it may be larger than memory. extras: what is done besides.
    Raises CalibrationError if a model has no predictions in that dtype.
    Returns scores by model and domain, their means over domains ("overall"), bytes on disk, and
    in words what of the text was not as asked for ("fallbacks") and where the quantized model is
    not better than a baseline ("not_better"). With `against` also the largest KL of single tokens
    ("tails") and decision tokens ("decisions"), both by model (tails.py). With `extras.routing`,
    also the tokens of each expert in the quantized model by domain and experts module
    ("experts_used"), and with `against` the share of the original's choices of experts that it
    makes too ("routing_kept"). "tasks" and "answers" are by model, too. With a quantized layer that
    predicts tokens beyond the next: the share of its drafts that are accepted, by model and domain
    ("acceptance", prediction/acceptance.py).
    """
    check_baselines(baselines, against)
    check_counts(samples=samples, batch=batch)
    if seqlen < 2:
        raise ConfigError(f"seqlen: expected at least 2 tokens, got {seqlen}")
    tasks = extras.check(against)
    folder = ModelFolder.find(path, loading.trust_remote_code)
    config = folder.config()
    check_seqlen(config, seqlen)
    other = None if against is None else ModelFolder.find(against, loading.trust_remote_code)
    if other is not None:
        check_same_model(folder.path, other)
    tokenizer = folder.tokenizer(config)
    rows = config.get_text_config().vocab_size
    decisions = decision_tokens(tokenizer, rows, extras.decision_tokens)
    texts = load_texts(text)
    batches, notes = make_batches(tokenizer, texts, samples=samples, seqlen=seqlen, batch=batch)
    check_vocabulary(config, torch.cat([ids for _, ids in batches]))
    models, disk = _models(folder.path, other, baselines, replace(loading, prediction=True))
    source = _original(other, models["qmoe"])
    notes += _not_drafting(folder, models["qmoe"])
    if source is not None:
        disk["original"] = source.checkpoint.nbytes()
    found, more = _scored(models, source, batches, decisions, extras.routing)
    scores = summaries(found, with_reference=source is not None)
    whole, answered = with_whole_original(extras, tasks, models, other, tokenizer, decisions, batch)
    if source is not None:
        more["tails"] = tails(batches, found, tokenizer)
        more["decisions"] = decided(decisions, [found, *answered])
    said = [note for name in baselines for note in not_better(found["qmoe"], found[name], name)]
    means = {name: overall(domains) for name, domains in scores.items()}
    kept = {"scores": scores, "overall": means, "bytes_on_disk": disk, "fallbacks": notes}
    return kept | {"not_better": said} | more | whole


def _scored(
    models: dict[str, Any],
    source: Source | None,
    batches: Batches,
    decisions: Decisions,
    routing: bool,
) -> tuple[dict[str, dict[str, Score]], dict[str, Any]]:
    """Scores by model and domain, the original streamed beside the others; with `routing`, also
    what `evaluate` says of it."""
    ours = models["qmoe"]
    dtype = ours.config.dtype
    before: Routes = {}
    with ExitStack() as watching:
        after = watching.enter_context(recorded(ours)) if routing else {}
        if source is not None and routing:
            before = watching.enter_context(recorded(source.model))
        every = models | ({} if source is None else {"original": source.model})
        seen = {name: watching.enter_context(watched(model)) for name, model in every.items()}
        reference = None if source is None else streamed(source, batches, dtype)
        logits = {name: resident(model, batches) for name, model in models.items()}
        tokens = None if source is None else decisions.ids
        found = score(batches, reference, logits, dtype, tokens)
        if reference is not None:
            next(reference, None)  # the end, at which layers get their own forward back
    more: dict[str, Any] = {}
    if shares := of_models(models, source, seen, batches):
        more["acceptance"] = shares
    if routing:
        more["experts_used"] = experts_used(after, batches, ours)
        more["routing_kept"] = kept(before, after, ours)
    return found, more


def _original(folder: ModelFolder | None, ours: Any) -> Source | None:
    """The original, if it is given, with its prediction layer if the quantized model has one."""
    if folder is None:
        return None
    add = None if prediction_of(ours) is None else add_prediction
    return open_source(folder, ours.config.dtype, add)


def _not_drafting(folder: ModelFolder, ours: Any) -> list[str]:
    """In words, why nothing is said of drafts, if the folder has layers that make some."""
    if prediction_of(ours) is not None:
        return []
    carried = open_packed(folder).weights.carried
    why = "the layer that predicts tokens beyond the next is not quantized"
    return [f"acceptance of drafts is not measured: {why} ({carried[0]})"] if carried else []


def _models(
    folder: Path, against: ModelFolder | None, baselines: Sequence[str], loading: Loading
) -> tuple[dict[str, Any], dict[str, int]]:
    """The quantized model and its baselines by name, and their bytes on disk."""
    models: dict[str, Any] = {}
    disk = {"qmoe": bytes_on_disk(folder)}
    if "rtn" in baselines:
        assert against is not None
        with rounded_to_nearest(folder, against) as twin:
            models["rtn"], disk["rtn"] = loading(twin.path), bytes_on_disk(twin.path)
    ours = loading(folder)
    if "nf4" in baselines:
        assert against is not None
        models["nf4"] = nf4(against, ours.config.dtype, loading.device)
    return models | {"qmoe": ours}, disk
