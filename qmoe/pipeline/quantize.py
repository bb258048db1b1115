"""`qmoe.quantize`: the whole way from a model folder to a quantized one."""

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
from qmoe.config import QuantConfig, expect
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
from qmoe.system.progress import Track, on_terminal, silent
from qmoe.system.sizes import parse_size


@torch.no_grad()
def quantize(
    src: str | Path,
    dst: str | Path,
    config: QuantConfig | None = None,
    *,
    statistics_from: Sequence[str | Path] = (),
    save_statistics: str | Path | None = None,
    device: str | torch.device = "cpu",
    max_memory: str | int | None = None,
    progress: bool = True,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Quantize the MoE model in `src` into the new folder `dst`.

    src: a model folder or a hub name.
    config: what to do; None is `QuantConfig()`, the preset "balanced".
    statistics_from: folders that `save_statistics` wrote for the same model. Their statistics are
        summed and replace running text through the model.
    save_statistics: a folder in which the statistics are kept.
    device: where layers are run and solved, one at a time: "cpu" or a GPU ("cuda", "cuda:1"; with
        several processes "cuda" is a GPU for each). Numbers differ in the last digits between
        kinds of device.
    max_memory: the machine's memory that one process may take, in bytes or as a size ("12GB"); None
        is what is free. Activations that do not fit wait in files beside `dst`.
    progress: show a bar on standard error, if that is a terminal.
    trust_remote_code: allow code that lies beside the weights to run, where transformers has no
        class for the model.

    Returns the report, which is also written to `dst/qmoe_report.json`. Raises a QmoeError before
    any long work if something cannot work, and AuditError if the result is not what was promised;
    `dst` then does not exist. A run that was killed or interrupted leaves `dst.partial`; the same
    call goes on from there and writes the same bytes. In several processes
    (qmoe/system/distributed.py) each does its share.
    """
    expect("dst", dst, str, Path)
    expect("config", config, QuantConfig, type(None))
    expect("save_statistics", save_statistics, str, Path, type(None))
    expect("statistics_from", statistics_from, list, tuple)
    for folder in statistics_from:
        expect("statistics_from", folder, str, Path)
    return _quantize(
        src,
        Path(os.path.expanduser(dst)),
        config or QuantConfig(),
        given=[Path(p) for p in statistics_from],
        saved=None if save_statistics is None else Path(save_statistics),
        where=find_device(device),
        allowed=None if max_memory is None else parse_size("max_memory", max_memory),
        track=on_terminal if progress else silent,
        trust=trust_remote_code,
    )


def _quantize(
    src: str | Path,
    dst: Path,
    config: QuantConfig,
    *,
    given: list[Path],
    saved: Path | None,
    where: torch.device,
    allowed: int | None,
    track: Track,
    trust: bool,
) -> dict[str, Any]:
    """The same with arguments that were read. given: saved statistics; allowed: bytes."""
    check_combination(config, given, saved, dst)
    text = not given and config.method != "rtn"
    source, samples, notes, sha = prepare(src, dst, config, text=text, track=track, trust=trust)
    config = rotated(source, config)
    c = config.calibration
    tokens = samples.numel() + (c.self_samples * c.seqlen if text else 0)
    whole = bool(given) or saved is not None
    spill = spills(needed(source, config, tokens, whole), allowed)
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
            copy = partial(
                _quantize,
                given=[],
                saved=None,
                where=where,
                allowed=allowed,
                track=silent,
                trust=trust,
            )
            own, why = self_sampled(source, config, out, where, allowed, trust, copy)
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
