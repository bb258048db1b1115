"""What a page says of one quantized folder, from its reports and the headers of its files."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qmoe.checkpoint.folders import read_json
from qmoe.checkpoint.model_folder import ModelFolder
from qmoe.config import UNQUANTIZED, QuantConfig
from qmoe.errors import CheckpointError
from qmoe.html_report.stored import Shard, read_stored
from qmoe.layer.records import LayerRecord
from qmoe.packed.measured import read_measured
from qmoe.packed.report import REPORT, expert_rows, layer_records, read_report


@dataclass(frozen=True)
class Facts:
    """name: of the folder. report: qmoe_report.json. measured: what `--save` kept, by command.
    layers: the records of decoder layers (and of lm_head). experts: a row per layer and expert.
    shards: what the files hold."""

    name: str
    report: dict[str, Any]
    config: QuantConfig
    measured: dict[str, Any]
    layers: list[LayerRecord]
    experts: list[dict[str, Any]]
    shards: list[Shard]

    @property
    def modules(self) -> list[str]:
        """The experts modules, in order."""
        return list(dict.fromkeys(row["experts"] for row in self.experts))

    @property
    def bits(self) -> float:
        """Bits of a packed weight, scales and zero points included."""
        weights = sum(shard.weights for shard in self.shards)
        return 8 * sum(shard.packed for shard in self.shards) / max(weights, 1)

    def settings(self) -> list[tuple[str, Any]]:
        """All settings by their dotted names; parts that stay in 16 bits by `bits` alone."""
        out: list[tuple[str, Any]] = []
        for name, value in self.config.to_dict().items():
            if isinstance(value, dict):
                out += [(f"{name}.{key}", inner) for key, inner in value.items()]
            else:
                out.append((name, value) if value is not None else (f"{name}.bits", UNQUANTIZED))
        return out

    def grid(self, key: str) -> np.ndarray:
        """A number of every expert as [modules, experts], NaN where it is not known: "tokens",
        "routing_mass", or "errors", of which the root mean square over matrices is taken."""
        return _grid(self.modules, {(r["experts"], r["expert"]): r for r in self.experts}, key)

    def widths(self) -> tuple[list[str], np.ndarray]:
        """The bits of every expert as [modules, experts], by the names in the files."""
        found = {n: widths for shard in self.shards for n, widths in shard.widths.items()}
        cells = {(n, e): {"bits": b} for n, widths in found.items() for e, b in widths.items()}
        return list(found), _grid(list(found), cells, "bits")

    def used(self) -> dict[str, np.ndarray]:
        """By domain of held-out text: tokens of every expert, [modules, experts]."""
        found = {}
        for domain, counts in self.measured.get("eval", {}).get("experts_used", {}).items():
            cells = {(n, e): {"n": c} for n in counts for e, c in enumerate(counts[n])}
            found[domain] = _grid(list(counts), cells, "n")
        return found


def gather(path: str | Path, trust_remote_code: bool = False) -> Facts:
    """The facts of a quantized folder or hub name. CheckpointError for one without a report."""
    folder = ModelFolder.find(path, trust_remote_code).path
    if not (folder / REPORT).is_file():
        quantized = read_json(folder / "config.json").get("quantization_config") is not None
        what = "it has no qmoe_report.json" if quantized else "it is not quantized"
        raise CheckpointError(f"{folder}: {what}, so there is nothing to show; expected a folder "
                              "that `qmoe quantize` made")  # fmt: skip
    report = read_report(folder)
    try:
        config = QuantConfig.from_dict(report["config"])
        nbytes = {str(kind): int(n) for kind, n in report["bytes"].items()}
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{folder / REPORT}: damaged ({type(error).__name__}: {error}); copy it from the "
            "original folder"
        ) from error
    return Facts(
        folder.resolve().name,
        report | {"bytes": nbytes},
        config,
        read_measured(folder),
        layer_records(folder, report),
        expert_rows(folder, report),
        read_stored(folder),
    )


def short(names: Sequence[str]) -> list[str]:
    """Modules by the number of their layer, with the last part of the name where several share
    it."""
    numbers = [(re.search(r"\.(\d+)(?:\.|$)", f"{name}.") or ["", name])[1] for name in names]
    return [
        n if numbers.count(n) == 1 else f"{n} {name.rpartition('.')[2]}"
        for n, name in zip(numbers, names, strict=True)
    ]


def _grid(
    names: Sequence[str], cells: dict[tuple[str, int], dict[str, Any]], key: str
) -> np.ndarray:
    place = {name: i for i, name in enumerate(names)}
    width = max((e + 1 for _, e in cells), default=1)
    grid = np.full((max(len(names), 1), width), np.nan)
    for (name, e), cell in cells.items():
        value = cell.get(key)
        if key == "errors":
            value = float(np.sqrt(np.mean(np.square(value)))) if value else None
        if value is not None:
            grid[place[name], e] = value
    return grid
