"""Quantize a real, trained MoE to 4 bits, compare it with the original, and let it write.

    python scripts/quickstart.py

Everything it needs is in the repository: the demo model, calibration text and held-out text. It is
calibrated on three of the five domains, so the table can show what happens on text of a kind that
calibration never saw.
"""

import tempfile
from pathlib import Path

import torch
from rich.console import Console

import qmoe
from qmoe.cli.tables import show
from qmoe.measure.bench import benchmark
from qmoe.measure.evaluate import evaluate
from qmoe.measure.scores import overall
from qmoe.system.progress import shown
from qmoe.system.sizes import format_size

DEMO = Path(__file__).resolve().parents[1] / "tests" / "data" / "demo-moe"
SEEN, UNSEEN = "austen+factbook+state_of_the_union", "metamath+moby_dick"
NAMES = {"original": "original bf16", "rtn": "RTN int4", "qmoe": "qmoe int4"}
PROMPT = "It was the opinion of the whole family that"


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="qmoe-quickstart-") as folder:
        path = Path(folder) / "demo-int4"
        config = qmoe.QuantConfig.preset("balanced", text=f"bundled:{SEEN}")
        report = qmoe.quantize(DEMO, path, config)
        print(f"quantized with {config.method}: experts {config.experts}, dense {config.dense}")
        print(f"fallbacks: {len(report['fallbacks'])}")
        for line in report["fallbacks"]:
            print(f"  {line}")
        with shown():
            quality = evaluate(path, against=DEMO, baselines=["rtn"], samples=24)
            speed = benchmark(path, against=DEMO, baselines=["rtn"])
        show(*table(quality, speed))
        model, tokenizer = qmoe.load(path)
        ids = tokenizer(PROMPT, return_tensors="pt")
        torch.manual_seed(0)
        text = model.generate(**ids, max_new_tokens=60, do_sample=True, top_k=20)
        print("qmoe int4 writes:")
        Console(width=100).print(tokenizer.decode(text[0]), highlight=False, markup=False)


def table(quality: dict, speed: dict) -> tuple[str, list[str], list[list[str]]]:
    """Title, header and one row per form of the model."""
    rows = []
    for key, name in NAMES.items():
        domains = quality["scores"][key]
        seen, unseen = (
            overall({d: domains[d] for d in group.split("+")}) for group in (SEEN, UNSEEN)
        )
        rows.append(
            [
                name,
                f"{seen['perplexity']:.2f}",
                f"{unseen['perplexity']:.2f}",
                f"{seen['kl']:.5f}",
                f"{unseen['kl']:.5f}",
                f"{100 * seen['agreement']:.1f} %",
                f"{100 * unseen['agreement']:.1f} %",
                format_size(quality["bytes_on_disk"][key]),
                format_size(speed[key]["weights_in_memory"]),
                f"{speed[key]['prefill_tokens_per_s']:.0f}",
                f"{speed[key]['decode_tokens_per_s']:.0f}",
            ]
        )
    header = ["model", "ppl in", "ppl out", "KL in", "KL out", "top-1 in", "top-1 out",
              "on disk", "in memory", "prefill tok/s", "decode tok/s"]  # fmt: skip
    title = "held-out text of domains in and out of the calibration text; KL in nats per token"
    return title, header, rows


if __name__ == "__main__":
    main()
