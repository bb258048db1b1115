"""What a run does: the model, the settings and the text, all checked before the long work."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from jaxtyping import Int
from torch import Tensor

import qmoe.calibration.stats as statistics
from qmoe._version import __version__
from qmoe.calibration.batches import fingerprint
from qmoe.checkpoint.model_folder import ModelFolder
from qmoe.checkpoint.remote_code import code_digest
from qmoe.config import QuantConfig
from qmoe.engines.settings import check_target
from qmoe.errors import CalibrationError
from qmoe.model.schemes import check_schemes, with_block, with_widest
from qmoe.model.source import Source, open_source
from qmoe.pipeline.checks import (
    check_codes,
    check_combination,
    check_companions,
    check_held_out,
    check_rotation,
    check_space,
    choose_text,
    make_statistics_folder,
)
from qmoe.pipeline.memory import check_fits, needed, spills
from qmoe.prediction.attach import add_prediction
from qmoe.rotation.find_rotation import find_fused_rotation
from qmoe.rotation.fused_rotation import FusedRotation
from qmoe.system.devices import find_device

# Folders that a measuring pass keeps beside its measurements.
STATISTICS, MATRICES = "statistics", "matrices"


@dataclass(frozen=True)
class Plan:
    """dst: the folder to make.
    config: the settings, with the block of an online rotation.
    samples: calibration text at hand, none where no text runs through the model.
    notes: in words, what of bits and text is not as it was asked for.
    source_sha256: of the model's weights.
    statistics_from: folders of saved statistics, used instead of text; save_statistics: the folder
        to keep them in.
    rotation: what touches the residual stream, if that is to be rotated.
    device: where layers run and are solved. max_memory: bytes that one process may take, None for
        what is free. spills: whether activations wait on disk.
    kept_matrices: the folder where solved matrices are kept for other runs, and found."""

    source: Source
    dst: Path
    config: QuantConfig
    samples: Int[Tensor, "n L"]
    notes: list[str]
    source_sha256: str
    statistics_from: list[Path]
    save_statistics: Path | None
    rotation: FusedRotation | None
    device: torch.device
    max_memory: int | None
    spills: bool
    kept_matrices: Path | None = None

    @property
    def shards(self) -> int:
        """One for each layer, and one for what lies outside of all."""
        return len(self.source.structure.layers) + 1

    @property
    def refits(self) -> bool:
        """Whether matrices are fitted to quantized ones before them: that takes text, and all
        experts' statistics only when those before them are solved."""
        in_files = bool(self.statistics_from) or self.save_statistics is not None
        return self.config.refit and self.config.method == "gptq" and not in_files

    @property
    def experts_dtype(self) -> torch.dtype:
        """Of routed experts in memory: as stored, unless they change before they are rounded."""
        return torch.float32 if self.config.experts_in_float32 else self.source.weight_dtype()

    @cached_property
    def statistics_about(self) -> dict[str, str]:
        """What statistics must have been gathered on to be used here."""
        return _statistics_about(self.source_sha256, self.config, self.rotation)

    def statistics_files(self, i: int) -> list[Path]:
        """The files with saved statistics of layer i."""
        return [folder / statistics_file(i) for folder in self.statistics_from]

    def fingerprint(self) -> dict[str, str]:
        """What a run that goes on must have in common with the one that was stopped."""
        given = [str(folder) for folder in self.statistics_from]
        return {
            "source": self.source_sha256,
            "text": fingerprint(self.samples),
            "device": self.device.type,
            "statistics": f"from {given} to {self.save_statistics}",
            **{name: str(value) for name, value in vars(self.config).items()},
            "widths": _digest(self.config.widths),
            "groups": _digest(self.config.groups),
            "code": code_digest(self.source.checkpoint.path),
            "versions": f"qmoe {__version__}, torch {torch.__version__}, "
            f"transformers {transformers.__version__}",
        }

    def statistics_to(self, i: int) -> Path | None:
        """The file to keep the statistics of layer i in."""
        folder = self.save_statistics
        return None if folder is None else folder / statistics_file(i)


def check(
    src: str | Path,
    dst: Path,
    config: QuantConfig,
    *,
    statistics_from: Sequence[str | Path],
    save_statistics: str | Path | None,
    device: str | torch.device,
    max_memory: int | None,
    trust_remote_code: bool,
    text: Iterable[Any] | None = None,
) -> Plan:
    """Check source, settings, text, memory and destination. Raises a QmoeError that names the
    problem. Nothing is written but an empty folder for statistics. text: in place of what the
    config names."""
    given = [Path(folder) for folder in statistics_from]
    saved = None if save_statistics is None else Path(save_statistics)
    check_combination(config, given, saved, dst)
    where = find_device(device)
    folder = ModelFolder.find(src, trust_remote_code)
    add = add_prediction if config.mtp == "quantize" else None
    source = open_source(folder, torch.float32, add)
    check_rotation(source, config)
    config, widened = with_widest(source, with_block(source, config))
    check_schemes(source, config)
    check_target(source, config)
    check_codes(source, config)
    check_space(source, config, dst)
    uses_text = not given and config.method != "rtn"
    tokenizer = check_companions(source, uses_text)
    samples, notes = torch.empty(0, 0, dtype=torch.long), widened
    if uses_text:
        samples, said = choose_text(source, tokenizer, config.calibration, text)
        notes = notes + said
    check_held_out(config, samples)
    sha256 = source.checkpoint.check_finite()
    c = config.calibration
    tokens = samples.numel() + (c.self_samples * c.seqlen if uses_text else 0)
    in_files = bool(given) or saved is not None
    spill = spills(needed(source, config, tokens, in_files), max_memory)
    check_fits(source, config, where)
    rotation = find_fused_rotation(source) if config.rotate == "fused" else None
    about = _statistics_about(sha256, config, rotation)
    notes = _check_statistics(given, source, about) + notes
    if saved is not None:
        make_statistics_folder(saved)
    return Plan(
        source,
        dst,
        config,
        samples,
        notes,
        sha256,
        given,
        saved,
        rotation,
        where,
        max_memory,
        spill,
    )  # fmt: skip


def _digest(single: Mapping[str, Any]) -> str:
    """Of settings of single matrices, which are too many to be shown."""
    text = json.dumps(dict(single), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16] if single else "none"


def _check_statistics(given: list[Path], source: Source, about: dict[str, str]) -> list[str]:
    """Raises CalibrationError unless the statistics of every layer are there and of this model; in
    words, what of the text that they were gathered on was not as asked for."""
    said: list[str] = []
    for folder in given:
        for i, layer in enumerate(source.structure.layers):
            if source.predicts(layer.name) and not (folder / statistics_file(i)).exists():
                raise CalibrationError(
                    f"{folder}: expected statistics of {layer.name}, the layer that predicts "
                    f"further tokens, in {statistics_file(i)}; found none. Leave that layer in 16 "
                    "bits (--set mtp=keep), or save statistics again"
                )
            notes = statistics.check(folder / statistics_file(i), about)
            said += [f"{folder}: {note}" for note in notes if i == 0]
    return said


def _statistics_about(
    sha256: str, config: QuantConfig, rotation: FusedRotation | None
) -> dict[str, str]:
    about = {"model": sha256, "routing_weighted": str(config.routing_weighted)}
    return about if rotation is None else about | {"stream": "rotated"}


def statistics_file(i: int) -> str:
    return f"layer-{i:05d}.safetensors"
