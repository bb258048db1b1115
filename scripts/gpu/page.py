"""docs/gpu/<device>.md from the JSON of scripts/gpu_check.py, and a plot where matplotlib is."""

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

from gpu.uninstalled import ROOT

DOCS = ROOT / "docs" / "gpu"
Rows = list[dict[str, Any]]


def page(folder: Path) -> Path:
    """Write the page of a folder of results, with the results beside it; returns its path."""
    found = {p.stem: json.loads(p.read_text()) for p in sorted(folder.glob("*.json"))}
    steps = {name: value for name, value in found.items() if "rows" in value}
    here = steps["environment"]["rows"][0]
    name = re.sub(r"[^A-Za-z0-9]+", "_", here["device"])
    (DOCS / name).mkdir(parents=True, exist_ok=True)
    for step in steps:
        if folder.resolve() != (DOCS / name).resolve():
            shutil.copy(folder / f"{step}.json", DOCS / name)
    versions = {k: v for k, v in here.items() if k not in ("device", "GB", "read_gbps")}
    lines = [
        f"# {here['device']}", "",
        "Written by `python scripts/gpu_check.py --out DIR --page` from the JSON in "
        f"[{name}/]({name}/). Every output was compared with a reference before it was timed.", "",
        f"Reads {here['read_gbps']:.0f} GB/s, measured. "
        + ", ".join(f"{k} {v}" for k, v in versions.items()) + ".", "",
        "| step | result |", "|---|---|",
        *(f"| {step} | {_result(value)} |" for step, value in steps.items()), "",
    ]  # fmt: skip
    for step in ("decode", "small", "prefill", "widths", "exl3"):
        if rows := steps.get(step, {}).get("rows"):
            lines += [f"## {step}", "", *layer_table(rows), ""]
    for step in ("layers4", "layers12"):
        if rows := steps.get(step, {}).get("rows"):
            lines += [f"## end to end, {step.removeprefix('layers')} layers", "", *plain(rows), ""]
    for step in ("models", "kernels", "every kernel test", "sanitizer"):
        if rows := steps.get(step, {}).get("rows"):
            lines += [f"## {step}", "", *(f"- {_words(row)}" for row in rows), ""]
    rows = [r for s in ("decode", "small", "prefill") for r in steps.get(s, {}).get("rows", [])]
    if rows and plot(rows, DOCS / f"{name}.png"):
        lines += [f"![times against bf16]({name}.png)", ""]
    path = DOCS / f"{name}.md"
    path.write_text("\n".join(lines))
    return path


def layer_table(rows: Rows) -> list[str]:
    """Microseconds, and what they amount to."""
    header = ["layer", "bits", "tokens", "qmoe us", "bf16 us", "bf16 / qmoe", "NF4 us",
              "plain loop us", "GB/s", "of read", "TFLOP/s", "error"]  # fmt: skip
    keys = (("qmoe_us", ".1f"), ("bf16_us", ".1f"), ("times_bf16", ".2f"), ("nf4_us", ".0f"),
            ("plain loop_us", ".0f"), ("gbps", ".0f"), ("share_of_read", ".0%"),
            ("tflops", ".0f"), ("error", ".2%"))  # fmt: skip
    out = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for row in rows:
        cells = [format(row[key], form) if key in row else "-" for key, form in keys]
        group = row["group"]
        name = f"{row['layer']} {group if group == 'exl3' else f'g{group}'}"
        out.append("| " + " | ".join([name, row["bits"], str(row["tokens"]), *cells]) + " |")
    return out


def plain(rows: Rows) -> list[str]:
    """Rows as they are."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    body = [" | ".join(_short(row.get(key, "-")) for key in keys) for row in rows]
    return [f"| {' | '.join(keys)} |", "|---" * len(keys) + "|", *(f"| {line} |" for line in body)]


def plot(rows: Rows, path: Path) -> bool:
    """Times faster than bf16 by number of tokens; whether there is a plot."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("matplotlib is missing: the page has no plot")
        return False
    axes = (figure := Figure(figsize=(7, 4))).subplots()
    for layer in dict.fromkeys(row["layer"] for row in rows):
        mine = sorted((r["tokens"], r["times_bf16"]) for r in rows
                      if r["layer"] == layer and "times_bf16" in r)  # fmt: skip
        axes.plot(*zip(*mine, strict=True), marker="o", label=layer)
    axes.axhline(1, color="grey", linewidth=1)
    axes.set(xscale="log", xlabel="tokens", ylabel="bf16 time / qmoe time", title="4 bits")
    axes.legend()
    figure.savefig(path, dpi=110, bbox_inches="tight")
    return True


def _result(step: dict[str, Any]) -> str:
    status = "cut short" if step["status"] == "running" else step["status"]
    return status + "".join(f"; {text}" for text in step["problems"])[:300].replace("\n", " ")


def _words(row: dict[str, Any]) -> str:
    return ", ".join(f"{key}: {_short(value)}" for key, value in row.items())


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    print(page(Path(sys.argv[1])))
