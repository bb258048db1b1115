"""GPTQModel with its defaults, which round experts to nearest that see few tokens.

Such experts are counted from its log and reported as fallbacks. It wants three cores or more and
is told that there are four. The checkpoint it saves is read back here: GPTQ's format, values in a
row of bits along the input, zero points stored less one.
"""

import os
import shutil
import sys
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
from safetensors.torch import load_file
from torch import Tensor

STORED = (".qweight", ".qzeros", ".scales", ".g_idx")


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--asymmetric", action="store_true")
    args = parser.parse_args()
    os.cpu_count = lambda: 4  # before the import, which divides cores among its workers
    from gptqmodel import GPTQModel, QuantizeConfig

    tokens = calibration(args.tokens)
    config = QuantizeConfig(bits=args.bits, group_size=args.group_size, sym=not args.asymmetric)
    model = GPTQModel.load(str(args.model), config, device="cpu", dtype=torch.float32)
    rows = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in tokens]
    before = cpu_seconds()
    log = model.quantize(rows, batch_size=8)
    seconds = cpu_seconds() - before
    saved = args.out / "saved"
    model.save(str(saved))
    source = source_tensors(args.model)
    found = by_source_names(_read(saved, args.bits), source)
    weights = {name: found[name] for name in to_quantize(source) if name in found}
    stored = stored_bytes(saved, STORED)
    shutil.rmtree(saved)
    hand_back(args.model, args.out, weights, stored, {
        "versions": versions("gptqmodel"),
        "settings": {"bits": args.bits, "group_size": args.group_size, "sym": not args.asymmetric},
        "cpu_seconds": seconds,
        "fallbacks": _fallbacks(log),
        "levels": most_levels(weights, args.group_size),
    })  # fmt: skip


def _fallbacks(log: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Of its log, every matrix that was rounded to nearest for want of tokens."""
    return [
        f"layer {row['layer']} {row['module']}: {row['samples']} tokens, {row['loss']}"
        for rows in log.values()
        for row in rows
        if "fallback" in str(row.get("loss"))
    ]


def _bits(words: Tensor, bits: int) -> Tensor:
    """Values [M, N] of a stream of bits that runs down the columns of int32 words [W, N]."""
    places = torch.arange(32, dtype=torch.int32)
    stream = (words[:, None, :] >> places[None, :, None]) & 1
    stream = stream.reshape(-1, bits, words.shape[1])
    return (stream << torch.arange(bits, dtype=torch.int32)[None, :, None]).sum(1)


def _read(folder: Path, bits: int) -> dict[str, Tensor]:
    """The saved checkpoint's packed matrices as what they stand for."""
    stored: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        stored |= load_file(file)
    out = {}
    for name in [n.removesuffix(".qweight") for n in stored if n.endswith(".qweight")]:
        q = _bits(stored[f"{name}.qweight"], bits)
        zero = _bits(stored[f"{name}.qzeros"].T.contiguous(), bits).T + 1
        scale, group = stored[f"{name}.scales"].float(), stored[f"{name}.g_idx"].long()
        out[f"{name}.weight"] = ((q - zero[group]) * scale[group]).T.contiguous()
    return out


if __name__ == "__main__":
    main()
