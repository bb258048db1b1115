"""Quality by bytes in llama.cpp: exported results of qmoe beside llama.cpp's own types.

    python -P scripts/bench_gguf.py MODEL... --corpus DIR --work DIR --out docs/gguf

Every file runs in llama.cpp, on the same token ids, and is held against the original in float32
there. Twice: as it is ("run"), where llama.cpp's kernels round the inputs of products too, and with
every tensor expanded to float32 ("weights"), which shows what the weights lost and nothing else.
llama.cpp's own types have an importance matrix of 128 samples of calibration text. Of ours the
perplexity in qmoe, in float32, stands beside. Writes gguf.csv and gguf.png into --out, and the
table of all rows of the CSV into gguf.md beside that folder; without models it does the last alone.

llama.cpp never divides the chosen experts' weights by their sum in a Qwen2-MoE. In place of such a
model that does, the original is then the same tensors with `norm_topk_prob = false`: another model,
but one that both quantize and that llama.cpp runs.
"""

import argparse
import csv
import json
import shutil
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))  # `python -P` leaves it out

import numpy as np
import torch
from check_table import put
from llama.programs import Llama, expand, matrix_bits
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer

import qmoe
from qmoe.calibration.batches import choose_samples
from qmoe.calibration.text import load_texts
from qmoe.cli.main import main as qmoe_main
from qmoe.measure.logits import make_batches

SAMPLES, SEQLEN = 128, 256  # of calibration
THEIRS = ("Q2_K", "Q3_K_M", "Q4_0", "Q4_K_M")
# Bits of experts and of attention.
TWO = ("--bits", "2", "--asymmetric")
OURS = {
    "2 bits": (*TWO, "--dense-bits", "2", "--set", "dense.symmetric=false"),
    "2 bits, attention 4": (*TWO, "--dense-bits", "4"),
    "3 bits": ("--bits", "3", "--dense-bits", "3"),
    "4 bits": ("--bits", "4", "--dense-bits", "4"),
    "4 bits, attention 8": ("--bits", "4"),
}
COLUMNS = ("model", "method", "bits_per_weight", "bytes", "kl_run", "kl_weights",
           "perplexity_run", "perplexity_weights", "perplexity_qmoe", "types")  # fmt: skip
BEGIN, END = "<!-- gguf: begin, by scripts/bench_gguf.py -->", "<!-- gguf: end -->"
Row = dict[str, Any]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", type=Path, metavar="MODEL")
    parser.add_argument("--corpus", type=Path, help="*.train.txt and *.test.txt")
    parser.add_argument("--work", type=Path, help="a few GB")
    parser.add_argument("--out", type=Path, default=Path("docs/gguf"))
    parser.add_argument("--samples", type=int, default=16, help="test samples of each domain")
    parser.add_argument("--preset", default="balanced")
    parser.add_argument("--only", nargs="+", choices=[*OURS, *THEIRS], help="rows to measure")
    args = parser.parse_args()
    if args.models and not (args.corpus and args.work):
        parser.error("models are measured with --corpus and --work")
    args.out.mkdir(parents=True, exist_ok=True)
    llama = Llama.find(args.work) if args.models else None
    for model in args.models:
        assert llama is not None
        case = Case(model, args, llama)
        for name in args.only or [*OURS, *THEIRS]:
            row = case.ours(name) if name in OURS else case.theirs(name)
            print(", ".join(f"{key} {value}" for key, value in row.items()), flush=True)
            write(args.out / "gguf.csv", row)
    rows = read(args.out / "gguf.csv")
    draw(rows, args.out / "gguf.png")
    page = args.out.parent / "gguf.md"
    if page.is_file():
        page.write_text(put(page.read_text(), BEGIN, END, table(rows)))
    return 0


class Case:
    """A model, its test tokens and the original's log-probabilities on them."""

    def __init__(self, model: Path, args: argparse.Namespace, llama: Llama):
        self.llama, self.args = llama, args
        self.work = args.work / model.name
        self.work.mkdir(parents=True, exist_ok=True)
        self.model = model = as_llama_runs_it(model, self.work)
        tokenizer = AutoTokenizer.from_pretrained(model)
        texts = load_texts(str(args.corpus / "*.test.txt"))
        batches = make_batches(tokenizer, texts, samples=args.samples, seqlen=SEQLEN, batch=1)[0]
        self.tokens = torch.cat([ids for _, ids in batches])
        self.words = AutoConfig.from_pretrained(model).vocab_size
        self.train = str(args.corpus / "*.train.txt")
        self.full, self.matrix = self.work / "original.gguf", self.work / "imatrix.gguf"
        if not self.full.is_file():
            llama.convert(model, self.full)
        if not self.matrix.is_file():
            tokens, _ = choose_samples(tokenizer, load_texts(self.train), SAMPLES, SEQLEN, 0)
            text = "".join(tokenizer.batch_decode(tokens, skip_special_tokens=True))
            llama.make_imatrix(self.full, text, self.matrix)
        self.reference = self.work / f"original-{len(self.tokens)}.npy"
        if not self.reference.is_file():
            self._keep_reference()

    def _keep_reference(self) -> None:
        shape = (*self.tokens.shape, self.words)
        kept = np.lib.format.open_memmap(self.reference, "w+", np.float32, shape)
        for i, logits in enumerate(self.llama.logits_of(self.full, self.tokens, self.words)):
            kept[i] = logits.log_softmax(-1).numpy()

    def ours(self, name: str) -> Row:
        folder, file = self.work / "ours", self.work / "ours.gguf"
        shutil.rmtree(folder, ignore_errors=True)
        file.unlink(missing_ok=True)
        common = [
            "--preset",
            self.args.preset,
            "--target",
            "llama.cpp",
            "--calibration",
            self.train,
        ]
        quantize = ["quantize", str(self.model), str(folder), *common, *OURS[name]]
        export = ["export", str(folder), "--to", "gguf", "--out", str(file)]
        for command in (quantize, export):
            if qmoe_main(command):
                sys.exit(f"qmoe {command[0]} failed")
        return self._row(f"qmoe {name}", file) | {"perplexity_qmoe": self._in_qmoe(folder)}

    def theirs(self, kind: str) -> Row:
        file = self.work / "theirs.gguf"
        self.llama.quantized(self.full, self.matrix, kind, file)
        return self._row(f"llama.cpp {kind}", file)

    def _row(self, method: str, file: Path) -> Row:
        bits, size, kinds = matrix_bits(file)
        row: Row = {"model": self.model.name, "method": method, "bits_per_weight": round(bits, 3)}
        row["bytes"] = size
        plain = self.work / "plain.gguf"
        expand(file, plain)
        for what, run in (("run", file), ("weights", plain)):
            kl, perplexity = self._scores(run)
            row |= {f"kl_{what}": round(kl, 6), f"perplexity_{what}": round(perplexity, 4)}
        row["types"] = " ".join(f"{kind}:{count}" for kind, count in sorted(kinds.items()))
        return row

    def _scores(self, file: Path) -> tuple[float, float]:
        """KL from the original, in nats per token, and perplexity, over all test tokens."""
        reference = np.load(self.reference, mmap_mode="r")
        kl, loss = [], []
        for i, logits in enumerate(self.llama.logits_of(file, self.tokens, self.words)):
            wanted = torch.from_numpy(np.array(reference[i, :-1]))
            found = logits[:-1].log_softmax(-1)
            kl.append((wanted.exp() * (wanted - found)).sum(-1))
            loss.append(_loss(found, self.tokens[i]))
        return float(torch.cat(kl).mean()), float(torch.cat(loss).mean().exp())

    @torch.no_grad()
    def _in_qmoe(self, folder: Path) -> float:
        model, _ = qmoe.load(folder, torch.float32, progress=False, cache=False)
        loss = [
            _loss(logits[:-1].log_softmax(-1), ids)
            for part in self.tokens.split(8)
            for ids, logits in zip(part, model(input_ids=part).logits, strict=True)
        ]
        return round(float(torch.cat(loss).mean().exp()), 4)


def as_llama_runs_it(model: Path, work: Path) -> Path:
    """The model, or if llama.cpp runs another one of the same tensors, a folder with that. Tied
    embeddings are written twice, as llama.cpp wants an output matrix of a Qwen2-MoE."""
    config = json.loads((model / "config.json").read_text())
    if config["model_type"] != "qwen2_moe" or not config["norm_topk_prob"]:
        return model
    other = work / f"{model.name}-unnormalized"
    shutil.rmtree(other, ignore_errors=True)
    shutil.copytree(model, other)
    changes = {"norm_topk_prob": False, "tie_word_embeddings": False}
    (other / "config.json").write_text(json.dumps(config | changes))
    tensors = load_file(other / "model.safetensors")
    if config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    return other


def _loss(predicted: Tensor, ids: Tensor) -> Tensor:
    """Of log-probabilities [N - 1, V] of each next token."""
    return -predicted.gather(1, ids[1:, None])[:, 0]


def read(path: Path) -> list[Row]:
    """The rows of a CSV, none if it is not there."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write(path: Path, row: Row) -> None:
    """Put a row into the CSV, in the place of an earlier one of its model and method."""
    rows = [r for r in read(path) if (r["model"], r["method"]) != (row["model"], row["method"])]
    rows = sorted([*rows, row], key=lambda r: (r["model"], float(r["bits_per_weight"])))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def table(rows: list[Row]) -> str:
    """For the page; ours are bold, and KL is in thousandths."""
    heads = ("model", "method", "bits per weight", "bytes", "KL, weights", "KL, as run",
             "perplexity, as run", "perplexity in qmoe")  # fmt: skip
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for r in rows:
        name = f"**{r['method']}**" if r["method"].startswith("qmoe") else r["method"]
        numbers = [f"{float(r['bits_per_weight']):.2f}", f"{int(r['bytes']) / 1e6:.2f} MB"]
        numbers += [f"{1000 * float(r[f'kl_{what}']):.2f}" for what in ("weights", "run")]
        numbers += [f"{float(r['perplexity_run']):.2f}"]
        numbers += [f"{float(r['perplexity_qmoe']):.2f}" if r["perplexity_qmoe"] else "-"]
        lines.append(f"| {r['model']} | {name} | {' | '.join(numbers)} |")
    return "\n".join(lines)


def draw(rows: list[Row], path: Path) -> None:
    """KL against bits per weight, a panel per model; nothing without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        print("no plot: matplotlib is not installed")
        return
    matplotlib.use("agg")
    from matplotlib import pyplot

    models = list(dict.fromkeys(row["model"] for row in rows))
    figure, axes = pyplot.subplots(1, len(models), figsize=(5 * len(models), 4), squeeze=False)
    for axis, model in zip(axes[0], models, strict=True):
        for who, mark in (("qmoe", "o-"), ("llama.cpp", "s:")):
            mine = [r for r in rows if r["model"] == model and r["method"].startswith(who)]
            points = [(float(r["bits_per_weight"]), float(r["kl_weights"])) for r in mine]
            axis.plot(*zip(*points, strict=True), mark, label=who)
            for r, point in zip(mine, points, strict=True):
                name = r["method"].removeprefix(f"{who} ")
                axis.annotate(name, point, (5, 4), fontsize=7, textcoords="offset points")
        axis.set_yscale("log")
        axis.set_title(model, fontsize=10)
        axis.set_xlabel("stored bits per weight of the layers' matrices")
        axis.set_ylabel("KL from the original, nats per token")
        axis.grid(alpha=0.3)
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=80)


if __name__ == "__main__":
    torch.manual_seed(0)
    sys.exit(main())
