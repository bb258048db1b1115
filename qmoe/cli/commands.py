"""What each subcommand of the CLI does, and how its result is shown to a person (that of `qmoe
plan` in plan.py)."""

import argparse
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers

from qmoe.calibration.text import merged
from qmoe.checkpoint.folders import read_json
from qmoe.checkpoint.model_folder import ModelFolder
from qmoe.cli import tables
from qmoe.cli.options import STORED
from qmoe.cli.plan import plan, show_plan
from qmoe.cli.settings import config_from, to_toml
from qmoe.errors import (
    AuditError,
    CheckpointError,
    ConfigError,
    QmoeError,
    UnsupportedModelError,
)
from qmoe.measure.baselines import check_counts
from qmoe.measure.bench import benchmark
from qmoe.measure.evaluate import evaluate
from qmoe.measure.scores import relative
from qmoe.model.experts import expert_weights, stack
from qmoe.model.source import open_source
from qmoe.packed.audit import audit_folder
from qmoe.packed.load import Loading
from qmoe.packed.report import REPORT, expert_rows, read_report
from qmoe.pipeline.quantize import quantize as run_quantize
from qmoe.system import distributed
from qmoe.system.progress import progress, shown
from qmoe.system.sizes import format_size

__all__ = [
    "bench", "eval", "families", "inspect", "plan", "quantize",
    "show_bench", "show_eval", "show_families", "show_inspect", "show_plan", "show_quantize",
]  # fmt: skip


def quantize(args: argparse.Namespace) -> dict[str, Any]:
    """`qmoe quantize`: returns the report."""
    distributed.join()
    lead = distributed.rank() == 0
    report = run_quantize(
        args.src,
        args.dst,
        config_from(args),
        statistics_from=args.statistics,
        save_statistics=args.save_statistics,
        device=args.device,
        max_memory=args.max_memory,
        progress=lead,
        trust_remote_code=args.trust_remote_code,
    )
    distributed.leave()
    return report if lead else {}


def show_quantize(report: dict[str, Any]) -> None:
    total = sum(report["bytes"].values())
    title = f"{format_size(report['source_bytes'])} became {format_size(total)}, audit passed"
    tables.show(title, ["bytes", "", "share"], tables.bytes_rows(report["bytes"]))
    rows = [[r["name"], _share(r["error"])] for r in report["layers"]]
    tables.show("relative RMS error of each layer's output", ["layer", "error"], rows)
    fallbacks = report["fallbacks"]
    print(f"{len(fallbacks)} fallbacks{':' if fallbacks else ''}")
    _show_lines(fallbacks)
    if report["rotated"] or not report["symmetric"]:
        what = "rotated weights" if report["rotated"] else "zero points"
        print(f"{what}: this checkpoint loads in qmoe, not in plain transformers")


def _show_lines(lines: list[str], most: int = 20) -> None:
    for line in lines[:most]:
        print(f"  {line}")
    if len(lines) > most:
        print(f"  and {len(lines) - most} more: see qmoe_report.json, or --json")


def families(args: argparse.Namespace) -> dict[str, Any]:
    """`qmoe families`: what is known, and with --check proven, of each; AuditError if a check of a
    family that is not refused fails."""
    from qmoe.measure import families as known
    from qmoe.measure.family_check import CONFIG, check

    if args.rotate != "off" and not args.check:
        raise ConfigError("--rotate: says how models are checked; add --check")
    config = replace(CONFIG, rotate=args.rotate)
    found = {family.model_type: family for family in known.families()}
    if unknown := [name for name in args.names if name not in found]:
        raise ConfigError(f"{unknown[0]}: not an MoE language model of this transformers")
    rows, failed = [], []
    for family in progress([found[name] for name in args.names or found], "families"):
        row = {"family": family.model_type, "reads": family.reads, "model": family.head}
        try:
            row["experts"] = known.layout(family)
            if args.check:
                with TemporaryDirectory(prefix="qmoe-families-") as folder, shown(False):
                    check(family, Path(folder), config)
            row["result"] = "passed" if args.check else "supported"
        except UnsupportedModelError as error:
            row["result"] = str(error)
        except QmoeError as error:
            failed.append(f"{family.model_type}: {error}")
        rows.append(row)
    if failed:
        raise AuditError("\n".join([f"{len(failed)} of {len(rows)} families failed", *failed]))
    return {"transformers": transformers.__version__, "families": rows}


def show_families(result: dict[str, Any]) -> None:
    rows = result["families"]
    good = [row for row in rows if row["result"] in ("passed", "supported")]
    tables.show(
        f"MoE language models of transformers {result['transformers']}",
        ["family", "reads", "experts", "result"],
        [
            [row["family"], row["reads"], row.get("experts", ""), row["result"]]
            if row in good
            else [row["family"], row["reads"], row.get("experts", ""), "refused, see below"]
            for row in rows
        ],
    )
    for row in rows:
        if row not in good:
            print(f"{row['family']}: {row['result']}")
    print(f"{len(good)} of {len(rows)} {good[0]['result'] if good else 'supported'}")


def _share(error: float | None) -> str:
    return "not measured" if error is None else f"{100 * error:.2f} %"


def inspect(args: argparse.Namespace) -> dict[str, Any]:
    """`qmoe inspect`: an audit of a quantized folder or its settings, or the parts of one that is
    not quantized."""
    folder = ModelFolder.find(args.path, args.trust_remote_code)
    path = folder.path
    if read_json(path / "config.json").get("quantization_config") is None:
        if args.experts or args.config:
            what = "experts" if args.experts else "settings"
            raise CheckpointError(f"{path}: not quantized, so there is no record of its {what}")
        return {"parts": _parts(folder)}
    reported = (path / REPORT).is_file()
    report = read_report(path) if reported else {}
    if args.config:
        if not reported:
            raise CheckpointError(f"{path}: it has no {REPORT}, so its settings are not known")
        return {"settings": report["config"]}
    digests, unpacked = report.get("digests"), report.get("unpacked_sha256")
    audit = audit_folder(folder, digests, unpacked)
    result: dict[str, Any] = {"bytes": audit.bytes}
    if reported:
        result |= {"config": report["config"], "fallbacks": report["fallbacks"]}
        if args.experts:
            result["experts"] = expert_rows(path, report)
    elif args.experts:
        raise CheckpointError(f"{path}: it has no {REPORT}, so nothing is known of single experts")
    return result


def _parts(folder: ModelFolder) -> list[dict[str, Any]]:
    source = open_source(folder, torch.float32)
    parts = []
    for layer in source.structure.layers:
        for name in layer.experts:
            module = source.model.get_submodule(name)
            shapes = [list(stack(module, w).shape) for w in expert_weights(module)]
            parts.append({"name": name, "shapes": shapes})
        for name in [*layer.unfused_linears(), *layer.dense]:
            parts.append(
                {"name": name, "shapes": [list(source.model.get_submodule(name).weight.shape)]}
            )
    return parts


def show_inspect(result: dict[str, Any]) -> None:
    if "settings" in result:
        print(to_toml(result["settings"]))
        return
    if "parts" in result:
        rows = [[p["name"], ", ".join(map(str, p["shapes"]))] for p in result["parts"]]
        tables.show("not quantized; what qmoe would quantize", ["module", "shapes"], rows)
        return
    tables.show("audit passed", ["bytes", "", "share"], tables.bytes_rows(result["bytes"]))
    _show_lines(result.get("fallbacks", []))
    if "experts" in result:
        rows = [
            [
                f"{r['experts']}[{r['expert']}]",
                str(r.get("tokens", "-")),
                f"{r.get('routing_mass', 0):.1f}",
                " ".join(f"{100 * e:.2f}" for e in r["errors"]),
                "yes" if r["borrowed"] else "",
            ]
            for r in result["experts"]
        ]
        header = ["expert", "tokens", "routing mass", "output errors (%)", "borrowed"]
        tables.show("experts", header, rows)


def eval(args: argparse.Namespace) -> dict[str, Any]:
    """`qmoe eval`."""
    return evaluate(
        args.path,
        against=args.against,
        baselines=args.baseline,
        text=merged(args.text or ["heldout"]),
        samples=args.samples,
        seqlen=args.seqlen,
        batch=args.batch,
        loading=_loading(args, None if args.dtype == STORED else getattr(torch, args.dtype)),
    )


def _loading(args: argparse.Namespace, dtype: torch.dtype | None) -> Loading:
    return Loading(
        dtype,
        args.device,
        args.expert_memory,
        args.trust_remote_code,
        args.activations,
        cache=not args.no_cache,
    )


def show_eval(result: dict[str, Any]) -> None:
    scores, overall = result["scores"], result["overall"]
    titles = {
        "perplexity": ("perplexity (mean: geometric)", 3),
        "kl": ("KL to the original, nats per token", 5),
        "agreement": ("share of tokens with the same top-1", 4),
    }
    for key, (title, digits) in titles.items():
        if key not in next(iter(overall.values())):
            continue
        rows = tables.scores_rows(scores, key, digits)
        rows.append(["mean", *(f"{m[key]:.{digits}f}" for m in overall.values())])
        tables.show(title, ["domain", *scores], rows)
    if "rtn" in overall and "kl" in overall["rtn"]:
        ratios = [
            [d, *(_ratio(m[d]["kl"], scores["rtn"][d]["kl"]) for m in scores.values())]
            for d in scores["rtn"]
        ]
        ratios.append(["mean", *(_ratio(m["kl"], overall["rtn"]["kl"]) for m in overall.values())])
        tables.show("KL relative to round-to-nearest", ["domain", *scores], ratios)
    rows = [[name, format_size(n)] for name, n in result["bytes_on_disk"].items()]
    tables.show("weights on disk", ["model", "bytes"], rows)
    for note in [*result["fallbacks"], *result["not_better"]]:
        print(note)


def _ratio(kl: float, to: float) -> str:
    found = relative(kl, to)
    return "-" if found is None else f"{found:.3f}"


def bench(args: argparse.Namespace) -> dict[str, Any]:
    """`qmoe bench`."""
    if args.threads is not None:
        check_counts(threads=args.threads)
        torch.set_num_threads(args.threads)
    return benchmark(
        args.path,
        against=args.against,
        baselines=args.baseline,
        prompt=args.prompt,
        tokens=args.tokens,
        batch=args.batch,
        repeats=args.repeats,
        loading=_loading(args, None),
    )


def show_bench(result: dict[str, Any]) -> None:
    header = ["model", "prefill tok/s", "first token ms", "decode tok/s", "bytes/token", "weights"]
    if "of_read_bandwidth" in result["qmoe"]:
        header.append("of read bandwidth")
    memory = {"resident_over_bare_process": "resident", "peak_over_bare_process": "peak"}
    memory = {key: title for key, title in memory.items() if key in result["qmoe"]}
    rows = [
        [
            name,
            f"{r['prefill_tokens_per_s']:.0f}",
            f"{r['first_token_ms']:.1f}",
            f"{r['decode_tokens_per_s']:.1f}",
            format_size(r["bytes_per_token"]),
            format_size(r["weights_in_memory"]),
            *([f"{r['of_read_bandwidth']:.0%}"] if "of_read_bandwidth" in r else []),
            *(format_size(r[key]) for key in memory),
        ]
        for name, r in result.items()
    ]
    threads = torch.get_num_threads()
    title = f"medians, models taking turns, {threads} CPU threads"
    tables.show(title, [*header, *memory.values()], rows)
    if memory:
        print("resident and peak: a process of its own, less the same process without a model")
