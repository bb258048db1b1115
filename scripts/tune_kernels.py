"""Time every tile that fits on the GPU that is here, and write its table for kernels/configs.

    python scripts/tune_kernels.py --output kernels/configs

The table starts from the architecture's; for each class of tiles and BM the fastest variant over
the layer shapes of the benchmark wins. A user's process never does this.
"""

import argparse
import dataclasses
import json
import re
import sys
from itertools import product
from pathlib import Path
from statistics import median

import torch
from bench_kernels import random_stack, timed
from triton.runtime.errors import OutOfResources

from qmoe.kernels import experts
from qmoe.kernels.activation import Activation
from qmoe.kernels.launch import Table, Tile
from qmoe.kernels.offline.roofline import LAYERS

# Widths that stand for a class of tiles (launch.tile_class).
CLASS_BITS = {"light": 4, "heavy": 8}
ROUNDS = 10


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("."), help="folder of the table")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU here: there is nothing to tune", file=sys.stderr)
        return 1
    table, multiprocessors = experts.device_table(torch.device("cuda"))
    for name, bits in CLASS_BITS.items():
        for bm in table.tiles[name]:
            table = with_tile(table, name, best(table, multiprocessors, name, bits, bm))
    device = torch.cuda.get_device_name()
    path = args.output / (re.sub(r"[^A-Za-z0-9]+", "_", device) + ".json")
    table = dataclasses.replace(table, source=f"timed on {device}")
    path.write_text(json.dumps(as_json(table), indent=1) + "\n")
    print(f"wrote {path}")
    return 0


def best(table: Table, multiprocessors: int, name: str, bits: int, bm: int) -> Tile:
    """The tile with the least summed median time over the layers with groups above 32."""
    totals: dict[Tile, float] = {}
    old = table.tiles[name][bm]
    variants = product((64, 128), (4, 8), (2, 3, 4))
    for tile in [Tile(bm, *v, old.registers) for v in variants]:
        candidate = with_tile(table, name, tile)
        try:
            totals[tile] = sum(seconds(candidate, multiprocessors, layer, bits, bm)
                               for layer in LAYERS if layer.group > 32)  # fmt: skip
        except OutOfResources as error:
            print(f"{name} {tile}: {error}")
            continue
        print(f"{name} {tile}: {1e6 * totals[tile]:.0f} us")
    return min(totals, key=lambda tile: totals[tile])


def seconds(table: Table, multiprocessors: int, layer, bits: int, bm: int) -> float:
    """Median time of a layer with about bm rows for each expert in use."""
    T = max(1, bm * layer.E // layer.A) if bm > 8 else 1
    stack = random_stack(layer, bits)
    x = torch.randn(T, layer.H, device="cuda", dtype=torch.bfloat16)
    ids = torch.stack([torch.randperm(layer.E)[: layer.A] for _ in range(T)]).cuda()
    gates = torch.rand(T, layer.A, device="cuda")
    original = experts.device_table
    experts.device_table = lambda device: (table, multiprocessors)
    try:
        runs = [timed(lambda: stack.experts(x, ids, gates, Activation("silu")))
                for _ in range(ROUNDS + 2)]  # fmt: skip
    finally:
        experts.device_table = original
    return median(runs[2:])


def with_tile(table: Table, name: str, tile: Tile) -> Table:
    """The table with one tile replaced."""
    tiles = {key: dict(value) for key, value in table.tiles.items()}
    tiles[name][tile.BM] = tile
    return dataclasses.replace(table, tiles=tiles)


def as_json(table: Table) -> dict:
    """What launch.read_table reads."""
    raw = dataclasses.asdict(table)
    raw["tiles"] = {
        name: {str(bm): {k: v for k, v in tile.items() if k != "BM"} for bm, tile in by_bm.items()}
        for name, by_bm in raw["tiles"].items()
    }
    return raw


if __name__ == "__main__":
    sys.exit(main())
