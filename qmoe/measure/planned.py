"""What the plan says of a quantized folder's memory, to be set beside what was measured."""

from pathlib import Path
from typing import Any

import torch

from qmoe.checkpoint.model_folder import ModelFolder
from qmoe.config import QuantConfig
from qmoe.errors import ConfigError, UnsupportedModelError
from qmoe.model.source import open_source
from qmoe.packed.report import read_report
from qmoe.plan.choose import measure, plan
from qmoe.plan.placement import Budget

BESIDE = ("cache", "activations", "workspace", "Python", "loading", "margin")  # no weights


def planned(folder: Path, original: ModelFolder, tokens: int) -> dict[str, Any]:
    """Bytes of host memory by part, and of all weights, that `qmoe plan` expects on a CPU with one
    sequence of so many tokens; or why it expects nothing ("refused")."""
    config = QuantConfig.from_dict(read_report(folder)["config"])
    source = open_source(original, torch.float32)
    try:
        run = measure(source, tokens)
        found = plan(source, [config], Budget(None, 1 << 62), run).chosen.placement
    except (ConfigError, UnsupportedModelError) as error:
        return {"refused": str(error)}
    weights = sum(part.host for part in found.parts if not part.name.startswith(BESIDE))
    return {"parts": [[part.name, part.host] for part in found.parts], "weights": weights}
