"""`quantize`: the whole way from a model folder to a quantized one."""

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers

from qmoe._version import __version__
from qmoe.calibration.batches import fingerprint
from qmoe.checkpoint.remote_code import code_digest
from qmoe.config import QuantConfig
from qmoe.errors import OutputError
from qmoe.model.source import Source
from qmoe.pipeline.checks import check_combination, prepare, rotated
from qmoe.pipeline.find_rotation import find_residual
from qmoe.pipeline.memory import check_fits, needed, spills
from qmoe.pipeline.output import OutputFolder, make_folder
from qmoe.pipeline.run import Run
from qmoe.pipeline.self_text import self_sampled
from qmoe.system import distributed
from qmoe.system.devices import find_device
from qmoe.system.lock import NAME
from qmoe.system.progress import Track, silent


@torch.no_grad()
def quantize(
    src: str | Path,
    dst: str | Path,
    config: QuantConfig,
    *,
    statistics_from: Sequence[str | Path] = (),
    save_statistics: str | Path | None = None,
    device: str | torch.device = "cpu",
    max_memory: int | None = None,
    track: Track = silent,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Quantize the MoE model in `src` (folder or hub name) into the new folder `dst`.

    statistics_from: folders written by `save_statistics` on the same model; they are summed and
    used instead of running text through the model. device: where layers are run and solved, one at
    a time, "cpu" or a GPU ("cuda", "cuda:1"; with several ranks "cuda" is a GPU for each); numbers
    differ in the last digits between kinds of device. max_memory: bytes of the machine's memory one
    process may take, None for what is free; activations that do not fit wait in files beside `dst`.
    trust_remote_code: code that lies beside the weights may run, where transformers has no class
    for the model. Returns the report, also written to `dst/qmoe_report.json`. Raises a QmoeError
    before any long work if something cannot work, and AuditError if the result is not what was
    promised; `dst` then does not exist. A run that was killed or interrupted leaves `dst.partial`;
    the same call goes on from there and writes the same bytes. In several processes
    (qmoe/system/distributed.py) each does its share.
    """
    dst = Path(os.path.expanduser(dst))
    given = [Path(p) for p in statistics_from]
    check_combination(config, given, save_statistics, dst)
    text = not given and config.method != "rtn"
    trust = trust_remote_code
    where = find_device(device)
    source, samples, notes, sha = prepare(src, dst, config, text=text, track=track, trust=trust)
    config = rotated(source, config)
    c = config.calibration
    tokens = samples.numel() + (c.self_samples * c.seqlen if text else 0)
    saved = None if save_statistics is None else Path(save_statistics)
    whole = bool(given) or saved is not None
    spill = spills(needed(source, config, tokens, whole), max_memory)
    check_fits(source, config, where)
    residual = find_residual(source) if config.rotate == "fused" else None
    if saved is not None:
        make_folder(saved)
    about = {"source": sha, "text": fingerprint(samples), "device": where.type}
    about |= {"statistics": f"from {[str(p) for p in given]} to {saved}"}
    about |= _settings(config, source)
    with OutputFolder(dst, len(source.structure.layers) + 1, about, saved) as out:
        if saved is not None and {p.name for p in saved.iterdir()} - {NAME} and not out.begun():
            raise OutputError(f"{saved}: is not empty; statistics of two runs must not mix")
        run = Run(source, residual, config, given, saved, out, spill, where)
        run.notes += notes
        if text and c.self_samples:
            copy = partial(quantize, device=where, max_memory=max_memory, trust_remote_code=trust)
            own, why = self_sampled(source, config, out, where, max_memory, trust, copy)
            run.self_samples, run.not_original = len(own), why
            samples = torch.cat([samples, own])
        run.all_shards(samples, track)
        report = run.finish(samples, track, trust) if out.leads else {}
    return distributed.broadcast(report)


def _settings(config: QuantConfig, source: Source) -> dict[str, str]:
    """What else a run that goes on must have in common with the one that was stopped."""
    return {name: str(value) for name, value in vars(config).items()} | {
        "code": code_digest(source.checkpoint.path),
        "versions": f"qmoe {__version__}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}",
    }
