"""What `qmoe export` does, and how its result is shown to a person."""

import argparse
from pathlib import Path
from typing import Any

from qmoe.checkpoint.model_folder import ModelFolder
from qmoe.cli import tables
from qmoe.errors import ConfigError
from qmoe.system.progress import is_shown
from qmoe.system.sizes import format_size


def export(args: argparse.Namespace) -> dict[str, Any]:
    """`qmoe export`."""
    try:
        from qmoe.export.to_gguf import export as run_export
    except ModuleNotFoundError as error:
        if error.name != "gguf":
            raise
        raise ConfigError(
            "export: the package `gguf` is not installed; pip install 'qmoe[gguf]'"
        ) from error
    folder = ModelFolder.find(args.path, args.trust_remote_code)
    dst = Path(args.out or f"{Path(args.path).resolve().name}.{args.to}")
    return run_export(folder, dst, tokenizer=not args.no_tokenizer, progress=is_shown())


def show_export(result: dict[str, Any]) -> None:
    rows = [
        [name, str(row["tensors"]), format_size(row["bytes"])]
        for name, row in result["types"].items()
    ]
    title = f"{result['file']}: {format_size(result['bytes'])}, {result['architecture']}"
    tables.show(title, ["type", "tensors", "bytes"], rows)
    for note in result["notes"]:
        print(note)
