"""Compile every shipped kernel configuration for GPUs that are not here, and hold it to its gates.

No GPU and no driver is needed: Triton brings the assembler and the disassembler. Exits with 1 if
anything spills, exceeds shared memory, stores weights back, or costs more instructions than it may.
What it says of time is projected, never measured.
"""

import argparse
import os
import sys
import time
from multiprocessing import Pool
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # `python -P` leaves it out

import triton
from offline import report
from offline.cases import cases, check, tables
from offline.coded import HEADER, check_coded, coded_cases, coded_rows, compile_turn, turns
from offline.others import compile_other, others
from offline.roofline import GPUS

from qmoe.cli.tables import show
from qmoe.kernels.device.target import ARCHITECTURES


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--arch", action="append", choices=ARCHITECTURES, help="default: all")
    parser.add_argument("--full", action="store_true", help="every width, group and tile (hours)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    args = parser.parse_args()
    start = time.monotonic()
    known = {t.arch: t for t in tables() if t.arch in (args.arch or ARCHITECTURES)}
    wanted = [case for table in known.values() for case in cases(table, args.full)]
    with Pool(args.jobs) as pool:
        findings = list(pool.imap(check, wanted))
        small = [other for table in known.values() for other in others(table, args.full)]
        compiled = list(zip(small, pool.imap(compile_other, small), strict=True))
        codes = [case for table in known.values() for case in coded_cases(table, args.full)]
        coded = list(pool.imap(check_coded, codes))
        around = [turn for table in known.values() for turn in turns(table)]
        compiled += zip(around, pool.imap(compile_turn, around), strict=True)
        rivals = pool.map(report.rival_row, [arch for arch in known if arch.startswith("sm")])

    header = ["configuration", "registers", "spilled", "shared KiB", "per weight", "per MMA", ""]
    show(f"compiled with Triton {triton.__version__}", header, report.case_rows(findings + coded))
    show(
        "routing, sums, expansion, rotations",
        ["kernel", "registers", "spilled"],
        [[str(other), str(c.registers), str(c.spilled)] for other, c in compiled],
    )
    show(
        "instructions per dequantized weight, whole kernel, BM 16, bf16",
        report.WEIGHT_HEADER,
        report.weight_rows(findings),
    )
    show(
        "instructions per weight decoded from EXL3's codes, whole loop, BM 16, fp16",
        HEADER,
        coded_rows(coded),
    )
    show(
        "other loops by the same counter, int4, 16x128x128 (bytes spilled)",
        ["GPU", "a byte per nibble (vLLM's)", "interleaved columns"],
        rivals,
    )
    rows, too_much = report.traffic_rows(known) if _known_gpu(known) else ([], [])
    show(
        "bytes moved at decode, as a share of the ideal (worst GPU, worst of sym and asym)",
        ["layer", "group", "int2", "int3", "int4", "int8"],
        rows,
    )
    show(
        "PROJECTED, not measured: microseconds of a layer's experts for one token, int4, with 3 "
        "launches (what bounds it)",
        ["layer", "group", *(gpu.name for gpu in GPUS)],
        report.projection_rows(known, findings),
    )
    failed = [f"{f.case}: {'; '.join(f.failed)}" for f in findings + coded if f.failed] + too_much
    failed += [f"{other}: spills {c.spilled}" for other, c in compiled if c.spilled]
    for line in failed:
        print("FAILED", line)
    seconds = time.monotonic() - start
    count = len(findings) + len(coded) + len(compiled)
    print(f"{count} configurations, {len(failed)} failed, {seconds:.0f} s")
    return 1 if failed else 0


def _known_gpu(known: dict[str, object]) -> bool:
    return any(gpu.arch in known for gpu in GPUS)


if __name__ == "__main__":
    sys.exit(main())
