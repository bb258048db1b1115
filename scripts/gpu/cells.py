"""One layer at one width: compared with a reference at every number of tokens, then timed.

A cell is never timed before its output was compared. Compiling is what takes long, so layers are
checked by several processes at once (`check_all`), which leaves the compiled kernels in Triton's
cache; the clock then runs in one process alone.
"""

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor

from gpu.clock import captured, in_turn
from gpu.rivals import GRAPHS, SILU, Run, rivals
from qmoe.kernels.arena import Arena, build_arena
from qmoe.kernels.experts import device_table, routed_experts
from qmoe.kernels.offline.roofline import LAYERS, Layer
from qmoe.kernels.reference import check_layer, layer_reference, random_matrices
from qmoe.types import Quantized

MIXED = (2, 3, 4, 8)
TOY = (Layer("toy", 6, 2, 256, 128, 32),)
NAMES = ("Qwen3-30B-A3B", "Mixtral-8x7B", "gpt-oss-20b", "DeepSeek-V2-Lite")
# Without gpt-oss's groups of 64, which nobody publishes: it is there for the static report.
REAL = tuple(sorted((x for x in LAYERS if x.name in NAMES and x.group != 64),
                    key=lambda x: NAMES.index(x.name)))  # fmt: skip
WORKER_BYTES = 8 << 30  # of the GPU, for one checking process


@dataclass(frozen=True)
class Packed:
    """A layer's experts as integers, and as the kernels hold them."""

    layer: Layer
    first: Sequence[Quantized]
    second: Sequence[Quantized]
    arena: Arena


def dtype_on(device: torch.device) -> torch.dtype:
    """bfloat16, which the interpreter does not know: float32 there."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def pack_layer(layer: Layer, bits: int | tuple[int, ...], device: torch.device) -> Packed:
    """Random experts, the same ones in every process."""
    torch.manual_seed(0)
    dtype, shapes = dtype_on(device), ((2 * layer.I, layer.H), (layer.H, layer.I))
    first, second = (
        random_matrices(layer.E, *shape, bits, layer.group, dtype, device) for shape in shapes
    )
    order = device_table(device)[0].order
    arena = build_arena([first, second], dtype, order, device, paired=True)
    return Packed(layer, first, second, arena)


def batch(layer: Layer, tokens: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, expert ids and gates."""
    torch.manual_seed(tokens)
    x = torch.randn(tokens, layer.H, device=device, dtype=dtype_on(device))
    ids = torch.stack([torch.randperm(layer.E)[: layer.A] for _ in range(tokens)]).to(device)
    return x, ids, torch.rand(tokens, layer.A, device=device) + 0.1


def check(packed: Packed, tokens: int, run: Run | None = None) -> float:
    """The worst block's relative error; raises ArithmeticError if it is more than rounding."""
    x, ids, gates = batch(packed.layer, tokens, packed.arena.buffer.device)
    run = run or (lambda *given: routed_experts(*given, packed.arena, SILU))
    wanted = layer_reference(x, ids, gates, packed.first, packed.second, SILU)
    widths = sorted({q.scheme.bits for q in packed.first})
    what = f"{packed.layer.name}, {widths} bits, {tokens} tokens"
    return check_layer(run(x, ids, gates), wanted, x.dtype, what)


def check_rows(
    layer: Layer, bits: int | tuple[int, ...], tokens: Iterable[int], device: str
) -> list[dict[str, Any]]:
    """One row per number of tokens: its error, or what is wrong. Runs in a process of its own."""
    rows: list[dict[str, Any]] = []
    packed = pack_layer(layer, bits, torch.device(device))
    for T in tokens:
        row: dict[str, Any] = {"layer": layer.name, "bits": width(bits), "tokens": T}
        try:
            row["error"] = check(packed, T)
        except ArithmeticError as error:
            row["wrong"] = str(error)
        rows.append(row)
    return rows


def width(bits: int | tuple[int, ...]) -> str:
    return "mixed" if isinstance(bits, tuple) else str(bits)


def check_all(
    jobs: Sequence[tuple[Layer, int | tuple[int, ...], Sequence[int]]], device: torch.device
) -> Iterable[list[dict[str, Any]]]:
    """`check_rows` of every job as it is done, by as many processes as cores and memory allow."""
    if device.type == "cpu":
        for job in jobs:
            yield check_rows(*job, str(device))
        return
    free = torch.cuda.mem_get_info(device)[0]
    workers = max(1, min(len(jobs), (os.cpu_count() or 2) - 1, free // WORKER_BYTES))
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        waiting = [pool.submit(check_rows, *job, str(device)) for job in jobs]
        for done in as_completed(waiting):
            yield done.result()


def timed_row(
    packed: Packed,
    others: dict[str, Run],
    tokens: int,
    bits: int | tuple[int, ...],
    peak: float,
    rounds: int,
) -> dict[str, Any]:
    """Microseconds of ours and of the others, taking turns; GB/s counts the experts in use."""
    layer, device = packed.layer, packed.arena.buffer.device
    error = check(packed, tokens)
    given = batch(layer, tokens, device)
    runs: dict[str, Run] = {
        "qmoe": lambda *a: routed_experts(*a, packed.arena, SILU),
        **others,
    }
    ready = {name: _ready(name, run, given, device) for name, run in runs.items()}
    seconds = in_turn(ready, rounds, device)
    ours = seconds["qmoe"]
    used = sum(packed.arena.expert_range(e)[1] for e in given[1].unique().tolist())
    row: dict[str, Any] = {
        "layer": layer.name, "group": layer.group, "bits": width(bits), "tokens": tokens,
        "error": error, **{f"{name}_us": 1e6 * s for name, s in seconds.items()},
        "gbps": used / ours / 1e9, "share_of_read": used / ours / peak,
        "tflops": 2 * tokens * layer.A * 3 * layer.H * layer.I / ours / 1e12,
    }  # fmt: skip
    if "bf16" in seconds:
        row["times_bf16"] = seconds["bf16"] / ours
    return row


def _ready(
    name: str, run: Run, given: tuple[Tensor, ...], device: torch.device
) -> Callable[[], Any]:
    """A CUDA graph of it where there can be one, else its launches."""

    def once() -> Tensor:
        return run(*given)

    if name not in GRAPHS or (name == "qmoe" and expands(given, device)):
        once()
        return once
    return captured(once, device)


def expands(given: tuple[Tensor, ...], device: torch.device) -> bool:
    """Whether ours expands the weights first, which reads counts back to the host."""
    x, ids, _ = given
    table, _ = device_table(device)
    E = int(ids.max()) + 1
    return ids.numel() / E >= table.dense_rows / 2


def others_of(layer: Layer, bits: int | tuple[int, ...], device: torch.device) -> dict[str, Run]:
    return rivals(layer, bits, dtype_on(device), device)
