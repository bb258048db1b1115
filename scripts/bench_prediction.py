"""How many drafts of a prediction layer are accepted before and after quantizing.

    python -P scripts/fit_prediction_layer.py tests/data/demo-moe DIR/model
    python -P scripts/bench_prediction.py DIR/model --work DIR --out docs/prediction.md

The model is quantized at several bits, by round-to-nearest and by a preset, and `qmoe eval` is
asked for the share of accepted drafts and for KL. --out puts the table into the page.
"""

import argparse
from pathlib import Path
from typing import Any

from qmoe import QuantConfig, Scheme, quantize
from qmoe.checkpoint.folders import read_json
from qmoe.measure.evaluate import evaluate
from qmoe.system.files import write_json

BEGIN, END = "<!-- prediction: begin -->", "<!-- prediction: end -->"
HEADER = ["weights", "method", "drafts accepted", "KL", "bytes of the layer"]


def configs(bits: list[int], samples: int) -> dict[tuple[str, str], QuantConfig]:
    """By bits and method, dense linears in 8 bits and everything in groups of 128."""
    found = {}
    for b in bits:
        scheme = Scheme(b, 128, symmetric=False)
        found[f"{b} bits", "round-to-nearest"] = QuantConfig("rtn", experts=scheme)
        found[f"{b} bits", "balanced"] = QuantConfig.preset(
            "balanced", experts=scheme, samples=samples, self_samples=samples
        )
    return found


def measured(model: Path, folder: Path, config: QuantConfig, samples: int) -> dict[str, Any]:
    """What an earlier call left in `folder`, or what is measured now."""
    kept = folder.with_suffix(".json")
    if not kept.exists():
        report = quantize(model, folder, config, progress=False)
        found = evaluate(folder, against=model, samples=samples, seqlen=128)
        more = {"layer": report["prediction"]["bytes"]}
        write_json(kept, {k: found[k] for k in ("acceptance", "overall")} | more)
    return read_json(kept)


def table(rows: list[list[str]]) -> str:
    """In Markdown."""
    lines = [HEADER, ["---"] * len(HEADER), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--calibration-samples", type=int, default=64)
    parser.add_argument("--samples", type=int, default=8, help="of held-out text, in each domain")
    args = parser.parse_args()
    rows = []
    for (bits, method), config in configs(args.bits, args.calibration_samples).items():
        folder = args.work / f"{bits[0]}-{config.method}"
        found = measured(args.model, folder, config, args.samples)
        if not rows:
            share = found["acceptance"]["original"]["all"]
            rows.append(["16 bits", "original", f"{share:.1%}", "0", "-"])
        share, kl = found["acceptance"]["qmoe"]["all"], found["overall"]["qmoe"]["kl"]
        rows.append([bits, method, f"{share:.1%}", f"{kl:.4f}", str(found["layer"])])
        print(" | ".join(rows[-1]), flush=True)
    print(table(rows))
    if args.out is not None:
        page = args.out.read_text()
        start, end = page.index(BEGIN) + len(BEGIN), page.index(END)
        args.out.write_text(f"{page[:start]}\n\n{table(rows)}\n\n{page[end:]}")


if __name__ == "__main__":
    main()
