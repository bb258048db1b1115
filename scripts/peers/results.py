"""Rows of the comparison from the stored results, as CSV and as a table for people.

A result is a JSON file of what was run and how, and a safetensors file of its scores per token.
KL relative to round-to-nearest compares with the row `rtn` of the same model and nominal bits.
"""

import csv
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from qmoe.cli import tables

Row = dict[str, Any]
FIRST = [
    "model", "regime", "seed", "bits", "method", "bits_per_weight", "kl", "kl_over_rtn",
    "kl_rare", "kl_rare_over_rtn", "rare_tokens", "top1_agreement", "router_agreement",
    "perplexity", "cpu_seconds",
]  # fmt: skip
LAST = ["versions", "notes"]
KEYS = ["model", "regime", "seed", "bits", "method"]
WORDS = ["model", "regime", "method", *LAST]


def summary(scores: dict[str, Tensor], tokens: dict[str, int]) -> Row:
    """Means of one result's scores. tokens: how many of them each domain has, in their order."""
    row: Row = {}
    losses: list[Tensor] = []
    start = 0
    for domain, count in tokens.items():
        part = slice(start, start := start + count)
        row[f"kl_{domain}"] = float(scores["kl"][part].double().mean())
        losses.append(scores["loss"][part].double().mean())
        row[f"perplexity_{domain}"] = float(losses[-1].exp())  # infinite above 709
    row["kl"] = sum(row[f"kl_{d}"] for d in tokens) / len(tokens)
    row["perplexity"] = float(torch.stack(losses).mean().exp())
    row["top1_agreement"] = float(scores["agree"].double().mean())
    row["router_agreement"] = float(scores["kept"].mean())
    return row


def read(stem: Path, tokens: dict[str, int], rare: Tensor) -> Row:
    """The row of one stored result. rare: which predicted tokens a rare expert saw."""
    told: Row = json.loads(stem.with_suffix(".json").read_text())
    row: Row = {"method": told["method"], "bits": told["bits"]}
    if "failed" in told:
        return row | {"notes": f"failed: {told['failed']}"}
    peer = told["peer"]
    scores = load_file(stem.with_suffix(".safetensors"))
    row |= summary(scores, tokens)
    row["rare_tokens"] = int(rare.sum())
    if row["rare_tokens"]:
        row["kl_rare"] = float(scores["kl"][rare].double().mean())
    row["bits_per_weight"], row["cpu_seconds"] = peer["bits_per_weight"], peer["cpu_seconds"]
    row["versions"] = " ".join(f"{n} {v}" for n, v in peer["versions"].items())
    return row | {"notes": "; ".join(_notes(peer))}


def _notes(peer: Row) -> list[str]:
    lists = {
        "left_unquantized": "left unquantized",
        "also_changed": "changed beside the matrices",
    }
    notes = [f"{len(peer[key])} tensors {words}" for key, words in lists.items() if peer[key]]
    fallbacks = peer["fallbacks"]
    if fallbacks:
        first = f"{fallbacks[0][:120]}" + (" .." if len(fallbacks[0]) > 120 else "")
        notes.append(f"{len(fallbacks)} fallbacks, as: {first}")
    return [*notes, *peer.get("notes", [])]


def relate(rows: list[Row]) -> None:
    """Add what is relative to round-to-nearest of the same model, regime, seed and bits."""
    keys = KEYS[:-1]
    plain = {tuple(r[k] for k in keys): r for r in rows if r["method"] == "rtn"}
    for row in rows:
        base = plain.get(tuple(row[k] for k in keys), {})
        for name in ("kl", "kl_rare"):
            if row.get(name) is not None and base.get(name):
                row[f"{name}_over_rtn"] = row[name] / base[name]


def with_earlier(rows: list[Row], path: Path, methods: list[str]) -> list[Row]:
    """The rows and, in order, those of an earlier CSV that are not among them: another machine's
    stored results need not be at hand. methods: in the order of rows."""
    if not path.is_file():
        return rows
    with path.open(newline="") as file:
        earlier = [{k: _value(k, v) for k, v in row.items() if v} for row in csv.DictReader(file)]
    mine = {tuple(row[k] for k in KEYS) for row in rows}
    kept = [row for row in earlier if tuple(row[k] for k in KEYS) not in mine]
    models = list(dict.fromkeys(row["model"] for row in [*earlier, *rows]))

    def place(row: Row) -> tuple[Any, ...]:
        method = methods.index(row["method"]) if row["method"] in methods else len(methods)
        return models.index(row["model"]), row["regime"], row["seed"], method, row["bits"]

    return sorted([*rows, *kept], key=place)


def _value(column: str, text: str) -> str | int | float:
    if column in WORDS:
        return text
    return int(text) if text.isdecimal() else float(text)


def write_csv(rows: list[Row], path: Path) -> None:
    """All rows, columns of domains after the common ones."""
    columns = {name for row in rows for name in row}
    domains = sorted(columns - set(FIRST) - set(LAST))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*FIRST, *domains, *LAST], lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})


def show(rows: list[Row]) -> None:
    """KL relative to round-to-nearest: a line per method and bits, a column per case."""
    cases = list(dict.fromkeys((r["model"], r["regime"], r["seed"]) for r in rows))
    found = {(r["method"], r["bits"], r["model"], r["regime"], r["seed"]): r for r in rows}
    lines = []
    for method, bits in dict.fromkeys((r["method"], r["bits"]) for r in rows):
        cells = [found.get((method, bits, *case), {}) for case in cases]
        width = next((c["bits_per_weight"] for c in cells if "bits_per_weight" in c), None)
        lines.append([f"{method} {bits}", "" if width is None else f"{width:.2f}",
                      *(_cell(c) for c in cells)])  # fmt: skip
    header = ["method, bits", "stored", *(f"{m} {r} {s}" for m, r, s in cases)]
    tables.show("KL relative to round-to-nearest (at tokens of rare experts)", header, lines)


def _cell(row: Row) -> str:
    if "kl_over_rtn" not in row:
        return "failed" if row.get("notes") else ""
    rare = row.get("kl_rare_over_rtn")
    return f"{row['kl_over_rtn']:.3f}" + ("" if rare is None else f" ({rare:.3f})")
