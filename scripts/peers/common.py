"""What every peer's script shares: arguments, CPU time, and the folder it hands back.

A peer runs in an environment of its own, so nothing here imports qmoe. What it hands back is the
source folder with its quantized matrices replaced by what they now stand for, in float32, and
`peer.json`: how it was made, what it takes, what departed from the plan. Which matrices those are
is decided here, once for all peers: attention's q, k, v, o and every routed expert's.
"""

import argparse
import importlib.metadata
import json
import re
import resource
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

QUANTIZED = re.compile(r"self_attn\.[qkvo]_proj\.weight$|\.experts\.\d+\.\w+\.weight$")
PACKAGES = ("torch", "transformers", "compressed-tensors")


def arguments(description: str | None) -> argparse.ArgumentParser:
    """The options all peers take; a peer adds its own and parses."""
    parser = argparse.ArgumentParser(description=(description or "").split("\n")[0])
    parser.add_argument("model", type=Path, help="source folder")
    parser.add_argument("tokens", type=Path, help="safetensors of calibration token ids")
    parser.add_argument("out", type=Path, help="folder to make")
    parser.add_argument("--bits", type=int, required=True)
    parser.add_argument("--group-size", type=int, default=128)
    return parser


def calibration(path: Path) -> Tensor:
    """Token ids [samples, sample], int64."""
    tokens: Tensor = load_file(path)["tokens"]
    return tokens


def cpu_seconds() -> float:
    """User and system time of this process and of the children it has waited for."""
    used = [resource.getrusage(w) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def source_tensors(model: Path) -> dict[str, Tensor]:
    """Every tensor of a model folder in float32."""
    found: dict[str, Tensor] = {}
    for file in sorted(model.glob("*.safetensors")):
        found |= {name: tensor.float() for name, tensor in load_file(file).items()}
    return found


def to_quantize(tensors: dict[str, Tensor]) -> list[str]:
    """Names of the matrices that are to be quantized."""
    return [name for name in tensors if QUANTIZED.search(name)]


def by_source_names(weights: dict[str, Tensor], source: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a loaded model under the names of its checkpoint: transformers calls Mixtral's
    block and matrices otherwise, and holds experts in stacks (gate and up rows in one)."""
    split: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        holder, _, last = name.rpartition(".")
        if not holder.endswith(".experts") or tensor.ndim != 3:
            split[name] = tensor
            continue
        parts = ["gate_proj", "up_proj"] if last == "gate_up_proj" else [last]
        for e, matrix in enumerate(tensor):
            for part, rows in zip(parts, matrix.chunk(len(parts)), strict=True):
                split[f"{holder}.{e}.{part}.weight"] = rows
    return {name if name in source else _mixtral(name): tensor for name, tensor in split.items()}


def _mixtral(name: str) -> str:
    name = name.replace(".mlp.", ".block_sparse_moe.")
    for ours, theirs in {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}.items():
        name = name.replace(f".{ours}.", f".{theirs}.")
    return name


def versions(*packages: str) -> dict[str, str]:
    """Versions of these packages and of what all share; those not installed are left out."""
    found = {}
    for name in (*packages, *PACKAGES):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def replaced(source: dict[str, Tensor], weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The source with these tensors in place of its own; ValueError for one it has not."""
    for name, tensor in weights.items():
        if name not in source or source[name].shape != tensor.shape:
            raise ValueError(f"{name}: no such tensor of shape {tuple(tensor.shape)} in the source")
    return source | {name: tensor.float().contiguous() for name, tensor in weights.items()}


def most_levels(weights: dict[str, Tensor], group_size: int) -> int:
    """The largest number of different values in any group: 2^bits at most on an integer grid."""
    most = 0
    for tensor in weights.values():
        groups = tensor.reshape(-1, group_size).sort(dim=1).values
        most = max(most, 1 + int((groups.diff(dim=1) != 0).sum(1).max()))
    return most


def stored_bytes(folder: Path, suffixes: tuple[str, ...]) -> int:
    """Bytes of all tensors in a folder whose names end like this."""
    files = sorted(folder.rglob("*.safetensors"))
    return sum(t.nbytes for f in files for n, t in load_file(f).items() if n.endswith(suffixes))


def departures(source: dict[str, Tensor], result: dict[str, Tensor]) -> dict[str, list[str]]:
    """Matrices that should have been quantized and were not, tensors that changed and should not
    have. Told by equality with the source."""
    wanted = set(to_quantize(source))
    same = {name for name in source if torch.equal(source[name], result[name])}
    return {"left_unquantized": sorted(wanted & same), "also_changed": sorted(
        set(source) - wanted - same)}  # fmt: skip


def hand_back(
    model: Path, out: Path, weights: dict[str, Tensor], stored_bytes: float, report: dict[str, Any]
) -> None:
    """Write the folder. weights: by the source's names, as they stand after quantization.
    stored_bytes: what the quantized matrices take in the peer's own format, scales included."""
    source = source_tensors(model)
    result = replaced(source, weights)
    bad = [name for name, tensor in result.items() if not tensor.isfinite().all()]
    if bad:
        raise ValueError(f"{bad[0]}: not finite ({len(bad)} tensors)")
    out.mkdir(parents=True, exist_ok=True)
    for file in model.iterdir():
        if file.suffix == ".json" and "index" not in file.name:
            shutil.copyfile(file, out / file.name)
    config = json.loads((out / "config.json").read_text()) | {"dtype": "float32"}
    (out / "config.json").write_text(json.dumps(config, indent=2))
    save_file(result, out / "model.safetensors", metadata={"format": "pt"})
    count = sum(source[name].numel() for name in to_quantize(source))
    note(out, report | departures(source, result) | {"bits_per_weight": 8 * stored_bytes / count})


def note(out: Path, report: dict[str, Any]) -> None:
    """Write peer.json."""
    (out / "peer.json").write_text(json.dumps(report, indent=2))
