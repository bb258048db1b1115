"""Hot experts on a GPU: the share of tokens they take, by calibration and on held-out text.

    python -P scripts/hit_rates.py QUANTIZED --text 'DIR/*.test.txt'

For several shares of the experts that lie on the GPU, chosen by the calibration counts in the
report in one ranking over all layers (kernels/hosted/placement.py): the share of assignments of
tokens to experts that go to them, predicted by the same counts and measured on the text. Beside it,
what the same share of every layer's experts takes. Experts count as equally large.
"""

import argparse
import sys
from pathlib import Path

import torch

from qmoe.calibration.text import load_texts
from qmoe.checkpoint.model_folder import ModelFolder
from qmoe.cli import tables
from qmoe.kernels.hosted.placement import hit_rate, hottest
from qmoe.measure.logits import make_batches
from qmoe.measure.routes import experts_used, recorded
from qmoe.packed.load import load
from qmoe.runtime.offload import calibration_counts

Counts = dict[str, list[float]]


def main() -> int:
    args = _arguments()
    counts = calibration_counts(args.path)
    if not counts:
        print(f"{args.path}: its report has no calibration counts", file=sys.stderr)
        return 1
    by_domain = _used(args)
    together = {
        name: [sum(c) for c in zip(*(used[name] for used in by_domain.values()), strict=True)]
        for name in counts
    }
    rows = []
    for share in args.shares:
        hot, quota = _hot(counts, share), _with_quota(counts, share)
        row = [share, hit_rate(counts, hot), hit_rate(together, hot), hit_rate(together, quota)]
        row += [hit_rate(used, hot) for used in by_domain.values()]
        rows.append([f"{100 * value:.1f} %" for value in row])
    header = ["experts on the GPU", "predicted", "measured", "quota for every layer", *by_domain]
    tables.show("assignments that go to experts on the GPU", header, rows)
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("path", type=Path, help="a quantized folder")
    parser.add_argument("--text", default="heldout")
    parser.add_argument("--samples", type=int, default=8, help="of each domain")
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.1, 0.25, 0.5, 0.75])
    return parser.parse_args()


def _hot(counts: Counts, share: float) -> dict[str, list[int]]:
    alike = {name: [1.0] * len(each) for name, each in counts.items()}
    return hottest(counts, alike, round(share * sum(map(len, counts.values()))))


def _with_quota(counts: Counts, share: float) -> dict[str, list[int]]:
    """The same share of the experts of every layer."""
    return {name: _hot({name: each}, share)[name] for name, each in counts.items()}


@torch.no_grad()
def _used(args: argparse.Namespace) -> dict[str, Counts]:
    """By domain of the text, the tokens that each expert saw."""
    folder = ModelFolder.find(args.path)
    tokenizer, texts = folder.tokenizer(folder.config()), load_texts(args.text)
    batches, notes = make_batches(
        tokenizer, texts, samples=args.samples, seqlen=args.seqlen, batch=args.samples
    )
    for note in notes:
        print(f"text: {note}")
    model, _ = load(args.path, progress=False)
    with recorded(model) as routes:
        for _, ids in batches:
            model(input_ids=ids, use_cache=False)
    return experts_used(routes, batches, model)


if __name__ == "__main__":
    sys.exit(main())
