"""`qmoe families`: which MoE families the installed transformers has, and the proof for each."""

import argparse
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import transformers

from qmoe.cli import tables
from qmoe.errors import AuditError, ConfigError, QmoeError, UnsupportedModelError
from qmoe.system.progress import progress, shown


def families(args: argparse.Namespace) -> dict[str, Any]:
    """`qmoe families`: what is known, and with --check proven, of each; AuditError if a check of a
    family that is not refused fails."""
    from qmoe.measure import families as known
    from qmoe.measure.family_check import CONFIG, check
    from qmoe.measure.plain_transformers import beside_plain, plain_client

    if args.rotate != "off" and not args.check:
        raise ConfigError("--rotate: says how models are checked; add --check")
    config = replace(CONFIG, rotate=args.rotate)
    found = {family.model_type: family for family in known.families()}
    if unknown := [name for name in args.names if name not in found]:
        raise ConfigError(f"{unknown[0]}: not an MoE language model of this transformers")
    rows, failed = [], []
    with ExitStack() as stack:
        # A rotation does not change what transformers finds in a folder.
        plain = args.check and args.rotate == "off"
        client = stack.enter_context(plain_client()) if plain else None
        for family in progress([found[name] for name in args.names or found], "families"):
            row = {"family": family.model_type, "reads": family.reads, "model": family.head}
            try:
                row["experts"] = known.layout(family)
                with TemporaryDirectory(prefix="qmoe-families-") as folder, shown(False):
                    if args.check:
                        check(family, Path(folder), config)
                    if client is not None:
                        row["without qmoe"] = beside_plain(family, Path(folder), client)
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
    beside = any("without qmoe" in row for row in rows)
    tables.show(
        f"MoE language models of transformers {result['transformers']}",
        ["family", "reads", "experts", "result", *["transformers without qmoe"] * beside],
        [
            [
                row["family"],
                row["reads"],
                row.get("experts", ""),
                row["result"] if row in good else "refused, see below",
                *[row.get("without qmoe", "")] * beside,
            ]
            for row in rows
        ],
    )
    for row in rows:
        if row not in good:
            print(f"{row['family']}: {row['result']}")
    print(f"{len(good)} of {len(rows)} {good[0]['result'] if good else 'supported'}")
    if beside:
        from qmoe.measure.plain_transformers import EQUAL

        equal = sum(row.get("without qmoe") == EQUAL for row in rows)
        print(f"{equal} of {len(rows)} give equal logits in transformers without qmoe")
