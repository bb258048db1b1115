"""qmoe's own command line, timed like a peer.

    python -P scripts/peers/ours.py MODEL DST --method gptq ...

Runs `qmoe quantize` in this process after its imports, and leaves `peer.json` in DST. The folder
stays packed: the benchmark loads it with `qmoe.load`.
"""

import hashlib
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # `python -P` leaves it out

from common import cpu_seconds, note, source_tensors, to_quantize, versions
from safetensors.torch import load_file

import qmoe.cli.commands
from qmoe.cli.main import main

STORED = (".weight_packed", ".weight_scale", ".weight_zero_point", ".trellis", ".suh", ".svh")


def quantize(arguments: list[str]) -> int:
    """Returns the command's exit status."""
    model, out = Path(arguments[0]), Path(arguments[1])
    before = cpu_seconds()
    status = main(["quantize", *arguments])
    seconds = cpu_seconds() - before
    if status:
        return status
    stored = 0
    for file in sorted(out.glob("*.safetensors")):
        stored += sum(t.nbytes for n, t in load_file(file).items() if n.endswith(STORED))
    source = source_tensors(model)
    count = sum(source[name].numel() for name in to_quantize(source))
    report = json.loads((out / "qmoe_report.json").read_text())
    kept = [f"{part}: {n} bytes" for part, n in report["bytes"].items() if "16-bit" in part and n]
    note(out, {
        "versions": versions("qmoe") | {"qmoe-code": _code()},
        "settings": report["config"],
        "cpu_seconds": seconds,
        "bits_per_weight": 8 * stored / count,
        "calibration_sha256": (report.get("calibration") or {}).get("sha256"),
        "fallbacks": report["fallbacks"],
        "left_unquantized": kept,
        "also_changed": [],
    })  # fmt: skip
    return 0


def _code() -> str:
    """Which code this is: versions stand still between releases."""
    sha = hashlib.sha256()
    for file in sorted(Path(qmoe.cli.commands.__file__).parent.rglob("*.py")):
        sha.update(file.read_bytes())
    return sha.hexdigest()[:12]


if __name__ == "__main__":
    assert qmoe.cli.commands  # imported before the clock starts
    sys.exit(quantize(sys.argv[1:]))
