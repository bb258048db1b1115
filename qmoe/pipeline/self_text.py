"""Calibration text that the model writes itself.

Text at hand is rarely all that a model is used for, and experts for other languages and domains see
none of it: calibrated on English essays alone, a model loses up to half more on German, French and
code. What a model samples from itself covers what it knows (MoEQuant's self-sampling, Hu et al.,
2025, arXiv 2505.03804, without its search; LLM-QAT, Liu et al., 2023, arXiv 2305.17888).

A whole model has to be in memory for it. Where the original does not fit, a copy with experts
rounded to 4 bits writes; where that does not either, or the family does not continue text, there is
no such text. The report says so.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Int
from safetensors import safe_open
from torch import Tensor

from qmoe.checkpoint.model_config import CONFIG_ERRORS, first_line
from qmoe.config import CHANNEL, CalibrationConfig, QuantConfig, Scheme
from qmoe.model.experts import expert_weights, rows
from qmoe.model.source import Source, open_source
from qmoe.packed.load import load
from qmoe.pipeline.output import COPY, SELF_TEXT, OutputFolder
from qmoe.pipeline.plan import Plan
from qmoe.system import distributed
from qmoe.system.devices import CPU, move_to
from qmoe.system.files import write_safetensors
from qmoe.system.host_memory import free
from qmoe.system.progress import shown
from qmoe.system.sizes import format_size

TEXTS = 2  # in a sample; longer ones take more steps and bring no more
ROWS = 128  # texts written at once
ROOM = 1.3  # times the model's bytes: its weights, caches of attention, activations
PER_WEIGHT = 0.6  # bytes per weight of experts in the copy, zero points and scales included

Way = Literal["original", "copy", "none"]
Quantize = Callable[[Path, Path, QuantConfig], Any]


@dataclass(frozen=True)
class CalibrationText:
    """samples: the text at hand, and behind it `self_samples` that the model wrote. fallback: in
    words, why the original did not write those, "" if it did or none were asked for."""

    samples: Int[Tensor, "n L"]
    self_samples: int = 0
    fallback: str = ""

    def batches(self, c: CalibrationConfig) -> list[Int[Tensor, "_ L"]]:
        """Those of this process."""
        return distributed.shard(self.samples.split(c.batch)) if len(self.samples) else []


def calibration_text(plan: Plan, out: OutputFolder, quantize: Quantize) -> CalibrationText:
    """All text that runs through the model. What the model writes is kept with the unfinished work,
    so that a run that goes on has the same, whatever memory it finds. Of several processes one
    writes. quantize: makes a quantized copy of a model folder in another."""
    asked = plan.config.calibration.self_samples
    if not len(plan.samples) or not asked:
        return CalibrationText(plan.samples)
    path = out.path / SELF_TEXT
    if not distributed.broadcast(path.exists()):
        way, why = distributed.broadcast(find_way(plan.source, plan.device, plan.max_memory))
        with shown(False):
            if way == "copy":
                _make_copy(plan.source.folder.path, out.path / COPY, plan.config, quantize)
            if out.leads:
                _write_to(path, plan, out.path / COPY, way, why)
        distributed.all_gather_object(0)  # the others wait until it is there
    with safe_open(path, framework="pt") as file:
        own, why = file.get_tensor("samples"), file.metadata()["why"]
    if why:
        what = "a copy with 4-bit experts wrote text" if len(own) else "no text was written"
        why = f"{what}, {asked} samples asked for: {why}"
    return CalibrationText(torch.cat([plan.samples, own]), len(own), why)


def _write_to(path: Path, plan: Plan, copy: Path, way: Way, why: str) -> None:
    """Sample from the model, or from its copy, which is then removed, into a file."""
    own = torch.empty(0, plan.config.calibration.seqlen, dtype=torch.long)
    if way != "none":
        try:
            own = _sample(plan, copy, way)
        except CONFIG_ERRORS as error:  # transformers cannot continue text in this family
            why = f"generating failed: {type(error).__name__}: {first_line(error)}"
    write_safetensors(path, {"samples": own}, {"why": why})
    shutil.rmtree(copy, ignore_errors=True)


def find_way(source: Source, device: torch.device, allowed: int | None) -> tuple[Way, str]:
    """Who writes text here, and why not the original ("" if it does). allowed: bytes of the
    machine's memory, None for what is free. A model on its way to a GPU is in that memory first."""
    if source.model.config.is_encoder_decoder or not source.model.can_generate():
        return "none", "the model does not continue text"
    limit = free() if allowed is None else allowed
    if device.type == "cuda":
        limit = min(limit, torch.cuda.mem_get_info(device)[0])
    original, copy = (int(ROOM * n) for n in _bytes(source))
    found = f"{format_size(limit)} can be had"
    if original <= limit:
        return "original", ""
    if copy <= limit:
        return "copy", f"the original takes {format_size(original)} of memory, {found}"
    return "none", f"that takes {format_size(copy)} of memory even with 4-bit experts, {found}"


def _bytes(source: Source) -> tuple[int, int]:
    """Of the model as it is stored, and of the copy at most."""
    each = torch.finfo(source.weight_dtype()).bits // 8
    every = sum(parameter.numel() for parameter in source.model.parameters())
    modules = [source.model.get_submodule(n) for x in source.structure.layers for n in x.experts]
    routed = sum(rows(m, weight).numel() for m in modules for weight in expert_weights(m))
    return every * each, int(routed * PER_WEIGHT) + (every - routed) * each


def _make_copy(original: Path, folder: Path, config: QuantConfig, quantize: Quantize) -> None:
    """Round to nearest into `folder`: no text is needed, and one layer at a time in memory."""
    if distributed.rank() == 0 and folder.exists():  # a run was killed while this copy wrote
        shutil.rmtree(folder)
    distributed.all_gather_object(0)
    group = 32 if config.experts.codebook else config.experts.group_size
    experts = Scheme(4, group, symmetric=False)
    quantize(original, folder, QuantConfig("rtn", experts, config.dense and Scheme(8, CHANNEL)))


def _sample(plan: Plan, copy: Path, way: Way) -> Int[Tensor, "n L"]:
    folder, dtype = plan.source.folder, plan.source.weight_dtype()
    if way == "copy":
        trust = folder.trust_remote_code
        model, tokenizer = load(
            copy, dtype, device=plan.device, progress=False, trust_remote_code=trust
        )
    else:
        tokenizer = folder.tokenizer(plan.source.model.config)
        original = open_source(folder, dtype)
        original.weights.load(original.weights.names(), dtype)
        original.weights.tie()
        model = original.model
        move_to(model, plan.device)
    return write(model, tokenizer, plan.config.calibration)


def write(model: Any, tokenizer: Any, config: CalibrationConfig) -> Int[Tensor, "n L"]:
    """`config.self_samples` samples of `config.seqlen` tokens, each of a few texts sampled at
    temperature 1.

    A text begins with BOS, if the tokenizer starts texts with it, and a token drawn evenly from the
    vocabulary, which sets languages and domains apart. Same seed, same tokens on the same machine.
    """
    generator = torch.Generator().manual_seed(config.seed)
    count, length = config.self_samples * TEXTS, -(-config.seqlen // TEXTS)
    firsts = _first_tokens(tokenizer, model.config, count, generator)
    devices = [] if model.device.type == "cpu" else [model.device]
    with torch.random.fork_rng(devices=devices, device_type=model.device.type):
        torch.manual_seed(config.seed)
        parts = [part.to(model.device) for part in firsts.split(ROWS)]
        texts = torch.cat([_continue(model, part, length).to(CPU) for part in parts])
    if texts.shape[1] < length:
        raise ValueError(f"texts end after {texts.shape[1]} of {length} tokens")
    return texts.reshape(config.self_samples, -1)[:, : config.seqlen]


def _first_tokens(tokenizer: Any, config: Any, count: int, generator: torch.Generator) -> Tensor:
    known = min(len(tokenizer), config.get_text_config().vocab_size)
    special = set(tokenizer.all_special_ids)
    usual = torch.tensor([i for i in range(known) if i not in special])
    drawn = usual[torch.randint(len(usual), (count, 1), generator=generator)]
    start = [i for i in tokenizer("")["input_ids"][:1] if i == tokenizer.bos_token_id]
    return torch.cat([torch.tensor(start, dtype=torch.long).expand(count, -1), drawn], dim=1)


def _continue(model: Any, rows: Tensor, seqlen: int) -> Tensor:
    more = seqlen - rows.shape[1]
    if more < 1:
        return rows[:, :seqlen]
    ids: Tensor = model.generate(
        rows,
        attention_mask=torch.ones_like(rows),
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        min_new_tokens=more,
        max_new_tokens=more,
        pad_token_id=0,
    )
    return ids
