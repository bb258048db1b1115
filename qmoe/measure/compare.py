"""Several forms of one model side by side: its quantized folder, the original, RTN, NF4.

`evaluate` and `benchmark` are what `qmoe eval` and `qmoe bench` and the scripts call.
"""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from qmoe.calibration.text import load_texts
from qmoe.checkpoint.folders import read_json
from qmoe.checkpoint.model_folder import ModelFolder
from qmoe.checkpoint.tokenizer import check_vocabulary
from qmoe.config import QuantConfig
from qmoe.errors import ConfigError
from qmoe.measure.baselines import nf4, original
from qmoe.measure.bench import memory, speed
from qmoe.measure.evaluate import (
    Logits,
    make_batches,
    not_better,
    overall,
    resident,
    score,
    streamed,
    summaries,
)
from qmoe.model.source import open_source
from qmoe.packed.load import Loading
from qmoe.packed.modules import packed_stacks
from qmoe.packed.report import REPORT, read_report
from qmoe.pipeline.checks import check_seqlen
from qmoe.pipeline.quantize import quantize
from qmoe.system.progress import progress

BASELINES = ("rtn", "nf4")
IN_FLOAT32 = Loading(torch.float32)
AS_STORED = Loading()


@contextmanager
def rtn_twin(path: Path, against: ModelFolder) -> Iterator[ModelFolder]:
    """A temporary folder with the original rounded to nearest in the schemes of `path`, but for a
    rotation."""
    config = QuantConfig.from_dict(read_report(path)["config"]).rotated_by(0)
    config = replace(config, method="rtn", tune=0, rotate="off")
    with tempfile.TemporaryDirectory(prefix="qmoe-rtn-") as folder:
        rtn = Path(folder) / "rtn"
        trust = against.trust_remote_code
        quantize(against.path, rtn, config, trust_remote_code=trust)
        yield ModelFolder(rtn, trust)


def _check(baselines: Sequence[str], against: str | Path | None, **least_one: int) -> None:
    for name, value in least_one.items():
        if value < 1:
            raise ConfigError(f"{name}: expected at least 1, got {value}")
    unknown = [b for b in baselines if b not in BASELINES]
    if unknown:
        raise ConfigError(f"baseline: expected some of {BASELINES}, got {unknown[0]!r}")
    if baselines and against is None:
        raise ConfigError("baselines are made from the original model; give it with --against")


def check_same_model(folder: Path, against: ModelFolder) -> None:
    """Raises ConfigError unless config and weights are those `folder` was made from (without a
    report, the config alone). Reads all weights."""
    original_folder = against.path
    ours, theirs = read_json(folder / "config.json"), read_json(original_folder / "config.json")
    if theirs.get("quantization_config") is not None:
        raise ConfigError(f"{original_folder}: is quantized itself; give the original")
    for config in (ours, theirs, ours.get("text_config"), theirs.get("text_config")):
        # A fused rotation unties the head.
        for key in ("quantization_config", "tie_word_embeddings", "transformers_weights"):
            if isinstance(config, dict):
                config.pop(key, None)
    differing = sorted(k for k in set(ours) | set(theirs) if ours.get(k) != theirs.get(k))
    if differing:
        raise ConfigError(
            f"{original_folder}: is not the original of {folder}: {differing[0]} is "
            f"{theirs.get(differing[0])!r}, expected {ours.get(differing[0])!r}"
        )
    if not (folder / REPORT).is_file():
        return
    checkpoint = open_source(against, torch.float32).checkpoint
    if checkpoint.check_finite() != read_report(folder).get("source_sha256"):
        raise ConfigError(
            f"{original_folder}: is not the original of {folder}: same config, other weights"
        )


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
) -> dict[str, Any]:
    """Perplexity by domain of a quantized folder; with `against`, also KL and top-1 agreement.

    text: see qmoe.calibration.text.load_texts. The first `samples` samples of every domain are
    scored. loading: how the quantized models are; its dtype is that of all models alike: float32
    shows what the weights lost and nothing else, None, the checkpoint's own, how they run. The
    original is streamed on the CPU, so it may be larger than memory. Raises CalibrationError if a
    model has no predictions in that dtype.
    Returns scores by model and domain, their means over domains ("overall"), bytes on disk, and
    in words what of the text was not as asked for ("fallbacks") and where the quantized model is
    not better than a baseline ("not_better").
    """
    _check(baselines, against, samples=samples, batch=batch)
    if seqlen < 2:
        raise ConfigError(f"seqlen: expected at least 2 tokens, got {seqlen}")
    folder = ModelFolder.find(path, loading.trust_remote_code)
    config = folder.config()
    check_seqlen(config, seqlen)
    other = None if against is None else ModelFolder.find(against, loading.trust_remote_code)
    if other is not None:
        check_same_model(folder.path, other)
    tokenizer = folder.tokenizer(config)
    texts = load_texts(text)
    batches, notes = make_batches(tokenizer, texts, samples=samples, seqlen=seqlen, batch=batch)
    check_vocabulary(config, torch.cat([ids for _, ids in batches]))
    models, disk = _models(folder.path, other, baselines, loading)
    dtype = models["qmoe"].config.dtype
    reference: Logits | None = None
    if other is not None:
        source = open_source(other, dtype)
        disk["original"] = source.checkpoint.nbytes()
        reference = streamed(source, batches, dtype)
    logits = {name: resident(model, batches) for name, model in models.items()}
    found = score(batches, reference, logits, dtype)
    scores = summaries(found, with_reference=reference is not None)
    return {
        "scores": scores,
        "overall": {name: overall(domains) for name, domains in scores.items()},
        "bytes_on_disk": disk,
        "fallbacks": notes,
        "not_better": [
            note for name in baselines for note in not_better(found["qmoe"], found[name], name)
        ],
    }


def _models(
    folder: Path, against: ModelFolder | None, baselines: Sequence[str], loading: Loading
) -> tuple[dict[str, Any], dict[str, int]]:
    """The quantized model and its baselines by name, and their bytes on disk."""
    models: dict[str, Any] = {}
    disk = {"qmoe": _disk(folder)}
    if "rtn" in baselines:
        assert against is not None
        with rtn_twin(folder, against) as twin:
            models["rtn"], disk["rtn"] = loading(twin.path), _disk(twin.path)
    ours = loading(folder)
    if "nf4" in baselines:
        assert against is not None
        models["nf4"] = nf4(against, ours.config.dtype, loading.device)
    return models | {"qmoe": ours}, disk


def benchmark(
    path: str | Path,
    *,
    against: str | Path | None = None,
    baselines: Sequence[str] = (),
    prompt: int = 256,
    tokens: int = 32,
    repeats: int = 5,
    loading: Loading = AS_STORED,
) -> dict[str, dict[str, float]]:
    """Speed and memory of a quantized folder beside the original and baselines, by model name.

    See `speed` and `memory` in qmoe/measure/bench.py for the figures and their units. Resident and
    peak memory are those of a CPU process, so only measured there.
    """
    _check(baselines, against, prompt=prompt, tokens=tokens, repeats=repeats)
    folder = ModelFolder.find(path, loading.trust_remote_code)
    source = None if against is None else ModelFolder.find(against, loading.trust_remote_code)
    if source is not None:
        check_same_model(folder.path, source)
    models = {"qmoe": loading(folder.path)}
    measured = [("qmoe", "qmoe", folder)]
    used = {}
    with ExitStack() as stack:
        if source is not None:
            models["original"] = original(source).to(loading.device)
            measured.append(("original", "original", source))
            if "nf4" in baselines:
                models["nf4"] = nf4(source, device=loading.device)
                measured.append(("nf4", "nf4", source))
            if "rtn" in baselines:
                twin = stack.enter_context(rtn_twin(folder.path, source))
                models["rtn"] = loading(twin.path)
                measured.append(("rtn", "qmoe", twin))
        if loading.device == "cpu":
            for name, kind, at in progress(measured, "measuring memory"):
                used[name] = memory(kind, at)
    timed = speed(models, prompt=prompt, tokens=tokens, repeats=repeats)
    for name, figures in timed.items():
        figures["weights_in_memory"] = weights_in_memory(models[name])
        if name not in used:
            continue
        m = used[name]
        figures["resident_over_bare_process"] = m["loaded"] - m["without_model"]
        figures["peak_over_bare_process"] = m["peak"] - m["without_model"]
    timed["qmoe"]["bytes_on_disk"] = _disk(folder.path)
    return timed


def weights_in_memory(model: Any) -> int:
    """Bytes of all weights of a loaded model, packed or not; shared ones once."""
    total: dict[int, int] = {id(p): p.nbytes for p in model.parameters()}
    return sum(total.values()) + sum(int(stack.nbytes()) for _, stack in packed_stacks(model))


def _disk(folder: Path) -> int:
    return sum(f.stat().st_size for f in folder.glob("*.safetensors"))
