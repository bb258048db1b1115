"""qmoe_report.json: what was done to every expert, every fallback, every byte. Nothing needed to
load the model lives here, and no clock time, so that equal runs write equal bytes.
"""

from pathlib import Path
from typing import Any

from qmoe.checkpoint.folders import read_json
from qmoe.checkpoint.tokenizer import has_tokenizer
from qmoe.config import QuantConfig
from qmoe.errors import CheckpointError
from qmoe.model.source import Source
from qmoe.packed.audit import Audit

REPORT = "qmoe_report.json"
SHOWN = 8  # experts named in a line
# What is read again, beside what is only shown.
KEYS = {"config": dict, "fallbacks": list, "layers": list, "digests": dict, "kept_sha256": str}


def build_report(
    config: QuantConfig, source: Source, records: list[dict[str, Any]], audit: Audit, version: str
) -> dict[str, Any]:
    """The report of a run; records come from qmoe/layer/quantize.py, one per layer."""
    return {
        "qmoe_version": version,
        "model_type": source.checkpoint.config.get("model_type"),
        "config": config.to_dict(),
        "symmetric": config.symmetric,
        "rotated": config.rotated,
        "fallbacks": [line for record in records for line in fallbacks(record)]
        + _dropped(source.weights.ignored)
        + _unnamed(source)
        + _no_tokenizer(source),
        "bytes": audit.bytes,
        "source_bytes": source.checkpoint.nbytes(),
        "layers": records,
    }


def read_report(folder: Path) -> dict[str, Any]:
    """The report of a quantized folder; CheckpointError if it is not one that `quantize` wrote."""
    report = read_json(folder / REPORT)
    for key, kind in KEYS.items():
        if not isinstance(report.get(key), kind):
            raise _damaged(folder, f"{key} is {str(report.get(key))[:100]}, not a {kind.__name__}")
    return report


def expert_rows(folder: Path, report: dict[str, Any]) -> list[dict[str, Any]]:
    """One row per layer and expert of a report: errors, tokens, gate mass, whether it borrowed.
    CheckpointError for a report that does not hold them as it should."""
    try:
        return [row for layer in report["layers"] for row in _layer_rows(layer)]
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise _damaged(folder, f"in its layers, {type(error).__name__}: {error}") from error


def _layer_rows(layer: Any) -> list[dict[str, Any]]:
    rows = []
    for name, entry in layer.get("experts", {}).items():
        for e, errors in enumerate(_errors(name, entry, layer["dense"])):
            row = {"experts": name, "expert": e, "errors": list(map(float, errors))}
            if "tokens" in entry:
                row["tokens"] = int(entry["tokens"][e])
            if "gate_mass" in entry:
                row["gate_mass"] = float(entry["gate_mass"][e])
            rows.append(row | {"borrowed": e in entry.get("borrowed", [])})
    return rows


def _errors(name: str, entry: dict[str, Any], linears: dict[str, Any]) -> list[list[float]]:
    """Of every expert, what its matrices lost; empty where plain rounding measured nothing."""
    parts = [part for part in entry.values() if isinstance(part, dict)]
    if parts:
        errors = [part["error"] for part in parts if "error" in part]
        return [list(each) for each in zip(*errors, strict=True)]
    found: dict[str, list[float]] = {}  # experts that are modules are recorded linear by linear
    for linear, part in linears.items():
        if linear.startswith(f"{name}.") and "error" in part:
            expert = linear.removeprefix(f"{name}.").partition(".")[0]
            found.setdefault(expert, []).append(part["error"])
    return list(found.values())


def _damaged(folder: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"{folder / REPORT}: damaged ({what}); copy it from the original folder, or remove it to "
        "audit the weights without it"
    )


def _dropped(ignored: dict[str, str]) -> list[str]:
    lines = []
    for reason in dict.fromkeys(ignored.values()):
        first, *others = [name for name, why in ignored.items() if why == reason]
        more = f" and {len(others)} more" if others else ""
        lines.append(f"not written, {reason}: {first}{more}")
    return lines


def _no_tokenizer(source: Source) -> list[str]:
    if has_tokenizer(source.checkpoint.path):
        return []
    return ["no tokenizer: the source has none, so qmoe.load gives None in its place"]


def _unnamed(source: Source) -> list[str]:
    named, used = source.checkpoint.config.get("architectures"), type(source.model).__name__
    if named and used == named[0]:
        return []
    return [f"config.json names no class of this family (architectures: {named}); {used} was taken"]


def left_behind(names: list[str]) -> list[str]:
    """In words, files and folders of the source that are not part of the model it is."""
    if not names:
        return []
    return [f"not copied, weights in another form or of another model: {_list(names)}"]


def fallbacks(record: dict[str, Any]) -> list[str]:
    """In words, everything in a layer that did not go the regular way."""
    lines = []
    for name, entry in record.get("experts", {}).items():
        if borrowed := entry.get("borrowed"):
            tokens = entry["tokens"]
            saw = [f"{tokens[e]} (expert {e})" for e in sorted(borrowed, key=lambda e: tokens[e])]
            lines.append(
                f"{name}: {len(borrowed)} of {len(tokens)} experts borrowed tokens of their layer, "
                f"having seen too few: {_list(saw)}"
            )
        for weight, part in entry.items():
            if isinstance(part, dict):
                lines += _trouble(f"{name}.{weight}", part)
    for name, part in record.get("dense", {}).items():
        lines += _trouble(name, part)
    if record.get("unreached"):
        lines.append(f"{record['name']}: no text reaches it; rounded to nearest")
    for name, reason in record.get("kept", {}).items():
        if reason != "router":
            lines.append(f"{name}: not quantized, {reason}")
    for name in record.get("not_folded", []):
        lines.append(f"{name}: no AWQ scale folded in")
    return lines


def _trouble(name: str, part: dict[str, Any]) -> list[str]:
    lines = []
    if damped := part.get("damped"):
        lines.append(f"{name}: damping raised for {_list(list(damped))}")
    if rounded := part.get("rounded"):
        lines.append(f"{name}: rounded to nearest, no usable statistics: {_list(rounded)}")
    if bounded := part.get("bounded"):
        rows = [f"{count} (matrix {e})" for e, count in bounded["rows"].items()]
        lines.append(
            f"{name}: rows too small or too large for scales in {bounded['dtype']}, coarser than "
            f"their bits: {_list(rows)}"
        )
    return lines


def _list(values: list[Any]) -> str:
    """The first few; `layers` in the report has all."""
    more = f" and {len(values) - SHOWN} more" if len(values) > SHOWN else ""
    return ", ".join(map(str, values[:SHOWN])) + more
