"""Layers of routed experts against what else can compute them; each compared before it is timed."""

from collections.abc import Sequence

import torch
from offline.roofline import Layer

from gpu.cells import (
    MIXED,
    Bits,
    Job,
    compile_all,
    layers_on,
    others_of,
    pack_layer,
    timed_row,
    width,
)
from gpu.clock import read_bandwidth
from gpu.record import Record

DECODE = (1, 2, 4, 8, 16)
SMALL = (64, 128, 256)
PREFILL = (2048, 4096, 8192)


def bench(
    record: Record,
    device: torch.device,
    cells: Sequence[tuple[Layer, Bits]],
    tokens: Sequence[int],
    rounds: int,
) -> None:
    """A row for every cell and number of tokens that the record does not have yet."""
    waiting = [
        Job(layer, bits, T)
        for layer, bits in cells
        for T in tokens
        if not record.has(layer=layer.name, bits=width(bits), tokens=T)
    ]
    failed = dict(zip(waiting, compile_all(waiting, device), strict=True))
    for job, why in failed.items():
        if why:
            record.problem(f"{job.layer.name}, {width(job.bits)} bits, {job.tokens} tokens: {why}")
    waiting = [job for job in waiting if not failed[job]]
    peak = read_bandwidth(device)
    for layer, bits in cells:
        mine = [job.tokens for job in waiting if (job.layer, job.bits) == (layer, bits)]
        if not mine:
            continue
        packed = pack_layer(layer, bits, device)
        others = others_of(layer, bits, device)
        for T in mine:
            try:
                row = timed_row(packed, T, others if T <= 16 else fast(others), peak, rounds)
                record.row(**row)
            except ArithmeticError as error:
                record.problem(str(error))


def fast(others: dict) -> dict:
    """Those that are no loop over experts: with many tokens only they are rivals."""
    return {name: run for name, run in others.items() if name in ("bf16", "vllm")}


def first_cells(device: torch.device) -> list[tuple[Layer, Bits]]:
    """4 bits everywhere: what most people use, in the order of NAMES."""
    return [(layer, 4) for layer in layers_on(device)]


def other_cells(device: torch.device) -> list[tuple[Layer, Bits]]:
    """The other widths."""
    widths: tuple[Bits, ...] = (MIXED, 3, 2, 8) if device.type == "cuda" else (MIXED,)
    return [(layer, bits) for bits in widths for layer in layers_on(device)[:2]]
