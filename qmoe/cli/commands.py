"""What each subcommand of the CLI does, and how its result is shown to a person (that of `qmoe
plan` in plan.py)."""

import argparse
from typing import Any

import torch

from qmoe.checkpoint.folders import read_json
from qmoe.checkpoint.model_folder import ModelFolder
from qmoe.cli import tables
from qmoe.cli.budget import budget_of, show_budget, to_size
from qmoe.cli.check import check, show_check
from qmoe.cli.export import export, show_export
from qmoe.cli.families import families, show_families
from qmoe.cli.heat_map import heat_map, is_mixed
from qmoe.cli.info import info, show_info
from qmoe.cli.measure import bench, eval, show_bench, show_eval
from qmoe.cli.plan import plan, show_plan
from qmoe.cli.settings import config_from, to_toml
from qmoe.errors import (
    CheckpointError,
)
from qmoe.model.experts import expert_weights, stack
from qmoe.model.source import open_source
from qmoe.packed.audit import audit_folder
from qmoe.packed.report import REPORT, expert_rows, read_report
from qmoe.packed.widths import widths
from qmoe.pipeline.quantize import quantize as run_quantize
from qmoe.prediction.attach import add_prediction
from qmoe.prediction.stored import in_words
from qmoe.system import distributed
from qmoe.system.sizes import format_size

__all__ = [
    "bench", "check", "eval", "export", "families", "info", "inspect", "plan", "quantize", "report",
    "show_bench", "show_check", "show_eval", "show_export", "show_families", "show_info",
    "show_inspect", "show_plan", "show_quantize", "show_report",
]  # fmt: skip


def quantize(args: argparse.Namespace) -> dict[str, Any]:
    """`qmoe quantize`: returns the report."""
    distributed.join()
    lead = distributed.rank() == 0
    how = {
        "device": args.device,
        "max_memory": args.max_memory,
        "progress": lead,
        "trust_remote_code": args.trust_remote_code,
    }
    if (budget := budget_of(args)) is not None:
        report = to_size(args, budget, how)
    else:
        report = run_quantize(
            args.src,
            args.dst,
            config_from(args),
            statistics_from=args.statistics,
            save_statistics=args.save_statistics,
            **how,
        )
    distributed.leave()
    return report if lead else {}


def show_quantize(report: dict[str, Any]) -> None:
    if "budget" in report:
        show_budget(report["budget"])
    total = sum(report["bytes"].values())
    title = f"{format_size(report['source_bytes'])} became {format_size(total)}, audit passed"
    tables.show(title, ["bytes", "", "share"], tables.bytes_rows(report["bytes"]))
    rows = [[r["name"], _share(r["error"])] for r in report["layers"]]
    tables.show("relative RMS error of each layer's output", ["layer", "error"], rows)
    _show_lines(in_words(report.get("prediction", {})))
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


def report(args: argparse.Namespace) -> dict[str, Any]:
    """`qmoe report`: the page that is written, and its size."""
    from qmoe.html_report.report import report as page

    made = page(args.path, args.compare, trust_remote_code=args.trust_remote_code)
    path = made.save(args.output)
    return {"output": str(path), "nbytes": path.stat().st_size}


def show_report(result: dict[str, Any]) -> None:
    print(f"{result['output']}: {format_size(result['nbytes'])}; open it in a browser")


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
    result: dict[str, Any] = {
        "bytes": audit.bytes,
        "widths": widths(folder),
        "prediction": audit.prediction,
    }
    if reported:
        result |= {"config": report["config"], "fallbacks": report["fallbacks"]}
        if args.experts:
            result["experts"] = expert_rows(path, report)
    elif args.experts:
        raise CheckpointError(f"{path}: it has no {REPORT}, so nothing is known of single experts")
    return result


def _parts(folder: ModelFolder) -> list[dict[str, Any]]:
    source = open_source(folder, torch.float32, add_prediction)
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
    _show_lines(in_words(result["prediction"]))
    _show_lines(result.get("fallbacks", []))
    if is_mixed(result["widths"]):
        print("\n".join(heat_map(result["widths"])))
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
