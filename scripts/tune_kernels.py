"""Time every tile worth trying on the GPU that is here, and write its table for kernels/configs.

    python scripts/tune_kernels.py --output kernels/configs

A tile is compared with a reference before it is timed (scripts/gpu/tune.py). A user's process never
does this.
"""

import argparse
import sys
from pathlib import Path

import torch
from gpu.record import Record
from gpu.tune import tune


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("."), help="folder of the table")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU here: there is nothing to tune", file=sys.stderr)
        return 1
    record = Record(args.output / "tune_kernels.json")
    print(f"wrote {tune(record, torch.device('cuda'), args.output)}")
    return 0 if record.finish() else 1


if __name__ == "__main__":
    sys.exit(main())
