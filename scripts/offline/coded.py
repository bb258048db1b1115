"""The kernels for EXL3's codes: what the report compiles of them, and what it demands.

Every tile of an architecture; at BM 16 the rates and codebooks of the table of figures; rates that
differ in one launch; and the rotations around the codes. `full` adds every rate on every tile.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

from offline.cases import Finding
from offline.compile import Compiled, compile_for
from offline.sass import counts, main_loops
from qmoe.format.exl3 import CODEBOOKS, RATES
from qmoe.kernels.coded.tiles import ROWS, tiles_for
from qmoe.kernels.device.coded import COLUMNS, coded_gemm
from qmoe.kernels.device.turn import turn_and_sum, turn_between, turn_in, turn_out
from qmoe.kernels.launch import Table, Tile

LIMIT = 8.0  # instructions per weight at BM 16, whole loop
SHOWN = (2, 3, 4)
MIXED = (2, 3, 4, 6)
TURNS: dict[str, Any] = {
    k.fn.__name__: k for k in (turn_in, turn_out, turn_between, turn_and_sum)
}  # fmt: skip


@dataclass(frozen=True)
class CodedCase:
    """One compilation of coded_gemm. More than one rate: they are told apart at run time."""

    table: Table
    tile: Tile
    rates: tuple[float, ...]
    codebook: str = "mul1"
    p2: int = 64

    def __str__(self) -> str:
        rates = "+".join(f"{rate:g}" for rate in self.rates)
        return f"{self.table.arch} BM{self.tile.BM} exl3 {rates} {self.codebook} p2={self.p2}"


def coded_cases(table: Table, full: bool = False) -> Iterator[CodedCase]:
    tiles = tiles_for(table)
    for rate in SHOWN:
        yield CodedCase(table, tiles[16], (rate,))
    for codebook in CODEBOOKS[1:]:
        yield CodedCase(table, tiles[16], (3,), codebook)
    for bm, tile in tiles.items():
        if bm != 16:
            yield CodedCase(table, tile, (3,), p2=0 if bm > 32 else 64)
        yield CodedCase(table, tile, (7,), p2=0)  # runs of two: the most words
    yield CodedCase(table, tiles[16], MIXED)
    if full:
        for (bm, tile), rate, codebook in product(tiles.items(), RATES, CODEBOOKS):
            yield CodedCase(table, tile, (rate,), codebook, 0 if bm > 32 else 64)


def check_coded(case: CodedCase) -> Finding:
    """Compile a case and hold it to the demands."""
    done = _compile(case)
    found = Finding(case, done.registers, done.spilled, done.shared)
    if done.spilled:
        found.failed.append(f"spills {done.spilled}")
    if done.shared > case.table.shared_memory > 0:
        found.failed.append(f"{done.shared} B of shared memory, {case.table.shared_memory} there")
    if not case.table.arch.startswith("sm"):
        return found
    loops = main_loops(done.assembly)
    if len(loops) != len(case.rates):
        found.failed.append(f"{len(loops)} main loops, expected {len(case.rates)}")
    tile, columns = case.tile, COLUMNS.value
    threads = 32 * tile.warps
    for loop in loops:
        found.per_weight.append(len(loop) / (tile.BN * columns / threads))
        found.per_mma.append(len(loop) * tile.warps / (tile.BN * tile.BM * columns / 2048))
        if not any(i.op == "LDGSTS" for i in loop):
            found.failed.append("no async copy of codes")
        # Decoded weights would be two bytes each; tokens are stored on sm100.
        stored = sum(i.bytes for i in loop if i.op in ("STS", "STSM"))
        if stored * threads > tile.BN * columns:
            found.failed.append(f"{stored} B a thread stored to shared memory in the loop")
        if not any("MMA" in op for op in counts(loop)):
            found.failed.append("no tensor-core instruction")
        if any(i.op in ("LDL", "STL") for i in loop):
            found.failed.append("local memory in the loop")
    if tile.BM == 16 and max(case.rates) <= 4 and max(found.per_weight, default=0) > LIMIT:
        found.failed.append(f"{max(found.per_weight):.2f} instructions per weight, at most {LIMIT}")
    return found


def _compile(case: CodedCase) -> Compiled:
    types = dict(
        x_ptr="*fp16", arena_ptr="*u8", table_ptr="*i32", starts_ptr="*i32", out_ptr="*fp32",
        ids_ptr="*i64", order_ptr="*i32", tiles_ptr="*i32",
    )  # fmt: skip
    types = {n: types.get(n, "i32") for n in coded_gemm.arg_names}
    constants = dict(
        BM=case.tile.BM, BN=case.tile.BN, RATES=sum(1 << int(2 * r) for r in case.rates),
        CODEBOOK=case.codebook, P2=case.p2, SPLIT=2, PTX=case.table.ptx, ORDER=case.table.order,
    )  # fmt: skip
    divisible = {"N", "K", "split_stride"}
    arch, options = case.table.arch, case.tile.options()
    return compile_for(arch, coded_gemm, types, constants, divisible, options)


@dataclass(frozen=True)
class Turn:
    """One compilation of a kernel of device/turn.py."""

    table: Table
    kernel: str

    def __str__(self) -> str:
        return f"{self.table.arch} {self.kernel}"


def turns(table: Table) -> Iterator[Turn]:
    for name in TURNS:
        yield Turn(table, name)


def compile_turn(case: Turn) -> Compiled:
    kernel, order = TURNS[case.kernel], case.table.order
    pointers = dict(
        x_ptr="*bf16", sums_ptr="*fp32", arena_ptr="*u8", table_ptr="*i32", bias_ptr="*bf16",
        ids_ptr="*i64", gates_ptr="*bf16", y_ptr="*bf16", alpha="fp32", limit="fp32",
        out_ptr="*bf16" if case.kernel == "turn_out" else "*fp16",
    )  # fmt: skip
    types = {n: pointers.get(n, "i32") for n in kernel.arg_names}
    every: dict[str, Any] = dict(
        ROWS=ROWS, ONE=False, ORDER=order, HALVES=True, SPLIT=2, BIAS=True, ACT="gelu_tanh",
        TOKENS=ROWS // 8, A2=8,
    )  # fmt: skip
    constants = {n: value for n, value in every.items() if n in kernel.arg_names}
    options = {"num_warps": 4, "num_stages": 2}
    return compile_for(case.table.arch, kernel, types, constants, {"N", "K"}, options, False)


def coded_rows(findings: list[Finding]) -> list[list[str]]:
    """Instructions per weight at BM 16, by architecture: the rates of SHOWN with mul1, rate 3 with
    the other codebooks; and, of the tile of 64 rows, at rate 3."""
    rows = []
    for arch in sorted(
        {f.case.table.arch for f in findings if f.per_weight}, key=lambda a: int(a[2:])
    ):

        def of(bm: int, rate: float, codebook: str, arch: str = arch) -> str:
            for f in findings:
                c = f.case
                if (c.table.arch, c.tile.BM, c.rates, c.codebook) == (arch, bm, (rate,), codebook):
                    return f"{max(f.per_weight):.2f}"
            return "-"

        shown = [of(16, rate, "mul1") for rate in SHOWN]
        rows.append([arch, *shown, *(of(16, 3, c) for c in CODEBOOKS[1:]), of(64, 3, "mul1")])
    return rows


HEADER = ["GPU", "2 bits", "3 bits", "4 bits", "3 bits, mcg", "3 bits, 3inst", "3 bits, BM 64"]
