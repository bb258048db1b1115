"""The section on a budget of bytes: what was planned for it, and what other budgets would bring."""

from typing import Any

from qmoe.html_report.facts import Facts
from qmoe.html_report.plots import curve
from qmoe.html_report.section import Figure, Section, Table
from qmoe.system.sizes import format_size


def budget(facts: Facts) -> list[Section]:
    """Nothing for a folder that was made without a budget."""
    found = facts.report.get("budget")
    if not found:
        return []
    text = [
        "Bits were chosen for every matrix, by what each was measured to cost. The planned model "
        "and the uniform one of the same bytes were both made, compared with the original on the "
        f"same held-out text, and the {found['written']} one was written.",
    ]
    rows = [
        [
            name,
            f"{found['bits'][name]:.3f}",
            format_size(found["weight_files"][name]),
            f"{found['predicted_kl']:.5f}" if name == "planned" else "-",
            f"{kl['overall']:.5f}",
            f"{kl['p99']:.4f}",
        ]
        for name, kl in found["kl"].items()
    ]
    header = ["model", "bits", "weight files", "predicted KL", "KL", "KL, 99th percentile"]
    caption = "Planned and uniform on held-out text, KL in nats per token"
    return [Section("Budget", text, _figures(facts, found), [Table(caption, header, rows)])]


def _figures(facts: Facts, found: dict[str, Any]) -> list[Figure]:
    """None for a report of a version that did not record the curve."""
    if not found.get("curve"):
        return []
    line = [(point["bits"], point["predicted_kl"]) for point in found["curve"]]
    points = {name: (found["bits"][name], kl["overall"]) for name, kl in found["kl"].items()}
    alt = f"{facts.name}: KL by bits on average, predicted for the best choice and measured"
    svg = curve(line, points, alt)
    said = (
        "The line is the KL that was predicted for the best choice of every average, scales "
        "counted; the marks are what was measured. Predictions rank choices; their size may be off."
    )
    return [Figure(svg, said)]
