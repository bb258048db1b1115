"""Time the kernels on the GPU that is here; without one, say so and run the static report.

Layers of real models against torch's grouped product in bfloat16, bitsandbytes NF4, a plain Triton
loop, and vLLM's kernel where it is installed, taking turns; every output is compared with a
reference before a clock starts. scripts/gpu_check.py does this and more, in one command.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import torch
from gpu.bench import bench
from gpu.cells import MIXED, layers_on
from gpu.record import Record


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--bits", nargs="+", default=["4"], choices=["2", "3", "4", "8", "mixed"])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 16, 64, 256, 2048])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--output", type=Path, default=Path("bench_kernels.json"))
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU here: nothing is timed. The static report follows.", flush=True)
        command = [sys.executable, "-P", str(Path(__file__).with_name("kernel_report.py"))]
        return subprocess.run(command, check=False).returncode
    device = torch.device("cuda")
    widths = [MIXED if bits == "mixed" else int(bits) for bits in args.bits]
    cells = [(layer, bits) for bits in widths for layer in layers_on(device)]
    record = Record(args.output)
    bench(record, device, cells, args.tokens, args.rounds)
    return 0 if record.finish() else 1


if __name__ == "__main__":
    sys.exit(main())
