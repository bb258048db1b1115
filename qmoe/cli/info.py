"""What `qmoe info` does, and how its result is shown to a person."""

import argparse
from typing import Any

from qmoe.cli import tables
from qmoe.measure.environment import environment
from qmoe.runtime.prepared import remove_prepared
from qmoe.system.sizes import format_size


def info(args: argparse.Namespace) -> dict[str, Any]:
    """`qmoe info`."""
    removed = [] if args.clear_cache is None else remove_prepared(args.clear_cache)
    return environment() | {"removed": [str(file.path) for file in removed]}


def show_info(result: dict[str, Any]) -> None:
    cpu, memory = result["cpu"], result["memory"]
    rows = [
        ["qmoe", result["qmoe"]],
        ["Python", result["python"]],
        *([name, version or "not installed"] for name, version in result["packages"].items()),
        ["platform", result["platform"]],
        ["CPU", f"{cpu['name']}, {cpu['cores']} cores, {cpu['threads']} threads"],
        ["CPU instructions", " ".join(cpu["features"]) or "unknown"],
        ["CPU kernels", cpu["kernels"]],
        *(
            [f"GPU {i}", f"{gpu['name']}, {format_size(gpu['memory'])}; {gpu['kernels']}"]
            for i, gpu in enumerate(result["gpus"])
        ),
        *([] if result["gpus"] else [["GPU", "none that torch can use"]]),
        ["memory", f"{format_size(memory['total'])}, {_free(memory)}"],
    ]
    for name, value in rows:
        print(f"{name + ':':<20}{value}")
    _show_cache(result["cache"])
    for path in result["removed"]:
        print(f"removed {path}")


def _free(memory: dict[str, Any]) -> str:
    return f"{format_size(memory['free'])} are free {memory['free_is']}"


def _show_cache(cache: dict[str, Any]) -> None:
    files = cache["files"]
    total = format_size(sum(file["nbytes"] for file in files))
    where = cache["folder"] or "there is no home folder to keep one in"
    print(f"{'cache:':<20}{where}, {len(files)} files, {total}")
    if files:
        rows = [
            [file["path"], format_size(file["nbytes"]), f"{file['unused_days']:.1f}"]
            for file in files
        ]
        header = ["prepared weights", "size", "days since last read"]
        tables.show("remove them with --clear-cache, or --clear-cache DAYS", header, rows)
