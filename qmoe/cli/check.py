"""What `qmoe check` does, and how its result is shown to a person."""

import argparse
from typing import Any

from qmoe.engines.check import check as run_check


def check(args: argparse.Namespace) -> dict[str, Any]:
    """`qmoe check`."""
    return run_check(
        args.path,
        args.engine,
        tp=args.tp,
        device=args.device,
        trust_remote_code=args.trust_remote_code,
    )


def show_check(result: dict[str, Any]) -> None:
    engine = f"{result['engine']} {result['version']}"
    for broken in result["broken"]:
        others = f" (and {broken['count'] - 1} more)" if broken["count"] > 1 else ""
        print(f"{broken['name']}{others}: {broken['found']}.")
        print(f"    {broken['rule']}")
        print(f"    {broken['remedy']}")
        print(f"    source: {broken['source']}")
    count = len(result["broken"])
    said = (
        f"{count} rule{'s are' if count > 1 else ' is'} broken" if count else "all rules are kept"
    )
    print(f"{engine}: {said}. {result['note']}")
