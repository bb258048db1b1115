"""`quantize_model`: a model that is loaded already, by way of a temporary folder.

The pipeline reads a model one layer at a time, in the names and the layout of its family on disk,
and proves what it wrote by reading it again. So the model is saved first. What that takes on disk,
the model and its quantized copy, is said before it is written; the original's copy is removed as
soon as the run has ended, and the quantized one together with the model that is returned.
"""

import os
import shutil
import weakref
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from tempfile import gettempdir, mkdtemp
from typing import Any

import torch
from torch import nn

from qmoe.config import QuantConfig, expect
from qmoe.errors import ConfigError, OutputError
from qmoe.packed.load import load
from qmoe.pipeline.quantize import run
from qmoe.system.progress import shown
from qmoe.system.sizes import format_size, parse_size

COPIES = 1.5  # of the model's bytes on disk: itself and what is made of it


@torch.no_grad()
def quantize_model(
    model: Any,
    tokenizer: Any,
    text: Iterable[Any] | None = None,
    config: QuantConfig | None = None,
    *,
    device: str | torch.device = "cpu",
    max_memory: str | int | None = None,
    work: str | Path | None = None,
    progress: bool = True,
) -> Any:
    """Quantize a transformers model that is in memory; returns a packed model on `device`, whose
    `save_pretrained` writes the folder that `quantize` would.

    model: of a class of transformers, in 16 or 32 bits, on any device. It is not changed.
    tokenizer: the model's.
    text: texts, conversations (lists of messages, which go through the chat template), rows of a
        data set, or batches of token ids (a DataLoader): see calibration/given.py. None takes the
        text that `config` names.
    config, device, max_memory, progress: as in `quantize`.
    work: a folder on a disk with room for one and a half times the model, in which a temporary
        folder is made; None is the system's (TMPDIR).

    Raises ConfigError for a model that is quantized, incomplete or carries an adapter, OutputError
    if the disk has too little room, and what `quantize` and `load` raise.
    """
    expect("config", config, QuantConfig, type(None))
    expect("work", work, str, Path, type(None))
    _check_model(model)
    memory = None if max_memory is None else parse_size("max_memory", max_memory)
    trust = type(model).is_custom_code()
    config = config or QuantConfig()
    if text is not None:
        config = replace(config, calibration=replace(config.calibration, text="given"))
    with ExitStack() as stack, shown(progress):
        folder = _temporary(model, work)
        remove = stack.callback(shutil.rmtree, folder, ignore_errors=True)
        source, made = folder / "source", folder / "quantized"
        model.save_pretrained(source)
        if tokenizer is not None:
            tokenizer.save_pretrained(source)
        run(source, made, config, text, device=device, max_memory=memory, trust_remote_code=trust)
        shutil.rmtree(source)
        packed, _ = load(made, device=device, progress=progress, trust_remote_code=trust)
        stack.pop_all()
    weakref.finalize(packed, remove, folder, ignore_errors=True)
    return packed


def _check_model(model: Any) -> None:
    if not (isinstance(model, nn.Module) and hasattr(model, "save_pretrained")):
        raise ConfigError(
            f"model: expected a model of transformers, got {type(model).__name__}; for a folder or "
            "a hub name there is qmoe.quantize"
        )
    if getattr(model, "is_quantized", False) or getattr(model, "hf_quantizer", None) is not None:
        raise ConfigError("model: is quantized already; give the original in 16 or 32 bits")
    if hasattr(model, "peft_config"):
        raise ConfigError("model: carries an adapter; merge it first (peft: merge_and_unload)")
    if any(p.is_meta for p in model.parameters()):
        raise ConfigError(
            "model: some of its weights are not in memory; load it without offloading"
        )


def _temporary(model: nn.Module, work: str | Path | None) -> Path:
    """A new folder with room for the model and what is made of it."""
    where = Path(gettempdir() if work is None else os.path.expanduser(work))
    if not where.is_dir():
        raise OutputError(f"work: {where} is no folder")
    needed = int(COPIES * sum(p.nbytes for p in model.parameters()))
    free = shutil.disk_usage(where).free
    if free < needed:
        raise OutputError(
            f"work: {where} has {format_size(free)} free, the model and its quantized copy take "
            f"about {format_size(needed)}; name a folder on another disk with work="
        )
    return Path(mkdtemp(prefix="qmoe-", dir=where))
