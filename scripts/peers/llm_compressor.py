"""llm-compressor: GPTQ as it comes (every token through every expert), or AWQ.

The weights are taken from the checkpoint it saves, unpacked with compressed-tensors' own
functions, because what transformers makes of such a checkpoint differs by family and version, down
to experts drawn at random. AWQ folds scales into norms and neighbouring matrices, so for it all
tensors of the checkpoint are taken. With --measure-only (scripts/bench_quantize.py) nothing is
handed back: one line of JSON has the seconds and the largest resident memory of loading,
quantizing and saving.
"""

import json
import resource
import shutil
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))  # `python -P` leaves it out

import torch
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
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.modifiers.transform.awq.mappings import _moe_default_mappings
from llmcompressor.pipelines.cache import IntermediatesCache
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

IGNORE = ["lm_head", "re:.*mlp.gate$", "re:.*block_sparse_moe.gate$"]
STORED = (".weight_packed", ".weight_scale", ".weight_zero_point", ".weight_g_idx")


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--method", choices=["gptq", "awq"], default="gptq")
    parser.add_argument("--asymmetric", action="store_true")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--batch", type=int, default=8, help="samples per forward pass")
    parser.add_argument("--measure-only", action="store_true")
    args = parser.parse_args()
    tokens = calibration(args.tokens)
    start = time.monotonic()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype))
    # Where there is no accelerator, pinning raises.
    IntermediatesCache.pin_memory = lambda *_, **__: None
    rows = {"input_ids": tokens.tolist(), "attention_mask": torch.ones_like(tokens).tolist()}
    before = cpu_seconds()
    oneshot(
        model=model,
        tokenizer=AutoTokenizer.from_pretrained(args.model),
        dataset=Dataset.from_dict(rows),
        recipe=_recipe(args),
        batch_size=args.batch,
        max_seq_length=tokens.shape[1],
        num_calibration_samples=len(tokens),
        shuffle_calibration_samples=False,
        output_dir=str(args.out / "saved"),
    )
    seconds = cpu_seconds() - before
    if args.measure_only:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps({"seconds": time.monotonic() - start, "peak": peak}))
        return
    source = source_tensors(args.model)
    found = by_source_names(_read(args.out / "saved", args.bits), source)
    matrices = {name: found[name] for name in to_quantize(source)}
    found.pop("lm_head.weight", None)  # tied
    kept = found if args.method == "awq" else matrices
    stored = stored_bytes(args.out / "saved", STORED)
    shutil.rmtree(args.out / "saved")
    hand_back(args.model, args.out, kept, stored, {
        "versions": versions("llmcompressor"),
        "settings": {
            "method": args.method, "bits": args.bits, "group_size": args.group_size,
            "sym": not args.asymmetric, "samples": len(tokens), "moe_calibrate_all_experts": True,
        },
        "cpu_seconds": seconds,
        "fallbacks": [],
        "levels": most_levels(matrices, args.group_size),
        "notes": [f"scales stored in {args.dtype}, the dtype the model was loaded in"],
    })  # fmt: skip


def _recipe(args: Any) -> Any:
    weights = QuantizationArgs(
        num_bits=args.bits, type="int", symmetric=not args.asymmetric, strategy="group",
        group_size=args.group_size,
    )  # fmt: skip
    groups = {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}
    if args.method == "gptq":
        return GPTQModifier(config_groups=groups, ignore=IGNORE)
    # Its own choice for Mixtral scales the norm before the router and not the router.
    return [AWQModifier(mappings=_moe_default_mappings, duo_scaling="both"),
            QuantizationModifier(config_groups=groups, ignore=IGNORE)]  # fmt: skip


def _read(folder: Path, bits: int) -> dict[str, Tensor]:
    """The saved checkpoint with every packed matrix as what it stands for."""
    stored: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        stored |= load_file(file)
    out = {name: t for name, t in stored.items() if not name.endswith((*STORED, ".weight_shape"))}
    for name in stored:
        base = name.removesuffix("_packed")
        if base == name:
            continue
        shape = torch.Size(stored[f"{base}_shape"].tolist())
        q = unpack_from_int32(stored[name], bits, shape)
        scale = stored[f"{base}_scale"].float()
        zero = stored.get(f"{base}_zero_point")
        levels = q.float().view(shape[0], scale.shape[1], -1)
        if zero is not None:
            points = torch.Size((shape[0], scale.shape[1]))
            levels = levels - unpack_from_int32(zero, bits, points, packed_dim=0).float()[..., None]
        out[base] = (levels * scale[..., None]).view(shape)
    return out


if __name__ == "__main__":
    main()
