"""The sections of a page on two quantized folders, side by side."""

import json
from collections.abc import Callable
from typing import Any

import numpy as np

from qmoe.html_report.expert_sections import layer_errors
from qmoe.html_report.facts import Facts, short
from qmoe.html_report.plots import heat_map, lines
from qmoe.html_report.section import Figure, Section, Table
from qmoe.html_report.storage_sections import departures, provenance
from qmoe.packed.card_text import number, source_name
from qmoe.system.sizes import format_size


def intro(a: Facts, b: Facts) -> list[str]:
    """Whether the two are of one model at all."""
    same = a.report.get("source_sha256") == b.report.get("source_sha256")
    if same:
        return [f"Both were quantized from the same weights of {source_name(a.report)}."]
    names = f"{source_name(a.report)} and {source_name(b.report)}"
    return [
        f"They were quantized from different weights ({names}), so that their errors and scores "
        "say little about each other."
    ]


def sections(a: Facts, b: Facts) -> list[Section]:
    """All of a page on two folders, in order."""
    return [_settings(a, b), _quality(a, b), _errors(a, b), _routing(a, b), _bytes(a, b),
            *_own(departures, a, b), *_own(provenance, a, b)]  # fmt: skip


def _own(kind: Callable[[Facts], Section], *both: Facts) -> list[Section]:
    """The same section of each, with its name in the title."""
    found = []
    for facts in both:
        s = kind(facts)
        title = f"{s.title}: {facts.name}"
        found.append(Section(title, s.text, s.figures, s.tables, s.items, s.code))
    return found


def _settings(a: Facts, b: Facts) -> Section:
    ours, theirs = ({name: json.dumps(value) for name, value in f.settings()} for f in (a, b))
    differing = [n for n in dict.fromkeys([*ours, *theirs]) if ours.get(n) != theirs.get(n)]
    if not differing:
        return Section("Settings", ["Both have the same settings."])
    rows = [[name, ours.get(name, "not set"), theirs.get(name, "not set")] for name in differing]
    table = Table("Settings that differ", ["setting", a.name, b.name], rows)
    return Section("Settings", tables=[table])


def _quality(a: Facts, b: Facts) -> Section:
    found: list[dict[str, Any]] = [f.measured["eval"] for f in (a, b) if "eval" in f.measured]
    if len(found) < 2:
        missing = [facts.name for facts in (a, b) if "eval" not in facts.measured]
        said = f"There are no scores of {' and '.join(missing)}; this command records them:"
        return Section("Quality", [said], code=["qmoe eval PATH --against ORIGINAL --save"])
    text = []
    if found[0]["settings"] != found[1]["settings"]:
        text.append(f"The scores are of different text or dtypes: {found[0]['settings']} and "
                    f"{found[1]['settings']}.")  # fmt: skip
    tables = []
    for key, title, digits in (("perplexity", "Perplexity", 3), ("kl", "KL to the original", 5),
                               ("agreement", "Same first choice", 4)):  # fmt: skip
        scores = [e["scores"]["qmoe"] for e in found]
        domains = [d for d in scores[0] if d in scores[1]]
        if not domains or any(key not in s[domains[0]] for s in scores):
            continue
        rows = [[d, *(number(s[d][key], digits) for s in scores)] for d in domains]
        rows.append(["mean", *(number(e["overall"]["qmoe"][key], digits) for e in found)])
        tables.append(Table(title, ["domain", a.name, b.name], rows))
    return Section("Quality", text, tables=tables)


def _errors(a: Facts, b: Facts) -> Section:
    figures = []
    series: dict[str, list[float | None]] = {}
    names: list[str] = []
    for facts in (a, b):
        found, names = layer_errors(facts)
        if "output" in found:
            series[facts.name] = found["output"]
    if len({len(values) for values in series.values()}) == 1:
        alt = f"{a.name} and {b.name}: error of each layer's output"
        caption = "Error of each layer's output, as a share of the output."
        figures.append(Figure(lines(series, short(names), alt, "error, %"), caption))
    first, second = a.grid("errors"), b.grid("errors")
    if a.modules == b.modules and first.shape == second.shape:
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = np.log2(second / first)
        ratio[~np.isfinite(ratio)] = np.nan
        if not np.isnan(ratio).all():
            alt = f"{a.name} and {b.name}: ratio of every expert's errors"
            most = float(np.nanmax(np.abs(ratio)))
            svg = heat_map(ratio, short(a.modules), alt, "log2 of the ratio", (-most, most))
            said = (
                f"Error of every expert in {b.name} over that in {a.name}: red is more, blue less."
            )
            figures.append(Figure(svg, said))
    text = [
        f"No errors were measured in {facts.name}, which was rounded to nearest."
        for facts in (a, b)
        if facts.name not in series
    ]
    return Section("Errors", text, figures)


def _routing(a: Facts, b: Facts) -> Section:
    found = {f.name: f.measured.get("eval", {}).get("routing_kept", {}) for f in (a, b)}
    text = [
        f"On held-out text {name} keeps {np.mean(list(kept.values())):.2%} of the original's "
        "choices of experts in the mean."
        if kept
        else f"Nothing is recorded of {name}; `qmoe eval --against ORIGINAL --save` records it."
        for name, kept in found.items()
    ]
    names = list(dict.fromkeys(n for kept in found.values() for n in kept))
    series = {
        name: [100 * kept[n] if n in kept else None for n in names]
        for name, kept in found.items()
        if kept
    }
    if not series:
        return Section("Routing", text)
    alt = f"{a.name} and {b.name}: choices of experts kept"
    figure = Figure(lines(series, short(names), alt, "kept, %"), "Choices kept, by layer.")
    return Section("Routing", text, [figure])


def _bytes(a: Facts, b: Facts) -> Section:
    kinds = dict.fromkeys([*a.report["bytes"], *b.report["bytes"]])
    both = [facts.report["bytes"] for facts in (a, b)]
    rows = [
        [kind, *(format_size(n.get(kind, 0)) for n in both)]
        for kind in kinds
        if any(n.get(kind) for n in both)
    ]
    rows.append(["total", *(format_size(sum(n.values())) for n in both)])
    rows.append(["bits per packed weight", *(f"{facts.bits:.2f}" for facts in (a, b))])
    table = Table("Bytes on disk", ["kind", a.name, b.name], rows)
    return Section("Bytes and bits", tables=[table])
