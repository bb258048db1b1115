"""qmoe_report.json: what was done to every expert, every fallback, every byte. Nothing needed to
load the model lives here, and no clock time, so that equal runs write equal bytes.
"""

from pathlib import Path
from typing import Any

from qmoe.checkpoint.folders import origin, read_json
from qmoe.checkpoint.tokenizer import has_tokenizer
from qmoe.config import QuantConfig
from qmoe.errors import CheckpointError
from qmoe.layer.records import ExpertsRecord, LayerRecord, MatrixRecord
from qmoe.model.source import Source
from qmoe.model.structure import ROUTER
from qmoe.packed.audit import Audit
from qmoe.prediction.stored import in_words

REPORT = "qmoe_report.json"
SHOWN = 8  # experts named in a line
# What is read again, beside what is only shown.
KEYS = {"config": dict, "fallbacks": list, "layers": list, "digests": dict, "unpacked_sha256": str}


def build_report(
    config: QuantConfig, source: Source, records: list[LayerRecord], audit: Audit, version: str
) -> dict[str, Any]:
    """The report of a run; records: one for each layer, and for an lm_head that is quantized."""
    return {
        "qmoe_version": version,
        "source": origin(source.folder.path),
        "model_type": source.checkpoint.config.get("model_type"),
        "config": config.to_dict(),
        "symmetric": config.symmetric,
        "rotated": config.rotated,
        "fallbacks": [line for record in records for line in fallbacks(record)]
        + in_words({"carried": audit.prediction.get("carried")})
        + _dropped(source.weights.ignored)
        + _unnamed(source)
        + _no_tokenizer(source),
        "bytes": audit.bytes,
        "source_bytes": source.checkpoint.nbytes(),
        "layers": [record.to_json() for record in records],
    } | ({"prediction": audit.prediction} if audit.prediction else {})


def read_report(folder: Path) -> dict[str, Any]:
    """The report of a quantized folder; CheckpointError if it is not one that `quantize` wrote."""
    report = read_json(folder / REPORT)
    for key, kind in KEYS.items():
        if not isinstance(report.get(key), kind):
            raise _damaged(folder, f"{key} is {str(report.get(key))[:100]}, not a {kind.__name__}")
    return report


def expert_rows(folder: Path, report: dict[str, Any]) -> list[dict[str, Any]]:
    """One row per layer and expert of a report: errors, tokens, routing mass, whether it borrowed.
    CheckpointError for a report that does not hold them as it should."""
    try:
        return [row for record in _records(report) for row in _layer_rows(record)]
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise _damaged(folder, f"in its layers, {type(error).__name__}: {error}") from error


def layer_records(folder: Path, report: dict[str, Any]) -> list[LayerRecord]:
    """What the report says of each layer; CheckpointError as for `expert_rows`."""
    try:
        return _records(report)
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise _damaged(folder, f"in its layers, {type(error).__name__}: {error}") from error


def _records(report: dict[str, Any]) -> list[LayerRecord]:
    return [LayerRecord.from_json(layer) for layer in report["layers"]]


def _layer_rows(layer: LayerRecord) -> list[dict[str, Any]]:
    rows = []
    for name, record in layer.experts.items():
        for e, errors in enumerate(_errors(name, record, layer.dense)):
            row = {"experts": name, "expert": e, "errors": errors}
            if record.tokens is not None:
                row["tokens"] = record.tokens[e]
            if record.routing_mass is not None:
                row["routing_mass"] = record.routing_mass[e]
            rows.append(row | {"borrowed": e in (record.borrowed or [])})
    return rows


def _errors(
    name: str, record: ExpertsRecord, linears: dict[str, MatrixRecord]
) -> list[list[float]]:
    """Of every expert, what its matrices lost; empty where plain rounding measured nothing."""
    if record.matrices:
        errors = [part.error for part in record.matrices.values() if part.error]
        return [list(each) for each in zip(*errors, strict=True)]
    found: dict[str, list[float]] = {}  # experts that are modules are recorded linear by linear
    for linear, part in linears.items():
        if linear.startswith(f"{name}.") and part.error:
            expert = linear.removeprefix(f"{name}.").partition(".")[0]
            found.setdefault(expert, []).extend(part.error)
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


def fallbacks(layer: LayerRecord) -> list[str]:
    """In words, everything in a layer that did not go the regular way."""
    lines = []
    for name, record in layer.experts.items():
        if record.borrowed:
            tokens = record.tokens or []
            rarest = sorted(record.borrowed, key=lambda e: tokens[e])
            lines.append(
                f"{name}: {len(rarest)} of {len(tokens)} experts borrowed tokens of their layer, "
                f"having seen too few: {_list([f'{tokens[e]} (expert {e})' for e in rarest])}"
            )
        for weight, part in record.matrices.items():
            lines += _trouble(f"{name}.{weight}", part)
    for name, part in layer.dense.items():
        lines += _trouble(name, part)
    if layer.unreached:
        lines.append(f"{layer.name}: no text reaches it; rounded to nearest")
    for name, reason in layer.unquantized.items():
        if reason != ROUTER:
            lines.append(f"{name}: not quantized, {reason}")
    return lines + [f"{name}: no AWQ scale folded in" for name in layer.not_folded]


def _trouble(name: str, part: MatrixRecord) -> list[str]:
    lines = []
    if part.damped:
        lines.append(f"{name}: damping raised for {_list(list(part.damped))}")
    if part.rounded:
        lines.append(f"{name}: rounded to nearest, no usable statistics: {_list(part.rounded)}")
    if part.bounded:
        rows = [f"{count} (matrix {e})" for e, count in part.bounded.items()]
        lines.append(
            f"{name}: rows too small or too large for scales in {part.scale_dtype}, coarser than "
            f"their bits: {_list(rows)}"
        )
    return lines


def _list(values: list[Any]) -> str:
    """The first few; `layers` in the report has all."""
    more = f" and {len(values) - SHOWN} more" if len(values) > SHOWN else ""
    return ", ".join(map(str, values[:SHOWN])) + more
