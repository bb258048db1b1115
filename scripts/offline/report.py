"""The report's tables: gates per configuration, figures per architecture, rivals, projections."""

from collections.abc import Iterable
from math import nan

from offline import rivals
from offline.cases import Finding
from offline.compile import compile_for
from offline.roofline import (
    GPUS,
    LAYERS,
    Gpu,
    Layer,
    projected_seconds,
    traffic,
)
from offline.sass import main_loops
from qmoe.kernels.launch import Table, choose_split, choose_tile

DECODE_LAUNCHES = 3
TRAFFIC_LIMIT = 1.10
RIVAL_K = 128

Rows = list[list[str]]


def case_rows(findings: Iterable[Finding]) -> Rows:
    """case, registers, spills, shared memory, instructions per weight, what failed."""
    return [
        [
            str(f.case),
            str(f.registers),
            str(f.spilled),
            f"{f.shared / 1024:.1f}",
            " ".join(f"{v:.2f}" for v in f.per_weight),
            " ".join(f"{v:.1f}" for v in f.per_mma),
            "; ".join(f.failed) or "ok",
        ]
        for f in findings
    ]


def weight_rows(findings: list[Finding]) -> Rows:
    """Instructions per weight at BM 16, by architecture: widths at g128 symmetric and asymmetric,
    then groups of 64 and 32 at 4 bits; and per MMA at BM 64."""
    archs = sorted({f.case.table.arch for f in findings if f.per_weight}, key=lambda a: int(a[2:]))

    def of(arch: str, BM: int, bits: int, group: int, zero: bool) -> str:
        for f in findings:
            c = f.case
            key = (c.table.arch, c.tile.BM, c.bits, c.group, c.zero, c.tail, c.dtype)
            if key == (arch, BM, bits, group, zero, 0, "bf16"):
                return f"{max(f.per_mma if BM == 64 else f.per_weight, default=nan):.2f}"
        return "-"

    wanted = [(16, bits, 128, zero) for bits in (2, 3, 4, 8) for zero in (False, True)]
    wanted += [(16, 4, 64, False), (16, 4, 32, False), (64, 4, 128, False)]
    return [[arch, *(of(arch, *key) for key in wanted)] for arch in archs]


WEIGHT_HEADER = ["GPU", "int2", "asym", "int3", "asym", "int4", "asym", "int8", "asym",
                 "int4 g64", "int4 g32", "per MMA, BM64"]  # fmt: skip


def rival_row(arch: str) -> list[str]:
    """The two restated loops at 16 x 128 x 128, 4 bits, 3 stages: instructions per weight and
    spilled bytes."""
    row = [arch]
    for kernel, weight in ((rivals.byte_per_nibble, "*u8"), (rivals.interleaved, "*i32")):
        types = {"x_ptr": "*bf16", "w_ptr": weight, "s_ptr": "*bf16", "out_ptr": "*bf16"}
        types |= {n: "*i32" for n in ("order_ptr", "tiles_ptr") if n in kernel.arg_names}
        types |= {n: "i32" for n in kernel.arg_names if n not in types}
        options = {"num_warps": 4, "num_stages": 3}
        constants = {"BM": 16, "BN": 128, "BK": RIVAL_K, "GROUP": 128}
        strides = {n for n in kernel.arg_names if n == "K" or n.endswith("stride")}
        done = compile_for(arch, kernel, types, constants, strides, options)
        (loop,) = main_loops(done.assembly)
        row.append(f"{len(loop) / RIVAL_K:.2f} ({done.spilled})")
    return row


def traffic_rows(tables: dict[str, Table]) -> tuple[Rows, list[str]]:
    """Bytes moved over the ideal at decode, by model and width, at the split each GPU gets; the
    largest of all GPUs is shown. Also what exceeds the limit; groups of 32 are only shown, because
    a byte per zero point is far above ideal there at 2 bits."""
    rows, failed = [], []
    for layer in LAYERS:
        row = [layer.name, str(layer.group)]
        for bits in (2, 3, 4, 8):
            worst = max(
                traffic(layer, bits, zero, _split(tables[gpu.arch], gpu, layer, bits)).ratio
                for gpu in GPUS
                if gpu.arch in tables
                for zero in (False, True)
            )
            row.append(f"{worst:.3f}")
            if worst > TRAFFIC_LIMIT and layer.group > 32:
                failed.append(f"{layer.name} int{bits}: {worst:.3f} of the ideal bytes")
        rows.append(row)
    return rows, failed


def _split(table: Table, gpu: Gpu, layer: Layer, bits: int) -> int:
    tile = choose_tile(table, bits, layer.group, layer.A, layer.E)
    programs = gpu.multiprocessors * table.waves
    return choose_split(tile, layer.A, layer.E, layer.H, layer.I, programs)


def projection_rows(tables: dict[str, Table], findings: list[Finding]) -> Rows:
    """Projected microseconds of a layer's experts for one token at 4 bits, and what bounds it."""
    rows = []
    for layer in LAYERS:
        row = [layer.name, str(layer.group)]
        for gpu in GPUS:
            cost = [
                max(f.per_weight, default=nan)
                for f in findings
                if f.case.table.arch == gpu.arch
                and (f.case.tile.BM, f.case.bits, f.case.zero, f.case.tail) == (16, 4, False, 0)
                and f.case.group == layer.group and f.case.dtype == "bf16"
            ]  # fmt: skip
            if not cost or gpu.arch not in tables:
                row.append("-")
                continue
            table = tables[gpu.arch]
            tile = choose_tile(table, 4, layer.group, layer.A, layer.E)
            moved = traffic(layer, 4, False, _split(table, gpu, layer, 4))
            bound = projected_seconds(gpu, moved, cost[0], tile.BM, DECODE_LAUNCHES)
            limit = max(("memory", "issue", "products"), key=lambda k: bound[k])
            row.append(f"{1e6 * bound['total']:.0f} ({limit} {1e6 * bound[limit]:.0f})")
        rows.append(row)
    return rows
