"""qmoe_report.json: what was done to every expert, every fallback, every byte. Nothing needed to
load the model lives here, and no clock time, so that equal runs write equal bytes.
"""

from typing import Any

from qmoe.audit import Audit
from qmoe.config import QuantConfig
from qmoe.plan import Source


def build_report(
    config: QuantConfig, source: Source, records: list[dict[str, Any]], audit: Audit, version: str
) -> dict[str, Any]:
    """The report of a run; records come from qmoe/layer.py, one per layer."""
    return {
        "qmoe_version": version,
        "model_type": source.checkpoint.config.get("model_type"),
        "config": config.to_dict(),
        "symmetric": config.symmetric,
        "fallbacks": [line for record in records for line in fallbacks(record)]
        + _dropped(source.weights.ignored),
        "bytes": audit.bytes,
        "source_bytes": source.checkpoint.nbytes(),
        "layers": records,
    }


def _dropped(names: list[str]) -> list[str]:
    if not names:
        return []
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return [f"not written, transformers does not use them in this family: {names[0]}{more}"]


def fallbacks(record: dict[str, Any]) -> list[str]:
    """In words, everything in a layer that did not go the regular way."""
    lines = []
    for name, entry in record.get("experts", {}).items():
        if borrowed := entry.get("borrowed"):
            counts = [entry["tokens"][e] for e in borrowed]
            lines.append(
                f"{name}: experts {_list(borrowed)} saw only {_list(counts)} tokens; "
                "borrowed tokens of their layer"
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
            lines.append(f"{name}: left in 16 bits, {reason}")
    for name in record.get("not_folded", []):
        lines.append(f"{name}: no AWQ scale folded in")
    return lines


def _trouble(name: str, part: dict[str, Any]) -> list[str]:
    lines = []
    if damped := part.get("damped"):
        lines.append(f"{name}: damping raised for {_list(list(damped))}")
    if rounded := part.get("rounded"):
        lines.append(f"{name}: rounded to nearest, no usable statistics: {_list(rounded)}")
    return lines


def _list(values: list[Any]) -> str:
    return ", ".join(map(str, values))
