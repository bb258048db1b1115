"""The checkpoint on disk as exllamav3 has it: the tensors of a coded matrix, and what the config
says of them.

<module>.trellis   int16 [K/16, N/16, 16 * rate]
<module>.suh       float16 [K]
<module>.svh       float16 [N]
<module>.mul1      int32 [], the codebook's multiplier; or .mcg; neither for the codebook 3inst

config.json says `quantization_config` as exllamav3's converter does (conversion/compile.py), and
quantization_config.json repeats it with a table of every module's tensors (`tensor_storage`).
"""

from typing import Any

import torch
from torch import Tensor

from qmoe.config import QuantConfig
from qmoe.format.exl3 import MULTIPLIERS, SIDE
from qmoe.format.trellis import Codes

METHOD = "exl3"
STORAGE = "quantization_config.json"
VERSION = "1.6.5"  # of exllamav3, whose layout this is
CODED = (".trellis", ".suh", ".svh")


def multiplier(codebook: str) -> Tensor | None:
    """What is stored beside codes to say their codebook; None for the one that says nothing."""
    value = MULTIPLIERS.get(codebook)
    return None if value is None else torch.tensor(value - (1 << 32), dtype=torch.int32)


def coded_tensors(name: str, codes: Codes, e: int) -> dict[str, Tensor]:
    """The stored tensors of matrix e. name: of its weight."""
    key = name.removesuffix(".weight")
    out = {f"{key}{s}": t[e] for s, t in zip(CODED, codes.tensors(), strict=True)}
    said = multiplier(codes.codebook)
    return out if said is None else out | {f"{key}.{codes.codebook}": said}


def decoded_tensors(
    tensors: dict[str, Tensor], shapes: dict[str, tuple[int, int]]
) -> dict[str, Tensor]:
    """Stored tensors with every coded matrix as the float32 one it stands for, under the name of
    its weight. shapes: by that name, without what sizes are filled up with."""
    coded = (*CODED, *(f".{codebook}" for codebook in MULTIPLIERS))
    out = {n: t for n, t in tensors.items() if not n.endswith(coded)}
    for stored in tensors:
        key = stored.removesuffix(".trellis")
        if key == stored:
            continue
        n, k = shapes[f"{key}.weight"]
        codebook: Any = next((c for c in MULTIPLIERS if f"{key}.{c}" in tensors), "3inst")
        trellis, suh, svh = (tensors[f"{key}{suffix}"][None] for suffix in CODED)
        out[f"{key}.weight"] = Codes(trellis, suh, svh, codebook, n, k).dequantize()[0]
    return out


def exl3_config(config: QuantConfig) -> dict[str, Any]:
    """The `quantization_config` entry of config.json."""
    c = config.calibration
    return {
        "quant_method": METHOD,
        "version": VERSION,
        "bits": config.experts.bits,
        "head_bits": 16 if config.lm_head is None else config.lm_head.bits,
        "calibration": {"rows": c.samples + c.self_samples, "cols": c.seqlen},
        "out_scales": "always",
        "codebook": config.experts.codebook,
    }


def storage_table(stored: dict[str, tuple[str, list[int], int]]) -> dict[str, Any]:
    """`tensor_storage`: of every module its tensors, and of coded ones their rate and codebook.
    stored: of every tensor its torch dtype, shape and bytes."""
    table: dict[str, Any] = {}
    for name, (dtype, shape, size) in sorted(stored.items()):
        entry = table.setdefault(name.rpartition(".")[0], {"stored_tensors": {}})
        entry["stored_tensors"][name] = {"shape": shape, "n_bytes": size, "dtype": dtype}
        key, _, kind = name.rpartition(".")
        if kind == "trellis":
            rate = shape[-1] / SIDE
            entry["quant_format"] = METHOD
            entry["bits_per_weight"] = int(rate) if rate.is_integer() else rate
            for codebook, value in MULTIPLIERS.items():
                if f"{key}.{codebook}" in stored:
                    entry[f"{codebook}_multiplier"] = value
    return table
