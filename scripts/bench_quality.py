"""What every method loses, qmoe's and others': the same models, text and evaluation for all.

    python -P scripts/bench_quality.py MODEL... --corpus DIR --work DIR --out docs/quality

DIR holds `<domain>.train.txt` and `<domain>.test.txt`. Calibration text is 128 samples of 256
tokens of all domains (matched) or of essays alone (mismatched), the same token ids for every
method; the evaluation is on the first 64 samples of every domain's test text, in float32, against
the original. Peers run in environments of their own, made from the pinned versions in
scripts/peers. Every result is kept in the work folder, so the same command goes on where it
stopped; what failed stays failed until --retry, and is a row with its reason. Writes
quality.csv and, where matplotlib is installed, quality.png. Needs no GPU; the models must fit in
memory in float32.
"""

import argparse
import json
import os
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ |= {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "",
}  # fmt: skip
# `python -P` leaves it out
sys.path.insert(0, str(Path(__file__).resolve().parent / "peers"))

import evaluation
import methods
import plot
import results
import torch
from methods import METHODS, Method, Task
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from qmoe.calibration.batches import choose_samples, fingerprint
from qmoe.calibration.text import load_texts

REGIMES = {"matched": "*.train.txt", "mismatched": "essays.train.txt"}
RARE = 256  # calibration tokens; an expert that saw fewer is rare


@dataclass(frozen=True)
class Case:
    """One model with one choice of calibration text. All paths are inside the work folder."""

    model: Path
    regime: str
    seed: int
    text: str
    folder: Path

    @property
    def tokens(self) -> Path:
        return self.folder / f"{self.regime}-{self.seed}-tokens.safetensors"

    @property
    def rare(self) -> Path:
        return self.folder / f"{self.regime}-{self.seed}-rare.safetensors"

    def result(self, method: Method, bits: int) -> Path:
        """Where a result is kept, without suffix; one for all cases if text plays no part."""
        regime = f"{self.regime}-{self.seed}" if method.calibrated else "any"
        # No dots: suffixes are put on with `with_suffix`.
        name = method.name.replace(" ", "_").replace(".", "")
        return self.folder / "results" / f"{regime}-{bits}-{name}"


def main() -> int:
    args = _arguments()
    args.work.mkdir(parents=True, exist_ok=True)
    args.out.mkdir(parents=True, exist_ok=True)
    cases = [_prepare(args, model, regime, seed)
             for model in args.models for regime in args.regime for seed in args.seeds]  # fmt: skip
    for method in METHODS:
        if args.only and method.name not in args.only:
            continue
        if reason := methods.missing(method):
            print(f"{method.name}: skipped, {reason}", flush=True)
            continue
        for bits in [b for b in method.bits if b in args.bits]:
            for case in cases:
                _result(args, case, method, bits)
        _report(args, show=False)
    _report(args, show=True)
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("models", nargs="+", type=Path, metavar="MODEL")
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="several GB")
    parser.add_argument("--out", type=Path, default=Path("docs/quality"))
    parser.add_argument("--regime", nargs="+", choices=REGIMES, default=list(REGIMES))
    parser.add_argument("--bits", nargs="+", type=int, choices=methods.BITS, default=methods.BITS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of the samples' choice")
    names = [m.name for m in METHODS]
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--retry", action="store_true", help="run again what failed")
    parser.add_argument("--redo", action="store_true", help="run again what is there already")
    parser.add_argument("--keep", action="store_true", help="keep the quantized folders")
    return parser.parse_args()


def _prepare(args: argparse.Namespace, model: Path, regime: str, seed: int) -> Case:
    """Make what all methods share: calibration tokens, the original's scores, rare experts."""
    folder = args.work / model.name
    case = Case(model, regime, seed, str(args.corpus / REGIMES[regime]), folder)
    (folder / "results").mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokens, _ = choose_samples(tokenizer, load_texts(case.text), 128, 256, seed)
    save_file({"tokens": tokens.contiguous()}, case.tokens)
    if not case.rare.is_file():
        batches = evaluation.test_batches(model, args.corpus)
        evaluation.make_reference(model, batches, folder / "original")
        counts = evaluation.expert_counts(model, tokens)
        mask = evaluation.rare_tokens(folder / "original", batches, counts < RARE)
        save_file({"mask": mask, "counts": counts}, case.rare)
    return case


def _result(args: argparse.Namespace, case: Case, method: Method, bits: int) -> None:
    """Quantize, evaluate and store, unless that was done."""
    stem = case.result(method, bits)
    stored = stem.with_suffix(".json")
    if stored.is_file():
        bad = "failed" in json.loads(stored.read_text())
        # A result that no text plays a part in is met once per case.
        again = args.redo and stored.stat().st_mtime < STARTED
        if not again and not (bad and args.retry):
            return
    out = case.folder / "runs" / stem.name
    for left in (out, out.with_name(f"{out.name}.partial")):  # of a benchmark that was stopped
        shutil.rmtree(left, ignore_errors=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    task = Task(case.model, bits, case.text, case.tokens, case.seed)
    told: dict[str, Any] = {"method": method.name, "bits": bits}
    failed = methods.run(method, task, out, args.work, stem.with_suffix(".log"))
    if failed is None:
        told["peer"] = peer = json.loads((out / "peer.json").read_text())
        _check_text(case, method, peer)
        batches = evaluation.test_batches(case.model, args.corpus)
        scores = evaluation.score(out, batches, case.folder / "original")
        save_file(scores, stem.with_suffix(".safetensors"))
        words = f"{float(scores['kl'].mean()):.5f} nats"
    else:
        told["failed"] = words = failed
    stored.write_text(json.dumps(told, indent=2))
    if not args.keep:
        shutil.rmtree(out, ignore_errors=True)
    print(f"{case.model.name} {stem.name}: {words}, {time.monotonic() - start:.0f} s", flush=True)


def _check_text(case: Case, method: Method, peer: dict[str, Any]) -> None:
    """Ours choose their samples themselves: they must be those that the peers get, unless text that
    the model writes is part of the method."""
    told = peer.get("calibration_sha256")
    if method.script in methods.OURS and told is not None and not method.writes:
        wanted = fingerprint(load_file(case.tokens)["tokens"])
        assert told == wanted, f"{method.name}: calibrated on other samples than the peers"


def _known(args: argparse.Namespace) -> list[Case]:
    """Every case of these models that was ever prepared, so that a run of a part of them does not
    take the others' rows away."""
    found = []
    for model in args.models:
        folder = args.work / model.name
        for path in sorted(folder.glob("*-rare.safetensors")):
            regime, seed, _ = path.stem.split("-")
            text = str(args.corpus / REGIMES[regime])
            found.append(Case(model, regime, int(seed), text, folder))
    return found


def _report(args: argparse.Namespace, show: bool) -> None:
    """Rows of every stored result, whatever was run now, and of the CSV that is there."""
    rows = []
    for case in _known(args):
        batches = evaluation.test_batches(case.model, args.corpus)
        tokens: dict[str, int] = {}
        for domain, ids in batches:
            tokens[domain] = tokens.get(domain, 0) + ids[:, 1:].numel()
        rare = load_file(case.rare)["mask"]
        place = {"model": case.model.name, "regime": case.regime, "seed": case.seed}
        for method in METHODS:
            for bits in method.bits:
                stem = case.result(method, bits)
                if stem.with_suffix(".json").is_file():
                    rows.append(place | results.read(stem, tokens, rare))
    rows = results.with_earlier(rows, args.out / "quality.csv", [m.name for m in METHODS])
    results.relate(rows)
    results.write_csv(rows, args.out / "quality.csv")
    drawn = plot.draw(rows, args.out / "quality.png") if rows else False
    if show:
        results.show(rows)
        print("" if drawn else "no plot: matplotlib is not installed, or there are no results")


STARTED = time.time()

if __name__ == "__main__":
    torch.manual_seed(0)
    sys.exit(main())
