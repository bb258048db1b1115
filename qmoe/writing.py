"""Calibration text that the model writes itself.

Text at hand is rarely all that a model is used for, and experts for other languages and domains see
none of it: calibrated on English essays alone, a model loses up to half more on German, French and
code. What a model samples from itself covers what it knows (MoEQuant's self-sampling, Hu et al.,
2025, arXiv 2505.03804, without its search; LLM-QAT, Liu et al., 2023, arXiv 2305.17888).

Needs the whole model in memory; where that or something else is in the way there is no such text,
and the report says why.
"""

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from safetensors import safe_open
from torch import Tensor

from qmoe import ranks
from qmoe.config import CalibrationConfig, QuantConfig
from qmoe.memory import free
from qmoe.model_config import CONFIG_ERRORS, first_line
from qmoe.output import WRITTEN, OutputFolder
from qmoe.plan import Source, open_source
from qmoe.storage import write_safetensors
from qmoe.tokenizer import open_tokenizer

ROWS = 64  # windows written at once
ROOM = 1.3  # times the model's bytes: its weights, caches of attention, activations


def written_windows(
    source: Source, config: QuantConfig, out: OutputFolder, allowed: int | None, trust: bool
) -> tuple[Int[Tensor, "n L"], str]:
    """What the model writes, or none and the reason. Kept with the unfinished work, so that a run
    that goes on has the same, whatever memory it finds. Of several processes one writes."""
    path = out.path / WRITTEN
    if out.leads and not path.exists():
        reason = refusal(source, allowed)
        own = torch.empty(0, config.calibration.window, dtype=torch.long)
        if not reason:
            folder = source.checkpoint.path
            tokenizer = open_tokenizer(folder, source.model.config, trust)
            try:
                own = write(folder, source.weight_dtype(), tokenizer, config.calibration, trust)
            except CONFIG_ERRORS as error:  # transformers cannot continue text in this family
                reason = f"generating failed: {type(error).__name__}: {first_line(error)}"
        write_safetensors(path, {"windows": own}, {"reason": reason})
    ranks.gather(0)  # the others wait until it is there
    with safe_open(path, framework="pt") as file:
        return file.get_tensor("windows"), file.metadata()["reason"]


def refusal(source: Source, allowed: int | None) -> str:
    """Why this model cannot write text here; empty if it can. allowed: bytes, None for what is
    free."""
    if source.model.config.is_encoder_decoder or not source.model.can_generate():
        return "it does not continue text"
    limit = free() if allowed is None else allowed
    need = int(ROOM * _bytes(source))
    if need > limit:
        return f"that takes {need / 1e9:.1f} GB of memory, {limit / 1e9:.1f} GB can be had"
    return ""


def _bytes(source: Source) -> int:
    elements = sum(parameter.numel() for parameter in source.model.parameters())
    return int(elements * torch.finfo(source.weight_dtype()).bits // 8)


def write(
    path: Path, dtype: torch.dtype, tokenizer: Any, config: CalibrationConfig, trust: bool
) -> Int[Tensor, "n L"]:
    """`config.written` windows of `config.window` tokens, sampled at temperature 1.

    Each begins with BOS, if the tokenizer starts texts with it, and a token drawn evenly from the
    vocabulary, which sets languages and domains apart. Same seed, same tokens on the same machine.
    """
    source = open_source(path, dtype, trust)
    source.weights.load(source.checkpoint.names(), dtype)
    source.weights.tie()
    generator = torch.Generator().manual_seed(config.seed)
    firsts = _first_tokens(tokenizer, source.model.config, config.written, generator)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        rows = [_continue(source.model, part, config.window) for part in firsts.split(ROWS)]
    return torch.cat(rows)


def _first_tokens(tokenizer: Any, config: Any, count: int, generator: torch.Generator) -> Tensor:
    known = min(len(tokenizer), config.get_text_config().vocab_size)
    special = set(tokenizer.all_special_ids)
    usual = torch.tensor([i for i in range(known) if i not in special])
    drawn = usual[torch.randint(len(usual), (count, 1), generator=generator)]
    start = [i for i in tokenizer("")["input_ids"][:1] if i == tokenizer.bos_token_id]
    return torch.cat([torch.tensor(start, dtype=torch.long).expand(count, -1), drawn], dim=1)


def _continue(model: Any, rows: Tensor, window: int) -> Tensor:
    more = window - rows.shape[1]
    if more < 1:
        return rows[:, :window]
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
