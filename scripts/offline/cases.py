"""The configurations that the report compiles, and what it demands of each.

Every tile of every shipped table; at BM 16 every width, symmetric and not, for the figures; widths
that differ; and a variant with everything on. `full` adds, for every tile, all widths, groups and
zero points in the form that needs the most registers, and every activation.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from offline.compile import Compiled, compile_for
from offline.sass import Instruction, counts, main_loops
from qmoe.kernels.device.activation import FUSED
from qmoe.kernels.device.gemm import grouped_gemm
from qmoe.kernels.device.target import ARCHITECTURES
from qmoe.kernels.launch import CONFIGS, Table, Tile, read_table, tile_class

SYMMETRIC_LIMITS = {2: 2.8, 3: 3.4, 4: 2.8, 8: 3.5}
SM100_LIMIT = 4.0
ASYMMETRIC_EXTRA = 0.25
MMA_LIMIT = 6.5
TILE_K = 256


@dataclass(frozen=True)
class Case:
    """One compilation of grouped_gemm. bits 0: widths differ at run time. p2: device/gemm.py."""

    table: Table
    tile: Tile
    bits: int
    group: int = 128
    zero: bool = False
    dtype: str = "bf16"
    activation: str = "silu"
    tail: int = 0
    p2: int = 64
    split: int = 1
    bias: bool = False

    def __str__(self) -> str:
        width = f"int{self.bits}" if self.bits else "mixed"
        group = f"g{self.group}" if self.group else "channel"
        rest = [self.dtype, self.activation, f"tail{self.tail}", f"p2={self.p2}"]
        rest += [f"split{self.split}"] * (self.split > 1) + ["bias"] * self.bias
        return (
            f"{self.table.arch} BM{self.tile.BM} {width} {group} "
            f"{'asym' if self.zero else 'sym'} {' '.join(rest)}"
        )


@dataclass
class Finding:
    """What a case (or one of coded.py) compiled to. per_weight: instructions per dequantized weight
    and loop. per_mma: per 16x8x16 matrix product. failed: the demands it does not meet."""

    case: Any
    registers: int
    spilled: int
    shared: int
    per_weight: list[float] = field(default_factory=list)
    per_mma: list[float] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)


def tables() -> list[Table]:
    """The architectures' tables. A device's own was compiled and checked where it was timed."""
    return [read_table(CONFIGS / f"{arch}.json") for arch in ARCHITECTURES]


def cases(table: Table, full: bool = False) -> Iterator[Case]:
    """The cases of one table."""
    seen = set()
    # What asks most of a tile comes first; it is compiled once, but for the figures at BM 16.
    for name in ("fine_heavy", "fine", "heavy", "light"):
        group = 32 if "fine" in name else 128
        for bm, tile in table.tiles[name].items():
            if tile not in seen or (bm == 16 and table.arch.startswith("sm")):
                seen.add(tile)
                yield Case(table, tile, 8 if "heavy" in name else 4, group, p2=0 if bm > 32 else 64)
    yield Case(
        table, table.tiles["heavy"][16], 8, 64, True,
        activation="none", tail=2, p2=0, split=2, bias=True,
    )  # fmt: skip
    yield Case(table, table.tiles["heavy"][16], 0)
    if table.arch.startswith("sm"):
        for bits, zero in product((2, 3, 4, 8), (False, True)):
            if zero or bits in (2, 3):
                yield Case(table, table.tiles[tile_class(bits, 128)][16], bits, zero=zero)
        yield Case(table, table.tiles["light"][16], 4, group=64)
    if full:
        yield from _all_cases(table)


def _all_cases(table: Table) -> Iterator[Case]:
    """Every width, group and zero-point setting on every tile, in the form that needs the most
    registers; and every activation."""
    for bits, group, zero in product((2, 3, 4, 8, 0), (0, 32, 64, 128), (False, True)):
        for bm, tile in table.tiles[tile_class(bits, group)].items():
            split = 2 if bm < 32 else 1
            worst: dict[str, Any] = dict(activation="none", tail=2, p2=0, split=split, bias=True)
            yield Case(table, tile, bits, group, zero, **worst)
    for activation in FUSED:
        tile = table.tiles["light"][16]
        yield Case(table, tile, 4, dtype="fp16", activation=activation, bias=True, p2=256)


def check(case: Case) -> Finding:
    """Compile a case and hold it to the demands."""
    done = _compile(case)
    found = Finding(case, done.registers, done.spilled, done.shared)
    if done.spilled:
        found.failed.append(f"spills {done.spilled}")
    if done.shared > case.table.shared_memory:
        found.failed.append(f"{done.shared} B of shared memory, {case.table.shared_memory} there")
    if case.table.arch.startswith("sm"):
        loops = main_loops(done.assembly)
        wanted = 1 if case.bits else 4
        if len(loops) != wanted:
            found.failed.append(f"{len(loops)} main loops, expected {wanted}")
        for loop in loops:
            _check_loop(found, loop)
        _check_limits(found)
    return found


def _compile(case: Case) -> Compiled:
    fused = case.activation != "none"
    number = f"*{case.dtype}"
    types = dict(
        x_ptr=number, arena_ptr="*u8", table_ptr="*i32", bias_ptr=number, gates_ptr=number,
        out_ptr=number if fused else "*fp32", ids_ptr="*i64", order_ptr="*i32", tiles_ptr="*i32",
        alpha="fp32", limit="fp32",
    )  # fmt: skip
    constants = dict(
        BM=case.tile.BM, BN=case.tile.BN, BITS=case.bits, GROUP=case.group, TAIL=case.tail,
        ZERO=case.zero, ACT=case.activation, INTERLEAVED=fused, BIAS=case.bias,
        WEIGHTED=not fused, P2=case.p2, SPLIT=case.split, PTX=case.table.ptx,
        ORDER=case.table.order, EARLY=case.table.early,
    )  # fmt: skip
    types = {n: types.get(n, "i32") for n in grouped_gemm.arg_names}
    strides = {"N", "K", "x_stride", "out_stride", "scale_stride", "split_stride"}
    options = case.tile.options()
    return compile_for(case.table.arch, grouped_gemm, types, constants, strides, options)


def _check_loop(found: Finding, loop: list[Instruction]) -> None:
    tile = found.case.tile
    threads = 32 * tile.warps
    weights = tile.BN * TILE_K / threads
    products = tile.BN * tile.BM * TILE_K / (16 * 8 * 16) / tile.warps
    found.per_weight.append(len(loop) / weights)
    found.per_mma.append(len(loop) / products)
    ops = counts(loop)
    copies = [i for i in loop if i.op == "LDGSTS"]
    if not any(i.bytes == 16 for i in copies):
        found.failed.append("no 16-byte async copy of weights")
    if any(i.op == "LDG" and i.bytes >= 4 for i in loop):
        found.failed.append("a load of weights or tokens that is not async")
    if not any("MMA" in op for op in ops):
        found.failed.append("no tensor-core instruction")
    # What is stored is scales and zero points, two bytes a row and group.
    stored = sum(i.bytes for i in loop if i.op in ("STS", "STSM"))
    if stored * threads > tile.BN * TILE_K * 2 / 8:
        found.failed.append(f"{stored} B a thread stored to shared memory in the loop")
    if any(i.op in ("LDL", "STL") for i in loop):
        found.failed.append("local memory in the loop")


def _check_limits(found: Finding) -> None:
    """Instructions per weight at BM 16 and g128, per matrix product at BM 64."""
    case = found.case
    if case.tile.BM == 64 and case.group == 128 and case.bits == 4 and not case.zero:
        worst = max(found.per_mma, default=0.0)
        if worst > MMA_LIMIT:
            found.failed.append(f"{worst:.2f} instructions per MMA, at most {MMA_LIMIT}")
    if case.tile.BM != 16 or case.group != 128:
        return
    limits = [SYMMETRIC_LIMITS[case.bits]] if case.bits else [max(SYMMETRIC_LIMITS.values())]
    limit = SM100_LIMIT if case.table.arch == "sm100" else limits[0]
    limit += ASYMMETRIC_EXTRA if case.zero else 0
    if max(found.per_weight, default=0.0) > limit:
        found.failed.append(f"{max(found.per_weight):.2f} instructions per weight, at most {limit}")
