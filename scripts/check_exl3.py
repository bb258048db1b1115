"""Compare folders in EXL3's codes with exllamav3's own CPU kernel, layer by layer.

    python -P scripts/check_exl3.py --exllamav3 DIR [FOLDER ...]

DIR is an unpacked wheel of exllamav3 (1.6.5 was used; MIT), whose CPU kernel torch builds from the
sources in it with g++ and ninja. Its kernel reads the tensors of a folder by their names in the
files; qmoe loads the folder and computes as it does for users. Both round activations to 8 bits, so
both are compared with the same layer in float32 too. Without FOLDER two small random models are
quantized first, a Qwen3-MoE at 2 bits and a Mixtral at 3.5.
The exit status is 1 if outputs differ by more than BOUND of their size in any layer.
"""

import argparse
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))  # `python -P` leaves it out

from bench_trellis_kernel import build
from torch import Tensor

from qmoe.cli.tables import show

BOUND = 0.03  # each of the two rounds inputs and what lies between the products to 8 bits
TOKENS, CHOICES = 16, 2
NAMES = (("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2"))
EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(gate_proj|w1)\.trellis")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--exllamav3", type=Path, required=True, metavar="DIR")
    parser.add_argument("folders", type=Path, nargs="*", metavar="FOLDER")
    args = parser.parse_args()
    torch.manual_seed(0)
    kernel = build(args.exllamav3)
    with tempfile.TemporaryDirectory() as scratch:
        folders = args.folders or list(made(Path(scratch)))
        rows = [row for folder in folders for row in compare(kernel, folder)]
    head = ["folder", "layer", "bits of gate, up, down", "qmoe to exllamav3",
            "qmoe to float32", "exllamav3 to float32"]  # fmt: skip
    show("outputs differ by this share of their size", head, rows)
    worst = max(float(row[3]) for row in rows)
    print(f"{len(rows)} layers, at most {worst:.4f}, bound {BOUND}")
    return 1 if worst > BOUND else 0


def made(scratch: Path) -> Iterator[Path]:
    """Two quantized families of two layers."""
    from random_model import COMMON, DEMO
    from transformers import AutoModelForCausalLM, MixtralConfig, Qwen3MoeConfig

    import qmoe

    sizes = COMMON | dict(
        hidden_size=256, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2,
        num_experts_per_tok=CHOICES,
    )  # fmt: skip
    families = {
        "qwen3-moe": Qwen3MoeConfig(**sizes, head_dim=64, moe_intermediate_size=128, num_experts=8),
        "mixtral": MixtralConfig(**sizes, intermediate_size=384, num_local_experts=4),
    }
    for bits, (name, config) in zip((2, 3.5), families.items(), strict=True):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(scratch / name)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(DEMO / file, scratch / name / file)
        text = dict(text="bundled:austen", samples=4, seqlen=128, self_samples=0)
        settings = qmoe.QuantConfig.preset(
            "fast", format="exl3", experts={"bits": bits}, beam=16, calibration=text
        )
        qmoe.quantize(scratch / name, scratch / f"{name} {bits:g} bits", settings, progress=False)
        yield scratch / f"{name} {bits:g} bits"


def compare(kernel: Any, folder: Path) -> Iterator[list[str]]:
    """A row for every layer of routed experts."""
    from safetensors.torch import load_file

    import qmoe

    tensors = {k: v for f in sorted(folder.glob("*.safetensors")) for k, v in load_file(f).items()}
    model = qmoe.load(folder, torch.bfloat16, progress=False)[0]
    exact = qmoe.load(folder, torch.float32, progress=False)[0]
    found = [(n, m) for n, m in model.named_modules() if hasattr(m, "qmoe_arena")]
    layers = {match[1]: None for name in tensors if (match := EXPERT.match(name))}
    assert len(found) == len(layers) > 0, f"{folder}: expected coded experts in every layer"
    for prefix, (name, module) in zip(sorted(layers, key=by_layer), found, strict=True):
        count, hidden = module.qmoe_arena.shapes[0][0], module.qmoe_arena.shapes[0][2]
        x = torch.randn(TOKENS, hidden).half().float()
        ids = torch.rand(TOKENS, count).topk(min(CHOICES, count)).indices
        gates = torch.full(ids.shape, 1 / ids.shape[1])
        ours = module(x.bfloat16(), ids, gates).float()
        true = exact.get_submodule(name)(x, ids, gates)
        theirs, rates = exllamav3_layer(kernel, tensors, prefix, count, (x, ids, gates))
        distances = (apart(ours, theirs), apart(ours, true), apart(theirs, true))
        yield [folder.name, prefix, " ".join(rates), *(f"{d:.4f}" for d in distances)]


def by_layer(prefix: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", prefix)]


def exllamav3_layer(
    kernel: Any,
    tensors: dict[str, Tensor],
    prefix: str,
    experts: int,
    given: tuple[Tensor, Tensor, Tensor],
) -> tuple[Tensor, list[str]]:
    """What their kernel computes from a file's tensors, and the rates of its matrices."""
    parts, rates = [], []
    for names in NAMES:
        which = next(n for n in names if f"{prefix}.0.{n}.trellis" in tensors)
        for kind in ("trellis", "suh", "svh"):
            parts.append([tensors[f"{prefix}.{e}.{which}.{kind}"] for e in range(experts)])
        rates.append(f"{parts[-3][0].shape[-1] / 16:g}")
    handle = kernel.make_layer(*parts, [], [], [], 0, 0.0, 0)
    x, ids, gates = given
    out = torch.empty(x.shape)
    kernel.forward(handle, x.half(), ids, gates.half(), out, 1)
    return out, rates


def apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


if __name__ == "__main__":
    sys.exit(main())
