"""AutoRound: rounding and clipping learned block by block with signed gradient descent.

The weights are taken from the model it leaves in memory, whose matrices hold the dequantized
values; an exported checkpoint is not read back. torch.compile is off: on a CPU it compiles for
longer than it saves on models this small.
"""

import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # `python -P` leaves it out

import torch
from auto_round import AutoRound
from common import (
    arguments,
    by_source_names,
    calibration,
    cpu_seconds,
    hand_back,
    most_levels,
    source_tensors,
    stored_bytes,
    to_quantize,
    versions,
)
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--iterations", type=int, default=200)
    parser.add_argument("--asymmetric", action="store_true")
    args = parser.parse_args()
    tokens = calibration(args.tokens)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    settings = {
        "bits": args.bits, "group_size": args.group_size, "sym": not args.asymmetric,
        "iters": args.iterations, "nsamples": len(tokens), "seqlen": tokens.shape[1],
        "batch_size": 8, "enable_torch_compile": False,
    }  # fmt: skip
    before = cpu_seconds()
    rounder = AutoRound(
        model=model,
        tokenizer=AutoTokenizer.from_pretrained(args.model),
        dataset=list(tokens.split(8)),
        device_map="cpu",
        **settings,
    )
    model, layers = rounder.quantize()
    seconds = cpu_seconds() - before
    source = source_tensors(args.model)
    held = {f"{name}.weight": m.weight.detach() for name, m in model.named_modules()
            if isinstance(m, torch.nn.Linear) and name != "lm_head"}  # fmt: skip
    found = by_source_names(held, source)
    weights = {name: found[name].clone() for name in to_quantize(source)}
    settings["bits_by_its_own_plan"] = sorted({how.get("bits") for how in layers.values()})
    rounder.save_quantized(str(args.out / "export"), format="auto_round", inplace=True)
    stored = stored_bytes(args.out / "export", (".qweight", ".qzeros", ".scales", ".g_idx"))
    shutil.rmtree(args.out / "export")
    hand_back(args.model, args.out, weights, stored, {
        "versions": versions("auto-round"),
        "settings": settings,
        "cpu_seconds": seconds,
        "fallbacks": [],
        "levels": most_levels(weights, args.group_size),
    })  # fmt: skip


if __name__ == "__main__":
    main()
