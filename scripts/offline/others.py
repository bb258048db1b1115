"""The kernels beside the GEMM: they must compile everywhere and spill nowhere."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from offline.compile import Compiled, compile_for
from qmoe.kernels.device.dequant import dequantize
from qmoe.kernels.device.route import (
    count_assignments,
    gate_rows,
    place_assignments,
    sum_contributions,
)
from qmoe.kernels.grouped import GATE_BLOCK, ROUTE_BLOCK, SUM_BLOCK
from qmoe.kernels.launch import Table

# By name: processes cannot hand kernels to each other.
KERNELS: dict[str, Any] = {
    k.fn.__name__: k
    for k in (count_assignments, place_assignments, sum_contributions, gate_rows, dequantize)
}
OPTIONS = {"num_warps": 4, "num_stages": 2}


@dataclass(frozen=True)
class Other:
    """One compilation of a small kernel. types: of its pointers; other arguments are integers."""

    table: Table
    kernel: str
    types: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]

    def __str__(self) -> str:
        settings = " ".join(f"{name}={value}" for name, value in self.constants)
        return f"{self.table.arch} {self.kernel} {settings}"


def others(table: Table, full: bool = False) -> Iterator[Other]:
    """Routing for 128 experts, sums, and expansion. full: also the placing by one block, which
    the placing by several contains."""

    def other(kernel: Any, types: dict[str, str], **constants: Any) -> Other:
        return Other(table, kernel.fn.__name__, tuple(types.items()), tuple(constants.items()))

    ids = {"ids_ptr": "*i64"}
    lists = {n: "*i32" for n in ("counts_ptr", "order_ptr", "tiles_ptr", "ends_ptr")}
    yield other(count_assignments, ids | lists, BLOCK=ROUTE_BLOCK, E2=256)
    for one in (False, True) if full else (False,):
        settings: dict[str, Any] = dict(BLOCK=ROUTE_BLOCK, E2=256, ONE_BLOCK=one)
        yield other(place_assignments, ids | lists, BM=64, INVERSE=False, **settings)
    sums = ids | {"parts_ptr": "*fp32", "inverse_ptr": "*i32", "gates_ptr": "*bf16"}
    sums |= {"y_ptr": "*bf16"}
    settings = dict(BLOCK=SUM_BLOCK // 8, A2=8, ALL=False, EARLY=table.early)
    for split, inverse in ((4, False), (1, True)):
        yield other(sum_contributions, sums, SPLIT=split, SORTED=inverse, **settings)
    rows = {"product_ptr": "*bf16", "out_ptr": "*bf16", "alpha": "fp32", "limit": "fp32"}
    yield other(gate_rows, rows, ACT="gelu_tanh", BLOCK=GATE_BLOCK)
    planes = {"arena_ptr": "*u8", "table_ptr": "*i32", "out_ptr": "*bf16"}
    yield other(
        dequantize, planes, GROUP=128, TAIL=2, ZERO=True, INTERLEAVED=True, ORDER=table.order
    )


def compile_other(case: Other) -> Compiled:
    types = dict(case.types)
    kernel = KERNELS[case.kernel]
    names = kernel.arg_names
    types = {n: types.get(n, "i32") for n in names}
    divisible = {n for n in names if n in ("N", "K") or n.endswith("stride")}
    constants = dict(case.constants)
    return compile_for(case.table.arch, kernel, types, constants, divisible, OPTIONS, False)
