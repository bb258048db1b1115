"""Choose tiles and crossovers on the GPU that is here, and write its table for kernels/configs.

For each class of tiles and each BM, every candidate is compiled, compared with the reference and
timed on layers of real models at a number of tokens that gives each expert about BM rows; the one
wins that is nearest to the best over all of them. Then, with those tiles, what the table knows
beside them: until how many assignments a program looks for its rows itself, how far K is split,
whether kernels start early, and from how many rows per expert expanding the weights wins.
"""

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

import torch
from offline.roofline import Layer

from gpu.cells import (
    MIXED,
    Bits,
    Job,
    Packed,
    batch,
    check_layer,
    compile_all,
    layers_on,
    ours,
    pack_layer,
    using,
    width,
)
from gpu.clock import captured, in_turn
from gpu.record import Record, write_json
from gpu.rivals import SILU
from qmoe.kernels.launch import CONFIGS, Table, Tile, few_programs
from qmoe.kernels.layer import device_table
from qmoe.kernels.reference import layer_reference

ROUNDS = 7
NEVER = 1 << 20  # rows per expert
# Microseconds by class and BM, by tile, by cell.
Times = dict[tuple[str, int], dict[Tile, dict[str, float]]]


@dataclass(frozen=True)
class Cell:
    """Where candidates are compared."""

    layer: Layer
    bits: Bits
    tokens: int

    def __str__(self) -> str:
        return f"{self.layer.name} {width(self.bits)} bits {self.tokens} tokens"


def tune(record: Record, device: torch.device, configs: Path = CONFIGS) -> Path:
    """Write configs/<device>.json and return its path; every candidate's time is a row."""
    table, multiprocessors = device_table(device)
    table = replace(table, dense_rows=NEVER, narrow={})
    jobs = {
        (name, bm, tile, cell): Job(cell.layer, cell.bits, cell.tokens, only(table, tile))
        for name, bm, tile, cell in candidates(table, device)
    }
    print(f"    compiling {len(jobs)} candidates", flush=True)
    failed = dict(zip(jobs, compile_all(list(jobs.values()), device), strict=True))
    for (name, bm, tile, cell), why in failed.items():
        if why:
            record.row(
                what="left out", name=name, BM=bm, tile=_short(tile), cell=str(cell), why=why
            )
    layers = {(c.layer, c.bits): [] for *_, c in jobs}
    for key in jobs:
        layers[key[3].layer, key[3].bits].append(key)
    few = {str(c) for _, bm, _, c in jobs if bm == 8 and _few(table, multiprocessors, c)}
    timed: Times = {}
    for (layer, bits), keys in layers.items():
        packed = pack_layer(layer, bits, device)
        for cell in dict.fromkeys(key[3] for key in keys):
            tables = {
                (name, bm, tile): jobs[name, bm, tile, at].table
                for name, bm, tile, at in keys
                if at == cell and not failed[name, bm, tile, at]
            }
            for (name, bm, tile), us in compare(packed, cell, tables, record).items():
                timed.setdefault((name, bm), {}).setdefault(tile, {})[str(cell)] = us
                record.row(what="tile", name=name, BM=bm, tile=_short(tile), cell=str(cell), us=us)
        # After every layer: a run that is cut short leaves what it found.
        write_table(with_best(table, timed, few), timed, device, configs)
    table = crossovers(with_best(table, timed, few), device, record)
    return write_table(table, timed, device, configs)


def with_best(table: Table, timed: Times, few: set[str]) -> Table:
    """The table with the best tile of every class and BM that was timed; cells of few programs
    choose the narrow ones."""
    tiles = {name: dict(by_bm) for name, by_bm in table.tiles.items()}
    narrow = dict(table.narrow)
    for (name, bm), seen in timed.items():
        parts = [
            {tile: cells for tile, at in seen.items() if (cells := _only(at, few, inside))}
            for inside in (True, False)
        ]
        if parts[0]:
            narrow[name] = best(parts[0])
        if parts[1]:
            tiles[name][bm] = best(parts[1])
    tiles = {n: dict(sorted(by_bm.items())) for n, by_bm in tiles.items()}
    return replace(table, tiles=tiles, narrow=narrow)


def _few(table: Table, multiprocessors: int, cell: Cell) -> bool:
    layer, wide = cell.layer, Tile(8, 128, 4, 3)
    wanted = multiprocessors * table.waves
    return few_programs(wide, cell.tokens * layer.A, layer.E, 2 * layer.I, wanted)


def _only(at: dict[str, float], few: set[str], inside: bool) -> dict[str, float]:
    return {cell: us for cell, us in at.items() if (cell in few) == inside}


def write_table(table: Table, timed: Times, device: torch.device, configs: Path) -> Path:
    """configs/<device>.json, with what was seen."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"
    table = replace(table, source=f"timed on {name} by scripts/tune_kernels.py")
    path = configs / (re.sub(r"[^A-Za-z0-9]+", "_", name) + ".json")
    shown = {
        f"{name} {bm}": {_short(tile): cells for tile, cells in seen.items()}
        for (name, bm), seen in timed.items()
    }
    write_json(path, as_json(table) | {"timed": shown})
    return path


def candidates(table: Table, device: torch.device) -> Iterator[tuple[str, int, Tile, Cell]]:
    """Every tile to try, in every cell of its class and BM."""
    layers = {layer.name: layer for layer in layers_on(device)}
    if device.type == "cpu":
        toy = layers["toy"]
        for stages, tokens in product((1, 2), (1, 3)):
            yield "fine", 8, Tile(8, 128, 4, stages), Cell(toy, 4, tokens)
        return
    qwen, mixtral, oss = (layers[n] for n in ("Qwen3-30B-A3B", "Mixtral-8x7B", "gpt-oss-20b"))
    where: dict[str, list[tuple[Layer, Bits]]] = {
        "light": [(qwen, 4), (mixtral, 4)],
        "heavy": [(qwen, 8), (qwen, MIXED)],
        "fine": [(oss, 4)],
        "fine_heavy": [(oss, 8), (oss, MIXED)],
    }
    for name, cells in where.items():
        for bm, (layer, bits) in product((8, 16, 32, 64, 128), cells):
            if bm > 64 and bits == MIXED:
                continue
            for tile, tokens in product(shapes(bm), tokens_for(bm, layer)):
                yield name, bm, tile, Cell(layer, bits, tokens)


def shapes(bm: int) -> list[Tile]:
    """What is worth trying: few rows want small tiles and many programs, many rows the opposite."""
    if bm == 8:
        tried = [(32, 2, 2), (32, 2, 3), (64, 4, 2), (64, 4, 3), (128, 4, 2), (128, 4, 3)]
    elif bm == 16:
        tried = [(64, 4, 2), (64, 4, 3), (128, 4, 2), (128, 8, 2), (128, 8, 3)]
    elif bm == 32:
        tried = [(64, 4, 2), (128, 4, 2), (128, 4, 3), (128, 8, 2), (128, 8, 3)]
    elif bm == 64:
        tried = [(128, 4, 2), (128, 4, 3), (128, 8, 2), (128, 8, 3), (256, 8, 2)]
    else:
        tried = [(128, 8, 3), (128, 8, 4), (128, 4, 4), (256, 8, 3), (256, 8, 4), (256, 8, 5)]
    return [Tile(bm, *shape) for shape in tried]


def tokens_for(bm: int, layer: Layer) -> tuple[int, ...]:
    """Numbers of tokens for which launch.choose_tiles takes this BM."""
    if bm == 8:
        return (1, 8)
    return (int(0.9 * bm * layer.E / layer.A),)


def only(table: Table, tile: Tile) -> Table:
    """The table with one tile for everything."""
    return replace(table, tiles={name: {tile.BM: tile} for name in table.tiles}, narrow={})


def compare(
    packed: Packed, cell: Cell, tables: dict[Any, Table | None], record: Record
) -> dict[Any, float]:
    """Median microseconds by each table, those left out whose output is wrong or that fail."""
    device = packed.arena.buffer.device
    given = batch(cell.layer, cell.tokens, device)
    wanted = layer_reference(*given, packed.first, packed.second, SILU)
    run, ready = ours(packed), {}
    for key, table in tables.items():
        with using(table, device):
            try:
                check_layer(run(*given), wanted, given[0].dtype, f"{key} on {cell}")
            except ArithmeticError as error:
                record.problem(str(error))
                continue
            if table is not None and table.dense_rows == 0:  # reads back to the host
                ready[key] = _with(table, device, lambda: run(*given))
            else:
                ready[key] = captured(lambda: run(*given), device)
    rounds = ROUNDS if device.type == "cuda" else 1
    return {k: 1e6 * s for k, s in in_turn(ready, rounds, device, given).items()}


def _with(table: Table, device: torch.device, run: Any) -> Any:
    def under() -> None:
        with using(table, device):
            run()

    return under


def best(seen: dict[Tile, dict[str, float]]) -> Tile:
    """The tile nearest to the fastest over all cells, by the product of the ratios; only tiles that
    ran in every cell count, if there are any."""
    cells = {cell for at in seen.values() for cell in at}
    fastest = {cell: min(at[cell] for at in seen.values() if cell in at) for cell in cells}
    whole = {tile: at for tile, at in seen.items() if set(at) == cells} or seen
    return min(whole, key=lambda t: prod(us / fastest[c] for c, us in whole[t].items()))


def crossovers(table: Table, device: torch.device, record: Record) -> Table:
    """inline_rows, waves, early and dense_rows, each by what is faster."""
    layers = layers_on(device)
    some = [layer for layer in layers if layer.name in ("Qwen3-30B-A3B", "Mixtral-8x7B", "toy")]
    trials: list[tuple[Layer, str, int, dict[Any, Table]]] = []
    starts = (False, True) if can_start_early(table) else ()
    for layer in some:
        for tokens in (1, 2, 8) if device.type == "cuda" else (1,):
            trials.append((layer, "early", tokens, {
                e: replace(table, early=e) for e in starts
            }))  # fmt: skip
            trials.append((layer, "waves", tokens, {
                w: replace(table, waves=w) for w in (1, 2, 4)
            }))  # fmt: skip
        for rows in (16, 64, 256) if device.type == "cuda" else (4,):
            trials.append((layer, "inline_rows", max(2, rows // layer.A), {
                r: replace(table, inline_rows=r) for r in (0, 256)
            }))  # fmt: skip
        for rows in (128, 256, 512, 1024) if device.type == "cuda" else (4,):
            trials.append((layer, "dense_rows", rows * layer.E // layer.A, {
                d: replace(table, dense_rows=d) for d in (0, NEVER)
            }))  # fmt: skip
    trials = [trial for trial in trials if trial[3]]
    compile_all([Job(layer, 4, tokens, t) for layer, _, tokens, tables in trials
                 for t in tables.values()], device)  # fmt: skip
    seen: dict[str, list[tuple[int, dict[Any, float]]]] = {}
    for layer in some:
        packed = pack_layer(layer, 4, device)
        for at, what, tokens, tables in trials:
            if at == layer:
                us = compare(packed, Cell(layer, 4, tokens), dict(tables), record)
                record.row(what=what, layer=layer.name, tokens=tokens,
                           **{str(k): v for k, v in us.items()})  # fmt: skip
                seen.setdefault(what, []).append((tokens * layer.A // layer.E
                    if what == "dense_rows" else tokens * layer.A, us))  # fmt: skip
    return chosen(table, seen)


def chosen(table: Table, seen: dict[str, list[tuple[int, dict[Any, float]]]]) -> Table:
    """The table with what the trials say: for each setting (size, microseconds by value)."""
    values: dict[str, Any] = {}
    for what in ("early", "waves"):
        if what in seen:
            every = [us for _, us in seen[what]]
            values[what] = min(
                every[0], key=lambda v: prod(us[v] / min(us.values()) for us in every)
            )
    inline = [size for size, us in seen["inline_rows"] if us[256] <= us[0]]
    values["inline_rows"] = min(max(inline, default=0), 256)
    lost = [size for size, us in seen["dense_rows"] if us[NEVER] <= us[0]]
    won = [size for size, us in seen["dense_rows"] if size > max(lost, default=0)]
    values["dense_rows"] = min(won, default=4 * max(size for size, _ in seen["dense_rows"]))
    return replace(table, **values)


def can_start_early(table: Table) -> bool:
    return table.arch.startswith("sm") and int(table.arch[2:]) >= 90


def as_json(table: Table) -> dict[str, Any]:
    """What launch.read_table reads."""
    raw = asdict(table)
    raw["tiles"] = {
        name: {str(bm): {k: v for k, v in tile.items() if k != "BM"} for bm, tile in by_bm.items()}
        for name, by_bm in raw["tiles"].items()
    }
    raw["narrow"] = {n: {k: v for k, v in t.items() if k != "BM"} for n, t in raw["narrow"].items()}
    return raw


def _short(tile: Tile) -> str:
    return f"BN{tile.BN} {tile.warps}w {tile.stages}s"
