"""`quantize`: the whole way from a model folder to a quantized one."""

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from qmoe.config import QuantConfig, expect
from qmoe.pipeline.distill import distill
from qmoe.pipeline.finish import finish
from qmoe.pipeline.layers import load_outside, outside_layers, quantize_layers
from qmoe.pipeline.lm_head import collecting_lm_head
from qmoe.pipeline.output import DISTILLED, OutputFolder
from qmoe.pipeline.plan import MATRICES, STATISTICS, Plan, check
from qmoe.pipeline.self_text import calibration_text
from qmoe.system import distributed
from qmoe.system.progress import shown
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
    how: dict[str, Any] = {"device": device, "trust_remote_code": trust_remote_code}
    how["max_memory"] = None if max_memory is None else parse_size("max_memory", max_memory)
    given: dict[str, Any] = {"statistics_from": statistics_from, "save_statistics": save_statistics}
    with shown(progress):
        plan = check(src, Path(os.path.expanduser(dst)), config or QuantConfig(), **given, **how)
        return _carry_out(plan, partial(quantize, progress=False, **how))


def run(
    src: Path, dst: Path, config: QuantConfig, text: Iterable[Any] | None, **how: Any
) -> dict[str, Any]:
    """`quantize` on text that is in memory (calibration/given.py), None for the text that the
    config names. how: device, max_memory in bytes, trust_remote_code."""
    plan = check(src, dst, config, text=text, statistics_from=(), save_statistics=None, **how)
    return _carry_out(plan, partial(quantize, progress=False, **how))


def run_again(
    src: str | Path, dst: Path, config: QuantConfig, measured: Path, **how: Any
) -> dict[str, Any]:
    """`quantize` on the statistics and the solved matrices that a measuring pass kept in a folder
    (budget/measure.py). how: device, max_memory in bytes, trust_remote_code."""
    statistics, kept = [measured / STATISTICS], measured / MATRICES
    plan = check(src, dst, config, statistics_from=statistics, save_statistics=None, **how)
    return _carry_out(replace(plan, kept_matrices=kept), partial(quantize, progress=False, **how))


def _carry_out(plan: Plan, quantize_copy: Callable[..., Any]) -> dict[str, Any]:
    """The report of a run that was checked. quantize_copy: makes a smaller model to write text."""
    with OutputFolder(plan.dst, plan.shards, plan.fingerprint(), plan.save_statistics) as out:
        text = calibration_text(plan, out, quantize_copy)
        changed = load_outside(plan)
        if not (out.path / DISTILLED).exists():
            with collecting_lm_head(plan, text) as lm_head:
                for shard in quantize_layers(plan, text, out):
                    out.write_shard(shard)
                    del shard  # or its tensors would be in memory beside the next layer
            out.write_shard(outside_layers(plan, changed, lm_head))
        distilled = distill(plan, text, out) if plan.config.distill else {}
        report = finish(plan, text, out, distilled) if out.leads else {}
    return distributed.broadcast(report)
