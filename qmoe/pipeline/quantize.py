"""`quantize`: the whole way from a model folder to a quantized one."""

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from qmoe.config import QuantConfig
from qmoe.pipeline.finish import finish
from qmoe.pipeline.layers import load_outside, outside_layers, quantize_layers
from qmoe.pipeline.lm_head import collecting_lm_head
from qmoe.pipeline.output import OutputFolder
from qmoe.pipeline.plan import check
from qmoe.pipeline.self_text import calibration_text
from qmoe.system import distributed


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
    plan = check(
        src,
        dst,
        config,
        statistics_from=statistics_from,
        save_statistics=save_statistics,
        device=device,
        max_memory=max_memory,
        trust_remote_code=trust_remote_code,
    )
    copy = partial(
        quantize, device=device, max_memory=max_memory, trust_remote_code=trust_remote_code
    )
    with OutputFolder(dst, plan.shards, plan.fingerprint(), plan.save_statistics) as out:
        text = calibration_text(plan, out, copy)
        changed = load_outside(plan)
        with collecting_lm_head(plan, text) as lm_head:
            for shard in quantize_layers(plan, text, out):
                out.write_shard(shard)
                del shard  # or its tensors would be in memory beside the next layer
        out.write_shard(outside_layers(plan, changed, lm_head))
        report = finish(plan, text, out) if out.leads else {}
    return distributed.broadcast(report)
