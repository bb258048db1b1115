"""Options under their former names: they work, are left out of the help, and say what to write."""

import argparse
from collections.abc import Sequence
from typing import Any

from qmoe.system.printing import say

TEXT = {"--windows": "--samples", "--window": "--seqlen"}
# By command: the option that took its place, or what `--set` takes (with a value of its own behind
# a final "=").
RENAMED: dict[str, dict[str, str]] = {
    "eval": TEXT,
    "quantize": TEXT
    | {
        "--written": "--self-samples",
        "--search": "search_grid=true",
        "--no-search": "search_grid=false",
        "--feedback": "refit=true",
        "--no-feedback": "refit=false",
        "--no-act-order": "act_order=false",
        "--no-gate-weight": "routing_weighted=false",
        "--damp": "damp=",
        "--min-tokens": "min_tokens=",
        "--batch": "calibration.batch=",
        "--seed": "calibration.seed=",
        "--dense-group-size": "dense.group_size=",
        "--dense-asymmetric": "dense.symmetric=false",
    },
}


class Renamed(argparse.Action):
    """Does what the present form of an option does, and says how that is written."""

    def __init__(self, now: str, present: argparse.Action | None, **more: Any):
        self.now, self.present = now, present
        more["nargs"] = 1 if present is not None or now.endswith("=") else 0
        super().__init__(help=argparse.SUPPRESS, default=argparse.SUPPRESS, **more)

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        value = values[0] if values else ""
        if self.present is not None:
            setattr(namespace, self.present.dest, value)
            say(f"{option_string} is now {self.now} {value}")
        else:
            namespace.set = [*namespace.set, f"{self.now}{value}"]
            say(f"{option_string} is now --set {self.now}{value}")


def add_renamed(command: str, parser: argparse.ArgumentParser) -> None:
    """Have a command take its former options."""
    for old, now in RENAMED.get(command, {}).items():
        present = parser._option_string_actions.get(now)
        kind: Any = None if present is None else present.type
        parser.add_argument(old, action=Renamed, dest=old, now=now, present=present, type=kind)
