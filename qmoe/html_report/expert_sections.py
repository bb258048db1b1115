"""Sections on experts and quality: who is used, who saw too little, what each lost, where tokens
went, and how far the predictions are from the original's."""

from typing import Any

import numpy as np

from qmoe.html_report.facts import Facts, short
from qmoe.html_report.plots import heat_map, lines, ranked
from qmoe.html_report.section import Figure, Section, Table
from qmoe.packed.card_text import NAMES, behind_the_mean, number, source_name

WORST = 10  # experts in the table of the largest errors


def quality(facts: Facts) -> Section:
    """Scores beside the original and the baselines, by domain."""
    found = facts.measured.get("eval")
    if not found:
        return Section(
            "Quality",
            ["No comparison with the original is recorded. This command makes one and keeps it in "
             "the folder:"],
            code=[f"qmoe eval {facts.name} --against {source_name(facts.report)} --save"],
        )  # fmt: skip
    given = found["settings"]
    text = [
        f"Scored on {given['samples']} samples of {given['seqlen']} tokens in each domain, with "
        f"activations in {given['dtype']}. KL is the divergence from the original's predictions, "
        "in nats per token.",
        *found.get("not_better", []),
    ]
    models = [key for key in NAMES if key in found["scores"]]
    titles = {
        "perplexity": ("Perplexity", 3),
        "kl": ("KL to the original", 5),
        "agreement": ("Share of tokens with the same first choice", 4),
    }
    tables = []
    for key, (title, digits) in titles.items():
        if key not in found["overall"]["qmoe"]:
            continue
        shown = [m for m in models if key == "perplexity" or m != "original"]
        rows = [
            [domain, *(number(found["scores"][m][domain][key], digits) for m in shown)]
            for domain in found["scores"]["qmoe"]
        ]
        rows.append(["mean", *(number(found["overall"][m][key], digits) for m in shown)])
        tables.append(Table(title, ["domain", *(NAMES[m] for m in shown)], rows))
    return Section("Quality", [*text, *behind_the_mean(found)], tables=[*tables, *_single(found)])


def _single(found: dict[str, Any]) -> list[Table]:
    """Percentiles of KL over tokens, the worst tokens, and greedy answers."""
    tables = []
    models = [key for key in NAMES if key in found.get("tails", {})]
    if models:
        kinds = {"p95": "95th percentile", "p99": "99th percentile", "max": "largest"}
        kl = {m: found["tails"][m]["kl"]["all"] for m in models}
        rows = [[said, *(number(kl[m][kind], 4) for m in models)] for kind, said in kinds.items()]
        tables.append(Table("KL of single tokens", ["", *(NAMES[m] for m in models)], rows))
        worst = [[w["context"], w["token"], w["domain"], number(w["kl"], 3)]
                 for w in found["tails"]["qmoe"]["worst"]]  # fmt: skip
        tables.append(Table("Tokens of the largest KL", ["text", "token", "domain", "KL"], worst))
    if answers := found.get("answers"):
        rows = [
            [NAMES[m], f"{a['tokens']:.1f}", f"{a['ended']:.0%}", f"{a['repeated']:.1%}"]
            for m, a in answers.items()
            if m in NAMES
        ]
        header = ["model", "tokens", "ended by themselves", "repetition"]
        tables.append(Table("Greedy answers, means", header, rows))
    return tables


def use(facts: Facts) -> Section:
    """How often experts are chosen: on the calibration text, and by domain of held-out text."""
    labels, figures = short(facts.modules), []
    tokens = facts.grid("tokens")
    if not np.isnan(tokens).all():
        figures.append(
            Figure(
                heat_map(_even(tokens), labels, f"{facts.name}: use of experts in calibration",
                         "times the even share"),
                "Use on the calibration text. 1 is the share that every expert would have if all "
                "were used alike.",
            )
        )  # fmt: skip
    used = facts.used()
    text = ["Each row is a layer, each column an expert. Bright cells are chosen often."]
    if used:
        mean = sum(_even(grid) for grid in used.values()) / len(used)
        text.append(
            "The plots by domain show specialisation on held-out text: red experts are chosen more "
            "often in this domain than in the mean of all domains, blue ones less often."
        )
        names = short(list(next(iter(facts.measured["eval"]["experts_used"].values()))))
        beyond = {domain: _even(grid) - mean for domain, grid in used.items()}
        most = max(float(np.nanmax(np.abs(grid))) for grid in beyond.values())
        for domain, grid in beyond.items():
            alt = f"{facts.name}: use of experts on {domain}, beside the mean of all domains"
            svg = heat_map(grid, names, alt, "beyond the mean", (-most, most))
            figures.append(Figure(svg, f"Domain {domain}."))
    else:
        text.append(
            "Use by domain is recorded by `qmoe eval --save`, and is not recorded for this folder."
        )
    return Section("Use of experts", text, figures)


def _even(tokens: np.ndarray) -> np.ndarray:
    """Tokens as multiples of what every expert of the layer would get if all were used alike."""
    mean = np.nanmean(tokens, axis=1, keepdims=True)
    result: np.ndarray = tokens / np.where(mean > 0, mean, 1)
    return result


def coverage(facts: Facts) -> Section:
    """Which experts saw too few calibration tokens, and borrowed others'."""
    tokens, least = facts.grid("tokens"), facts.config.min_tokens
    seen = tokens[~np.isnan(tokens)]
    if not seen.size:
        return Section("Coverage", ["No calibration text ran through this model."])
    borrowed = sum(row["borrowed"] for row in facts.experts)
    text = [
        f"Of {seen.size} experts, {int((seen == 0).sum())} saw no token of the calibration text, "
        f"{int((seen < least).sum())} saw fewer than {least}, and {borrowed} borrowed tokens of "
        f"their layer. The median expert saw {int(np.median(seen))} tokens."
    ]
    svg = ranked(seen.tolist(), least, f"{facts.name}: calibration tokens of every expert")
    figure = Figure(svg, "Calibration tokens of every expert.")
    return Section("Coverage", text, [figure])


def errors(facts: Facts) -> Section:
    """What each expert and each layer lost."""
    grid, labels = facts.grid("errors"), short(facts.modules)
    figures, tables, text = [], [], []
    if not np.isnan(grid).all():
        text.append(
            "The error of a matrix is the root mean square of what rounding changed in its output, "
            "as a share of the output, on the calibration tokens. An expert's error is the root "
            "mean square over its matrices."
        )
        alt = f"{facts.name}: error of every expert"
        figures.append(
            Figure(heat_map(100 * grid, labels, alt, "error, %"), "Error of every expert.")
        )
        tables.append(_worst(facts))
    series, names = layer_errors(facts)
    if series:
        alt = f"{facts.name}: error of each layer's output"
        caption = "Error of each layer's output, as a share of the output."
        figures.append(Figure(lines(series, short(names), alt, "error, %"), caption))
    if not figures:
        text.append("Rounding to nearest measures no errors.")
    return Section("Errors", text, figures, tables)


def layer_errors(facts: Facts) -> tuple[dict[str, list[float | None]], list[str]]:
    """By stage: percent of every decoder layer; and the layers' names."""
    layers = [layer for layer in facts.layers if layer.experts or layer.error is not None]
    found = {"output": [_percent(layer.error) for layer in layers]}
    for stage in ("solved", "tuned"):
        found[stage] = [_percent(layer.tuning.get(stage)) for layer in layers]
    kept = {name: values for name, values in found.items() if any(v is not None for v in values)}
    return kept, [layer.name for layer in layers]


def _worst(facts: Facts) -> Table:
    rows = [row for row in facts.experts if row["errors"]]
    rows.sort(key=lambda row: -float(np.mean(np.square(row["errors"]))))
    shown = [
        [
            f"{row['experts']} [{row['expert']}]",
            " ".join(f"{100 * e:.2f}" for e in row["errors"]),
            str(row.get("tokens", "not known")),
            "yes" if row["borrowed"] else "no",
        ]
        for row in rows[:WORST]
    ]
    header = ["expert", "errors of its matrices, %", "tokens", "borrowed"]
    return Table("Experts with the largest errors", header, shown)


def routing(facts: Facts) -> Section:
    """The share of the original's choices of experts that the quantized model makes too."""
    measured: dict[str, float] = facts.measured.get("eval", {}).get("routing_kept", {})
    series: dict[str, list[float | None]] = {}
    tuned = {n: r.routing_kept for layer in facts.layers for n, r in layer.experts.items()}
    names = list(dict.fromkeys([*tuned, *measured]))
    for stage, words in (("solved", "before tuning"), ("tuned", "after tuning")):
        series[words] = [_percent(tuned.get(name, {}).get(stage)) for name in names]
    series["whole model, held-out text"] = [_percent(measured.get(n)) for n in names]
    series = {name: values for name, values in series.items() if any(v is not None for v in values)}
    if not series:
        said = "It is recorded by `qmoe eval --against ORIGINAL --save`, and by tuning."
        return Section("Routing", ["Nothing is recorded of the choice of experts.", said])
    text = [
        "The plot shows how many of the original's choices of experts the quantized model makes "
        "too. A token that goes to another expert loses that expert's whole contribution."
    ]
    if measured:
        mean, worst = np.mean(list(measured.values())), min(measured, key=lambda n: measured[n])
        text.append(
            f"On held-out text {mean:.2%} of the choices are kept in the mean, and "
            f"{measured[worst]:.2%} in {worst}, the worst layer."
        )
    svg = lines(series, short(names), f"{facts.name}: choices of experts kept", "kept, %")
    return Section("Routing", text, [Figure(svg, "Choices of experts that are kept, by layer.")])


def _percent(share: Any) -> float | None:
    return None if share is None else 100 * float(share)
