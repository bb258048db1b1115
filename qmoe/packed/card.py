"""README.md of a quantized folder, a model card as the Hub reads it: what the model is made from,
how it was quantized and measured, how to run it, and the command that makes it again.

The card of the original stays below. What qmoe writes stands between two comments, and only that is
replaced when measurements are added.
"""

import json
import re
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCardData

from qmoe.config import QuantConfig
from qmoe.packed.card_text import body

CARD = "README.md"
BEGIN, END = "<!-- qmoe: begin -->", "<!-- qmoe: end -->"
METADATA = re.compile(r"\A---[ \t]*\r?\n(.*?)^---[ \t]*(?:\r?\n|\Z)", re.DOTALL | re.MULTILINE)
# What the original's metadata says of the original alone.
ITS_OWN = (
    "base_model", "base_model_relation", "model-index", "eval_results", "new_version",
    "library_name", "self", "ignore_metadata_errors",
)  # fmt: skip


def read_card(folder: Path) -> tuple[dict[str, Any], str, list[str]]:
    """The metadata and the text of a folder's card, both empty if there is none; and in words, what
    of the metadata cannot be read and so is not carried over."""
    path = folder / CARD
    if not path.is_file():
        return {}, "", []
    whole = _read(path)
    found = METADATA.match(whole)
    if found is None:
        return {}, whole, []
    try:
        data = yaml.safe_load(found[1]) or {}
        if not isinstance(data, dict):
            raise ValueError(f"expected keys and values, found {type(data).__name__}")
        json.dumps(data, default=str)  # a list may hold itself in YAML, and could not be written
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        why = str(error).partition("\n")[0]
        return {}, whole[found.end() :], [f"{CARD}: its metadata was left out, not YAML: {why}"]
    return data, whole[found.end() :], []


def write_card(folder: Path, report: dict[str, Any], data: dict[str, Any], below: str = "") -> None:
    """Write the card of a folder that `report` describes. data, below: what `read_card` found of
    the original's."""
    made = f"{BEGIN}\n{body(report, data, {})}\n{END}\n"
    head = ModelCardData(**metadata(report, data), ignore_metadata_errors=True).to_yaml()
    below = _replaced(below, "").strip()
    if below:
        below = f"\n---\n\n*The card of the original model follows.*\n\n{below}\n"
    _write(folder / CARD, f"---\n{head}\n---\n\n{made}{below}")


def refresh_card(folder: Path, report: dict[str, Any], measured: dict[str, Any]) -> bool:
    """Put measurements into the part of a card that qmoe wrote. False if it is not there any more:
    the card is then left as it is."""
    path = folder / CARD
    whole = _read(path) if path.is_file() else ""
    data, _, _ = read_card(folder)
    made = f"{BEGIN}\n{body(report, data, measured)}\n{END}\n"
    if BEGIN not in whole or END not in whole:
        return False
    _write(path, _replaced(whole, made))
    return True


def metadata(report: dict[str, Any], original: dict[str, Any]) -> dict[str, Any]:
    """Of the card: the original's license, languages and tags, and what the Hub needs to know of a
    quantized model. A base model is named only if it came from the Hub, by its name there."""
    kept = {key: value for key, value in original.items() if key not in ITS_OWN}
    config = QuantConfig.from_dict(report["config"])
    tags = kept.pop("tags", None)
    tags = [tags] if isinstance(tags, str) else (tags if isinstance(tags, list) else [])
    own = ["qmoe", "moe", "compressed-tensors", f"{config.experts.bits}-bit"]
    kept["tags"] = list(dict.fromkeys([*tags, *own]))
    kept["library_name"] = "transformers"
    source = report.get("source", {})
    if source.get("revision"):
        kept |= {"base_model": source["name"], "base_model_relation": "quantized"}
    kept.setdefault("pipeline_tag", "text-generation")
    return {str(key): value for key, value in kept.items()}


def _replaced(whole: str, made: str) -> str:
    before, begin, rest = whole.partition(BEGIN)
    inside, end, after = rest.partition(END)
    return whole if not begin or not end else before + made + after.removeprefix("\n")


def _read(path: Path) -> str:
    """Bytes that are no UTF-8 stay what they are when the text is written again."""
    return path.read_bytes().decode("utf-8", "surrogateescape")


def _write(path: Path, text: str) -> None:
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
