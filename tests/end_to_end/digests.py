"""Quantize small models and print a digest of every result, the same on every x86 processor.

    python -P tests/end_to_end/digests.py OUT

Floating-point sums differ in their last digit from one processor to another, since libraries choose
their code by its features. The environment below makes each of them take the code that runs
everywhere, so that a digest recorded on one machine holds on the others.
"""

import hashlib
import json
import os
import sys
from pathlib import Path

# Read when the libraries are loaded: torch's own kernels, MKL, oneDNN, and how sums are split.
SAME_CODE = {
    "ATEN_CPU_CAPABILITY": "default",
    "MKL_CBWR": "COMPATIBLE",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
    "OMP_NUM_THREADS": "1",
}
os.environ |= SAME_CODE
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
from helpers import save_random  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

import qmoe  # noqa: E402

DATA = Path(__file__).resolve().parents[1] / "data"
TEXT = qmoe.CalibrationConfig("bundled:austen", samples=6, seqlen=64, batch=2, self_samples=2)
CHANGES: dict[str, dict[str, object]] = {
    "fast": {"search_grid": False, "refit": False},
    "balanced": {},
    "tuned": {"tune": 4},
}


def digest(folder: Path) -> str:
    """SHA-256 over the names, dtypes, shapes and bytes of all tensors in a folder, by name."""
    tensors = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        total.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        total.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def main(out: Path) -> None:
    models = {"demo": DATA / "demo-moe"}
    for family in ("mixtral", "deepseek_v3"):
        models[family] = save_random(family, out / family, DATA / "demo-moe", torch.bfloat16)
    found = {}
    for name, source in models.items():
        for preset, changes in CHANGES.items():
            scheme = qmoe.Scheme(bits=3, group_size=32, symmetric=False)
            config = qmoe.QuantConfig(experts=scheme, calibration=TEXT, **changes)
            target = out / f"{name}-{preset}"
            qmoe.quantize(source, target, config, progress=False)
            found[f"{name}, {preset}"] = digest(target)
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
