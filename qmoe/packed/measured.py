"""qmoe_measured.json: what `qmoe eval --save` and `qmoe bench --save` found of a quantized folder.

The model card and the report show it. Unlike qmoe_report.json it depends on the machine, so it is
a file of its own.
"""

from pathlib import Path
from typing import Any

from qmoe.checkpoint.folders import read_json
from qmoe.errors import CheckpointError, OutputError
from qmoe.packed.card import CARD, refresh_card
from qmoe.packed.report import REPORT, read_report
from qmoe.system.files import to_json
from qmoe.system.printing import say

MEASURED = "qmoe_measured.json"
# By command, what its result has, and of which kind.
KEYS: dict[str, dict[str, type]] = {
    "eval": {"scores": dict, "overall": dict, "settings": dict},
    "bench": {"models": dict, "settings": dict, "machine": str, "kernels": str},
}


def read_measured(folder: Path) -> dict[str, Any]:
    """What was measured, by command ("eval", "bench"); empty if nothing was kept. CheckpointError
    for a file that does not hold it."""
    found = read_json(folder / MEASURED) if (folder / MEASURED).is_file() else {}
    for command, keys in KEYS.items():
        if command not in found:
            continue
        part = found[command]
        wrong = [k for k, kind in keys.items() if not isinstance(part, dict) or not
                 isinstance(part.get(k), kind)]  # fmt: skip
        models = {} if wrong else part["models" if command == "bench" else "overall"]
        if wrong or not isinstance(models.get("qmoe"), dict):
            what = wrong[0] if wrong else "qmoe"
            raise CheckpointError(
                f"{folder / MEASURED}: damaged (no {what} in {command}); remove it, and measure "
                f"again with `qmoe {command} --save`"
            )
    return found


def check_can_keep(folder: Path) -> None:
    """Raises CheckpointError for a folder that has no report, to be called before long work."""
    if not (folder / REPORT).is_file():
        raise CheckpointError(f"{folder}: it has no {REPORT}, so nothing can be saved beside it")
    read_report(folder)


def keep_measured(folder: Path, what: str, result: dict[str, Any]) -> None:
    """Keep the result of one command in the folder, and put it into the model card. A line on
    standard error says if the card has no place for it. OutputError if it cannot be written."""
    report, measured = read_report(folder), read_measured(folder) | {what: result}
    path = folder / MEASURED
    try:
        temporary = path.with_name(f"{MEASURED}.tmp")
        temporary.write_text(to_json(measured) + "\n", encoding="utf-8")
        temporary.replace(path)
        placed = refresh_card(folder, report, measured)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror}") from error
    if not placed:
        say(f"{folder / CARD}: has no part that qmoe wrote, so the measurements are not in it")
