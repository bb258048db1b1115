"""Layers and linears in EXL3's codes: compared with the matrices they stand for, then timed beside
bf16. Codes are random bits; every expert is a copy of one of a few, since decoding a reference for
all of them would take most of the step."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from offline.roofline import Layer
from torch import Tensor

from gpu.cells import batch, dtype_on, layers_on, width
from gpu.clock import captured, in_turn, read_bandwidth
from gpu.record import Record
from gpu.rivals import SILU, rivals
from qmoe.format.trellis import Codes, padded
from qmoe.kernels.coded import layer as kernels
from qmoe.kernels.coded.arena import CodedArena, build_coded_arena
from qmoe.kernels.reference import check_layer

Rates = float | tuple[float, ...]
MIXED = (2.0, 2.5, 3.0, 4.0)
DISTINCT = len(MIXED)  # experts


@dataclass(frozen=True)
class CodedLayer:
    """A layer's experts: the first matrices and the second of each distinct one in floating point,
    and as the kernels hold them."""

    layer: Layer
    rates: Rates
    first: Sequence[Tensor]
    second: Sequence[Tensor]
    arena: CodedArena


def coded(record: Record, device: torch.device, tokens: Sequence[int], rounds: int) -> None:
    """A row for every layer, rate and number of tokens, and for a linear of 6 bits."""
    peak = read_bandwidth(device)
    linear_row(record, device)
    for layer in layers_on(device)[:1]:
        others = rivals(layer, 2, dtype_on(device), device)
        for rates in (2.0, 3.0, 4.0, MIXED):
            if all(record.has(layer=layer.name, bits=width(rates), tokens=T) for T in tokens):
                continue
            made = make(layer, rates, device)
            for T in tokens:
                try:
                    record.row(**timed_row(made, T, others, peak, rounds))
                except ArithmeticError as error:
                    record.problem(str(error))


def make(layer: Layer, rates: Rates, device: torch.device) -> CodedLayer:
    torch.manual_seed(0)
    each = rates if isinstance(rates, tuple) else (rates,)
    shapes = ((layer.I, layer.H), (layer.I, layer.H), (layer.H, layer.I))
    few = [[random_codes(n, k, each[e % len(each)]) for e in range(DISTINCT)] for n, k in shapes]
    gate, up, down = ([codes.dequantize()[0].to(device) for codes in stack] for stack in few)
    first = [torch.cat(pair) for pair in zip(gate, up, strict=True)]
    stacks = [[stack[e % DISTINCT] for e in range(layer.E)] for stack in few]
    arena = build_coded_arena(stacks, 2, dtype_on(device), device)
    return CodedLayer(layer, rates, first, down, arena)


def random_codes(n: int, k: int, rate: float) -> Codes:
    shape = (1, padded(k) // 16, padded(n) // 16, int(16 * rate))
    trellis = torch.randint(-(1 << 15), 1 << 15, shape).to(torch.int16)
    suh, svh = torch.randn(1, padded(k)).sign(), torch.randn(1, padded(n)).sign() * k**-0.5
    return Codes(trellis, suh.half(), svh.half(), "mul1", n, k)


def check(made: CodedLayer, tokens: int, device: torch.device) -> float:
    """The worst block's relative error; raises ArithmeticError if it is more than rounding."""
    x, ids, gates = batch(made.layer, tokens, device)
    y = kernels.routed_experts(x, ids, gates, made.arena, SILU)
    wanted = torch.zeros(tokens, made.layer.H, device=device)
    for e in range(DISTINCT):
        token, slot = torch.where(ids % DISTINCT == e)
        if len(token):
            mid = SILU(x[token].float() @ made.first[e].T)
            out = mid @ made.second[e].T * gates[token, slot, None].float()
            wanted.index_add_(0, token, out)
    what = f"{made.layer.name}, exl3, {width(made.rates)} bits, {tokens} tokens"
    return check_layer(y, wanted, x.dtype, what)


def timed_row(
    made: CodedLayer, tokens: int, others: dict[str, Any], peak: float, rounds: int
) -> dict[str, Any]:
    """Microseconds of ours and of bf16, taking turns; GB/s counts the experts in use."""
    device, layer = made.arena.buffer.device, made.layer
    error = check(made, tokens, device)
    given = batch(layer, tokens, device)
    runs = {"qmoe": lambda: kernels.routed_experts(*given, made.arena, SILU)}
    runs |= {name: lambda run=run: run(*given) for name, run in others.items()}
    ready = {name: captured(run, device) for name, run in runs.items()}
    seconds = in_turn(ready, rounds, device, given)
    mine, ranges = seconds["qmoe"], made.arena.ranges()
    used = sum(ranges[e][1] for e in given[1].unique().tolist())
    row: dict[str, Any] = {
        "layer": layer.name, "group": "exl3", "bits": width(made.rates), "tokens": tokens,
        "error": error, **{f"{name}_us": 1e6 * s for name, s in seconds.items()},
        "gbps": used / mine / 1e9, "share_of_read": used / mine / peak,
        "tflops": 2 * tokens * layer.A * 3 * layer.H * layer.I / mine / 1e12,
    }  # fmt: skip
    return row | {f"times_{name}": s / mine for name, s in seconds.items() if name != "qmoe"}


def linear_row(record: Record, device: torch.device) -> None:
    """A linear of 6 bits, as attention gets by default: compared only."""
    n, k = (4096, 2048) if device.type == "cuda" else (130, 100)
    codes, dtype = random_codes(n, k, 6), dtype_on(device)
    arena, weight = build_coded_arena([[codes]], 1, dtype, device), codes.dequantize()[0].to(device)
    for M in (1, 7, 300) if device.type == "cuda" else (1, 7):
        x = torch.randn(M, k, device=device, dtype=dtype)
        try:
            check_layer(kernels.linear(x, arena), x.float() @ weight.T, dtype, f"linear, {M} rows")
        except ArithmeticError as error:
            record.problem(str(error))
