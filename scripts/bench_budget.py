"""Bytes against KL: bits chosen for every matrix, beside uniform bits.

    python -P scripts/bench_budget.py MODEL --corpus DIR --work DIR --out docs/budget

DIR holds `<domain>.train.txt` and `<domain>.test.txt`. Calibration text is of all domains (matched)
or of essays alone (mismatched); KL to the original is measured on the first samples of every
domain's test text, in float32. Everything is in groups of 128 with zero points, attention's linears
too, and embeddings stay in 16 bits, as in scripts/bench_quality.py; planned models may have one
scale per channel instead of groups. Uniform models have 2, 3 and 4 bits; planned ones have their
sizes, and sizes between and beyond. Each result is kept in the work
folder, so the same command goes on where it stopped. Writes CSV and, where matplotlib is installed,
PNG and SVG.
"""

import argparse
import csv
import json
import os
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}

from qmoe.budget.choose import choose, uniform
from qmoe.budget.guard import GuardText, divergences
from qmoe.budget.memory import Disk, average_bits, bytes_for
from qmoe.budget.quantize import base_config, measured
from qmoe.checkpoint.model_folder import ModelFolder
from qmoe.config import QuantConfig, Scheme
from qmoe.pipeline.plan import check
from qmoe.pipeline.quantize import quantize

REGIMES = {"matched": "*.train.txt", "mismatched": "essays.train.txt"}
ALIKE = [2.140625, 3.1484375, 4.15625]  # bits of uniform 2, 3 and 4 with scales and zero points
OTHERS = [2.4, 2.8, 3.6, 5.0, 6.5]
COLUMNS = ["model", "preset", "regime", "seed", "kind", "bits", "bytes", "predicted", "kl", "ratio"]


def main() -> int:
    args = _arguments()
    args.work.mkdir(parents=True, exist_ok=True)
    args.out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for seed in args.seeds:
        for regime in args.regime:
            rows += _regime(args, regime, seed)
    _relate(rows)
    with (args.out / f"{args.model.name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    for row in rows:
        print(" ".join(f"{row[name]!s:>12.12}" for name in COLUMNS if name != "model"))
    drawn = draw(rows, args.out / args.model.name)
    print("" if drawn else "no plot: matplotlib is not installed")
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("docs/budget"))
    parser.add_argument("--preset", default="balanced")
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--regime", nargs="+", choices=REGIMES, default=list(REGIMES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--samples", type=int, default=16, help="of each domain's test text")
    parser.add_argument("--bits", nargs="+", type=float, default=ALIKE + OTHERS)
    return parser.parse_args()


def _regime(args: argparse.Namespace, regime: str, seed: int) -> list[dict[str, Any]]:
    """Rows of one choice of calibration text."""
    scheme = Scheme(4, args.group_size, symmetric=False)
    text = str(args.corpus / REGIMES[regime])
    given = QuantConfig.preset(
        args.preset, experts=scheme, dense=scheme, text=text, seqlen=256, seed=seed
    )
    base = base_config(given)
    how: dict[str, Any] = {"device": "cpu", "max_memory": None, "trust_remote_code": False}
    stem = args.work / f"{args.model.name}-{args.preset}-{regime}-{seed}"
    plan = check(args.model, stem.with_name(f"{stem.name}-out"), base, statistics_from=(),
                 save_statistics=None, **how)  # fmt: skip
    found = measured(plan, stem, partial(quantize, progress=False, **how))
    rows = []
    for bits in args.bits:
        budget = bytes_for(plan.source, base, bits)
        chosen = choose(Disk(plan.source), base, found, budget)
        configs = {"planned": (chosen.config, chosen.predicted)}
        rival = uniform(Disk(plan.source), base, budget)
        if rival is not None and bits in ALIKE:
            configs["uniform"] = (rival, None)
        for kind, (config, predicted) in configs.items():
            about = {"model": args.model.name, "preset": args.preset, "regime": regime,
                     "seed": seed, "kind": kind, "predicted": predicted,
                     "bits": round(average_bits(plan.source, config), 4)}  # fmt: skip
            path = stem.with_name(f"{stem.name}-{kind}-{bits}.json")
            rows.append(about | _result(args, config, path))
            print(rows[-1], flush=True)
    return rows


def _result(args: argparse.Namespace, config: QuantConfig, path: Path) -> dict[str, Any]:
    """Bytes and KL of a quantized model, kept in a file."""
    told = json.dumps(config.to_dict())
    if path.is_file() and (kept := json.loads(path.read_text()))["config"] == told:
        return dict(kept["result"])
    folder = path.with_suffix("")
    for left in (folder, folder.with_name(f"{folder.name}.partial")):
        shutil.rmtree(left, ignore_errors=True)
    quantize(args.model, folder, config, progress=False)
    test = GuardText(str(args.corpus / "*.test.txt"), samples=args.samples)
    kl = divergences(ModelFolder(args.model), {"one": folder}, test)["one"]
    nbytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    result = {"bytes": nbytes, "kl": kl.pop("overall"), "p99": kl.pop("p99"), "domains": kl}
    path.write_text(json.dumps({"config": told, "result": result}))
    shutil.rmtree(folder)
    return result


def _relate(rows: list[dict[str, Any]]) -> None:
    """ratio: of a planned model's KL to that of the uniform one of the same bytes, or between two
    of these to what lies on the line between them, with KL on a logarithmic scale."""
    place = ("preset", "regime", "seed")
    for row in rows:
        row["ratio"] = ""
        like = [r for r in rows if r["kind"] == "uniform" and all(r[k] == row[k] for k in place)]
        if row["kind"] == "planned" and (rival := _uniform_at(row, like)) is not None:
            row["ratio"] = round(row["kl"] / rival, 3)


def _uniform_at(row: dict[str, Any], uniform: list[dict[str, Any]]) -> float | None:
    """KL of uniform models at the bytes of a planned one; None beyond the smallest or largest."""
    for rival in uniform:
        if abs(row["bits"] - rival["bits"]) < 0.02:
            return float(rival["kl"])
    below = max((r for r in uniform if r["bits"] < row["bits"]), key=_bits, default=None)
    above = min((r for r in uniform if r["bits"] > row["bits"]), key=_bits, default=None)
    if below is None or above is None:
        return None
    share = (row["bytes"] - below["bytes"]) / (above["bytes"] - below["bytes"])
    return float(below["kl"] ** (1 - share) * above["kl"] ** share)


def _bits(row: dict[str, Any]) -> float:
    return float(row["bits"])


def draw(rows: list[dict[str, Any]], stem: Path) -> bool:
    """The curves; False if there is nothing to draw with."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for regime, style in (("matched", "-"), ("mismatched", "--")):
        for kind, mark in (("planned", "o"), ("uniform", "s")):
            mine = [r for r in rows if r["regime"] == regime and r["kind"] == kind]
            mine.sort(key=lambda row: row["bytes"])
            if mine:
                sizes = [row["bytes"] / 1e6 for row in mine]
                axes.plot(sizes, [r["kl"] for r in mine], style + mark, label=f"{kind}, {regime}")
    axes.set_yscale("log")
    axes.set_xlabel("weight files, MB")
    axes.set_ylabel("KL to the original, nats per token")
    axes.legend()
    figure.tight_layout()
    for suffix in (".png", ".svg"):
        figure.savefig(stem.with_suffix(suffix))
    return True


if __name__ == "__main__":
    sys.exit(main())
