"""Sections on what is stored and how: bytes, bits, memory, what is not packed, and provenance."""

import json
import re
from collections import Counter

import numpy as np

from qmoe.html_report.facts import Facts, short
from qmoe.html_report.plots import heat_map, lines
from qmoe.html_report.section import Figure, Section, Table
from qmoe.packed.card_text import command, describe, source_name
from qmoe.system.sizes import format_size


def summary(facts: Facts) -> list[tuple[str, str]]:
    """The numbers that come first, each with its name."""
    report = facts.report
    total = sum(report["bytes"].values())
    found = [
        ("size on disk", format_size(total)),
        ("of the original", f"{total / max(report['source_bytes'], 1):.1%}"),
        ("bits per packed weight, scales included", f"{facts.bits:.2f}"),
        ("fallbacks", str(len(report["fallbacks"]))),
    ]
    scores = facts.measured.get("eval", {}).get("overall", {}).get("qmoe", {})
    if scores.get("kl") is not None:
        found.insert(3, ("KL to the original, nats per token", f"{scores['kl']:.5f}"))
        found.insert(4, ("tokens with the same first choice", f"{scores['agreement']:.1%}"))
    return found


def storage(facts: Facts) -> Section:
    """Bytes by kind, and bits by layer and expert."""
    nbytes, config = facts.report["bytes"], facts.config
    total = sum(nbytes.values())
    rows = [[kind, format_size(n), f"{n / max(total, 1):.1%}"] for kind, n in nbytes.items() if n]
    rows.append(["total", format_size(total), "100.0%"])
    schemes = [
        ["routed experts", describe(config.experts)],
        ["attention, shared experts, other linears", describe(config.dense)],
        ["lm_head", describe(config.lm_head)],
    ]
    figures = []
    names, widths = facts.widths()
    kinds = sorted({int(bits) for bits in widths[~np.isnan(widths)]})
    if len(kinds) > 1:
        said = f"Experts have between {kinds[0]} and {kinds[-1]} bits."
        alt = f"{facts.name}: bits of every expert"
        figures.append(Figure(heat_map(widths, short(names), alt, "bits"), "Bits of every expert."))
    else:
        said = f"Every expert of every layer has {kinds[0] if kinds else 16} bits."
    per_layer = [shard.bits for shard in facts.shards[:-1]]
    said += f" With scales and zero points, a packed weight takes {facts.bits:.2f} bits."
    if len(set(per_layer)) > 1:
        labels = [str(i) for i in range(len(per_layer))]
        alt = f"{facts.name}: bits per packed weight by layer"
        figures.append(
            Figure(
                lines({"bits": per_layer}, labels, alt, "bits per weight"),
                "Bits per packed weight by layer, scales and zero points included.",
            )
        )
    tables = [
        Table("How each part is stored", ["part", "stored as"], schemes),
        Table("Bytes on disk", ["kind", "bytes", "share"], rows),
    ]
    return Section("Bytes and bits", [said], figures, tables)


def memory(facts: Facts) -> Section:
    """What the plan expects beside what `qmoe bench` measured."""
    found = facts.measured.get("bench")
    if not found:
        return Section(
            "Memory and speed",
            ["Nothing is recorded. This command measures both and keeps them in the folder:"],
            code=[f"qmoe bench {facts.name} --against {source_name(facts.report)} --save"],
        )
    ours, given = found["models"]["qmoe"], found["settings"]
    measured = [["weights", ours["weights_in_memory"]]]
    for key, name in (("resident", "resident once loaded"), ("peak", "peak while answering")):
        if (n := ours.get(f"{key}_over_bare_process")) is not None:
            measured.append([f"{name}, beyond a process without a model", n])
    planned = found.get("planned", {})
    text = [
        f"Measured on {found['machine']} ({given['threads']} CPU threads) with {found['kernels']}."
    ]
    tables = [Table("Measured", ["what", "bytes"], [[n, format_size(b)] for n, b in measured])]
    if parts := planned.get("parts"):
        share = ours["weights_in_memory"] / planned["weights"] - 1
        text.append(
            f"The plan expects {format_size(planned['weights'])} of weights; measured were "
            f"{format_size(ours['weights_in_memory'])}, {share:+.2%} of that."
        )
        rows = [[name, format_size(n)] for name, n in parts]
        tables.append(Table("Planned, for a prompt of 128 tokens", ["part", "bytes"], rows))
    elif planned:
        text.append(f"There is no plan for this model: {planned['refused']}")
    speed = [
        [name, f"{m['prefill_tokens_per_s']:.0f}", f"{m['decode_tokens_per_s']:.1f}"]
        for name, m in found["models"].items()
    ]
    caption = (
        f"Speed with a prompt of {given['prompt']} tokens and {given['tokens']} decoded after it, "
        f"batch size {given['batch']}"
    )
    tables.append(Table(caption, ["model", "prompt tok/s", "decoding tok/s"], speed))
    return Section("Memory and speed", text, tables=tables)


def departures(facts: Facts) -> Section:
    """Every fallback, and every byte that is not packed."""
    lines_ = facts.report["fallbacks"]
    said = (
        f"The run departed from its settings in {len(lines_)} places."
        if lines_
        else "The run departed from its settings nowhere."
    )
    unpacked = {n: b for shard in facts.shards for n, b in shard.unpacked.items()}
    kinds: Counter[str] = Counter()
    tensors: Counter[str] = Counter()
    for name, nbytes in unpacked.items():
        kind = re.sub(r"\.\d+(?=\.|$)", ".*", name)
        kinds[kind] += nbytes
        tensors[kind] += 1
    rows = [[kind, str(tensors[kind]), format_size(n)] for kind, n in kinds.most_common()]
    rows.append(["total", str(len(unpacked)), format_size(sum(unpacked.values()))])
    kept = [[name, reason] for layer in facts.layers for name, reason in layer.unquantized.items()]
    tables = [
        Table("Tensors that are not packed, layers taken together", ["tensor", "count", "bytes"],
              rows)
    ]  # fmt: skip
    if kept:
        tables.append(Table("Modules that stay in 16 bits", ["module", "reason"], kept))
    return Section("Fallbacks and unpacked bytes", [said], tables=tables, items=lines_)


def provenance(facts: Facts) -> Section:
    """What the folder was made from, with what, and the command that makes it again."""
    report = facts.report
    source, text = report.get("source", {}), report.get("calibration", {})
    rows = [
        ["original", source_name(report)],
        ["revision", source.get("revision")],
        ["family", report.get("model_type")],
        ["SHA-256 of the original's weights", report.get("source_sha256")],
        ["SHA-256 of all that is not packed", report["unpacked_sha256"]],
        ["SHA-256 of the calibration tokens", text.get("sha256")],
        ["calibration samples x tokens", " x ".join(map(str, text.get("samples", [])))],
        ["of them generated by the model", text.get("self_samples")],
        ["qmoe", report.get("qmoe_version")],
    ]
    known = [[name, str(value)] for name, value in rows if value not in (None, "")]
    settings = [[name, json.dumps(value)] for name, value in facts.settings()]
    tables = [
        Table("Where it comes from", ["what", "value"], known),
        Table("All settings", ["setting", "value"], settings),
    ]
    said = "This command makes the same weights again."
    return Section("Provenance", [said], tables=tables, code=[command(report)])
