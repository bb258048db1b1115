"""Which tile to launch: a pure function of shapes, with a table per GPU or architecture.

A table is a JSON file in configs/: one named after the device if somebody tuned it there
(scripts/tune_kernels.py), else the architecture's. Every tile of the architectures' tables is
compiled and checked by scripts/kernel_report.py. Nothing is ever tuned in a user's process.
"""

import json
import re
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from qmoe.kernels.device.target import ARCHITECTURES, Order

CONFIGS = Path(__file__).parent / "configs"
LARGEST_SPLIT = 8


@dataclass(frozen=True)
class Tile:
    """BM rows x BN outputs per program, and what Triton compiles it with.

    registers: a bound per thread, 0 for the assembler's own choice. It likes to spill a word or two
    to get below 128; told that it may have more, it does not.
    """

    BM: int
    BN: int
    warps: int
    stages: int
    registers: int = 0

    def options(self) -> dict[str, int]:
        """Triton's compile options."""
        chosen = {"num_warps": self.warps, "num_stages": self.stages}
        return chosen | ({"maxnreg": self.registers} if self.registers else {})


@dataclass(frozen=True)
class Table:
    """What is known of one GPU or architecture.

    tiles: by `tile_class` and BM.
    dense_rows: mean rows per expert from which expanding the weights and a dense product win.
    linear_rows: the same for a linear, whose dense product is faster than a grouped one.
    order, ptx: the K order and the unpack its matrix unit wants.
    inline_rows: assignments up to which programs find their rows in the ids themselves
    (device/gemm.py), at most 256. waves: programs per multiprocessor that K is split for. early:
    kernels are started before the one in front of them is done (CUDA's programmatic dependent
    launch, from sm90 on). narrow: by `tile_class`, what layers take instead of the tile of 8 rows
    where that one would give a multiprocessor fewer than `waves` programs.
    """

    arch: str
    order: Order
    ptx: bool
    shared_memory: int
    source: str
    dense_rows: int
    tiles: dict[str, dict[int, Tile]]
    linear_rows: int = 256
    inline_rows: int = 256
    waves: int = 2
    early: bool = False
    narrow: dict[str, Tile] = field(default_factory=dict)


def table_for(device: str, arch: str) -> Table:
    """The table of a device, by its own name, else its architecture's, else the nearest older
    architecture of the same vendor. Raises ValueError if there is none."""
    own = CONFIGS / (re.sub(r"[^A-Za-z0-9]+", "_", device) + ".json")
    if own.is_file():
        return read_table(own)
    for candidate in (arch, _nearest(arch)):
        if candidate and (path := CONFIGS / f"{candidate}.json").is_file():
            return read_table(path)
    raise ValueError(f"{device} ({arch}): no kernels for it; there are for {list(ARCHITECTURES)}")


def _nearest(arch: str) -> str | None:
    """sm87 runs what sm86 does. wgmma and tcgen05 exist in one generation only, so tables of 90
    and 100 are for none but their own."""
    if not arch.startswith("sm"):
        return None
    shipped = [
        int(a[2:]) for a in ARCHITECTURES if a.startswith("sm") and a not in ("sm90", "sm100")
    ]
    older = [n for n in shipped if n <= int(arch[2:])]
    return f"sm{max(older)}" if older else None


@lru_cache
def read_table(path: Path) -> Table:
    """Read a table; KeyError or TypeError if it does not have just the fields it should. `timed`,
    the microseconds that a tuner saw, is for people."""
    raw: dict[str, Any] = json.loads(path.read_text())
    raw.pop("timed", None)
    tiles = {
        weight: {int(bm): Tile(int(bm), **fields) for bm, fields in by_bm.items()}
        for weight, by_bm in raw.pop("tiles").items()
    }
    narrow = {weight: Tile(8, **fields) for weight, fields in raw.pop("narrow", {}).items()}
    return Table(**raw, tiles=tiles, narrow=narrow)


def tile_class(bits: int, group: int) -> str:
    """What limits a tile. fine: groups of 32, with a scale and a partial sum for every dot. heavy:
    8 bits, or widths that differ, with 8 planes of a tile in shared memory. Else light."""
    heavy = bits in (0, 8)
    if group == 32:
        return "fine_heavy" if heavy else "fine"
    return "heavy" if heavy else "light"


def mean_rows(assignments: int, experts: int) -> float:
    """Expected rows of an expert that has any, if routing were even."""
    active = experts * (1 - (1 - 1 / experts) ** assignments) if experts > 1 else 1.0
    return assignments / max(active, 1.0)


def choose_tile(table: Table, bits: int, group: int, assignments: int, experts: int) -> Tile:
    """The smallest BM that holds the mean expert's rows in one tile: padding is what small batches
    pay for, and weights read twice is what large ones do."""
    return choose_tiles(table, [(bits, group)], assignments, experts)[0]


def choose_tiles(
    table: Table, matrices: list[tuple[int, int]], assignments: int, experts: int
) -> list[Tile]:
    """The same for the (bits, group) of several matrices that share a schedule, and so BM."""
    classes = [table.tiles[tile_class(bits, group)] for bits, group in matrices]
    shared = sorted(set.intersection(*map(set, classes)))
    if any(bits in (0, 3) for bits, _ in matrices):
        # Steps of 3 bits are whole K tiles (device/gemm.py): several of them with the tokens of a
        # tile of 128 rows do not fit into shared memory.
        shared = [bm for bm in shared if bm < 128]
    rows = mean_rows(assignments, experts)
    BM = next((bm for bm in shared if bm >= rows), shared[-1])
    return [tiles[BM] for tiles in classes]


def few_programs(tile: Tile, assignments: int, experts: int, n: int, programs_wanted: int) -> bool:
    """Whether a product [*, n] in tiles of 8 rows has fewer programs than wanted."""
    return tile.BM == 8 and min(assignments, experts) * -(-n // tile.BN) < programs_wanted


def choose_split(
    tile: Tile, assignments: int, experts: int, n: int, k: int, programs_wanted: int
) -> int:
    """Shares of K, a power of two: as few as give the programs wanted, each of two K tiles or
    more."""
    active = min(assignments, experts)
    programs = active * -(-n // tile.BN)
    split = 1
    while split < LARGEST_SPLIT and programs * split < programs_wanted and k >= 1024 * split:
        split *= 2
    return split


def use_dense(table: Table, assignments: int, experts: int) -> bool:
    """Whether the batch is so large that expanding the weights first is the faster way."""
    return mean_rows(assignments, experts) >= table.dense_rows


def inline_width(assignments: int, tokens: int, inline_rows: int) -> int:
    """P2 of device/gemm.py: 1 for one token, whose experts nobody shares; the vector length with
    which programs search the ids; 0 if there are too many for that."""
    if tokens == 1:
        return 1
    if assignments > inline_rows:
        return 0
    return next(w for w in (16, 64, 256) if w >= assignments)


def most_tiles(assignments: int, experts: int, BM: int) -> int:
    """Tiles that any routing needs at most: the grid, and the size of the schedule's buffers."""
    return min(assignments, assignments // BM + experts)
