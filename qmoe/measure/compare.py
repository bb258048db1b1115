"""Whether a model is the one that a quantized folder was made from."""

from pathlib import Path

import torch

from qmoe.checkpoint.folders import read_json
from qmoe.checkpoint.model_folder import ModelFolder
from qmoe.errors import ConfigError
from qmoe.model.source import open_source
from qmoe.packed.report import REPORT, read_report


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
