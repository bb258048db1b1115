"""Which tile a product with EXL3's codes is launched with: a pure function, and one table for
NVIDIA's GPUs and one for AMD's, chosen for no spills (scripts/kernel_report.py). Nobody has timed
them."""

from functools import cache

import torch
from jaxtyping import Int32
from torch import Tensor

from qmoe.kernels.device.trellis import run_of, start_of
from qmoe.kernels.launch import Table, Tile, mean_rows

NVIDIA = {bm: Tile(bm, 128, 4, 3) for bm in (8, 16, 32, 64)}
# Rows that a program of device/turn.py rotates: 64 would spill.
ROWS = 16
AMD = {bm: Tile(bm, 128, 8, 2) for bm in (16, 32, 64)}


def tiles_for(table: Table) -> dict[int, Tile]:
    """The tiles of an architecture, by their rows."""
    return AMD if table.arch.startswith("gfx") else NVIDIA


def choose(table: Table, assignments: int, experts: int) -> Tile:
    """The smallest that holds the mean expert's rows."""
    tiles, rows = tiles_for(table), mean_rows(assignments, experts)
    return next((tile for bm, tile in sorted(tiles.items()) if bm >= rows), tiles[max(tiles)])


@cache
def starts_table(device: torch.device) -> Int32[Tensor, "17 128"]:
    """`starts_of` of device/trellis.py for every rate in half bits."""
    table = torch.zeros(17, 128, dtype=torch.int32)
    for rate in range(2, 17):
        starts = [start_of(p, rate) % 32 for p in range(0, 256, run_of(rate))]
        table[rate, : len(starts)] = torch.tensor(starts, dtype=torch.int32)
    return table.to(device)
