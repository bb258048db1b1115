"""One layer at one width: compared with a reference at a number of tokens, then timed.

A cell is never timed before its output was compared. Compiling is what takes long, so kernels are
compiled by several processes at once (`compile_all`), on weights that are all zero; they leave what
they compiled in Triton's cache, and one process alone compares and times.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing import get_context
from typing import Any

import torch
from offline.roofline import LAYERS, Layer
from torch import Tensor

from gpu.clock import captured, in_turn
from gpu.rivals import GRAPHS, SILU, Run, rivals
from qmoe.format.quantized import Quantized
from qmoe.kernels import launch
from qmoe.kernels import layer as kernels
from qmoe.kernels.arena import Arena, build_arena
from qmoe.kernels.launch import Table
from qmoe.kernels.reference import check_layer, layer_reference, random_matrices

Bits = int | tuple[int, ...]
MIXED = (2, 3, 4, 8)
TOY = (Layer("toy", 6, 2, 256, 128, 32),)
NAMES = ("Qwen3-30B-A3B", "Mixtral-8x7B", "gpt-oss-20b", "DeepSeek-V2-Lite")
# Without gpt-oss's groups of 64, which nobody publishes: it is there for the static report.
REAL = tuple(sorted((x for x in LAYERS if x.name in NAMES and x.group != 64),
                    key=lambda x: NAMES.index(x.name)))  # fmt: skip


@dataclass(frozen=True)
class Job:
    """What is compiled, compared and timed: a layer at a width and a number of tokens, by a table
    of one's own or the device's."""

    layer: Layer
    bits: Bits
    tokens: int
    table: Table | None = None


@dataclass(frozen=True)
class Packed:
    """A layer's experts as integers, and as the kernels hold them."""

    layer: Layer
    bits: Bits
    first: Sequence[Quantized]
    second: Sequence[Quantized]
    arena: Arena


def layers_on(device: torch.device) -> tuple[Layer, ...]:
    """Layers of real models; in the interpreter a toy."""
    return REAL if device.type == "cuda" else TOY


def dtype_on(device: torch.device) -> torch.dtype:
    """bfloat16, which the interpreter does not know: float32 there."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def width(bits: float | tuple[float, ...]) -> str:
    return "mixed" if isinstance(bits, tuple) else f"{bits:g}"


def pack_layer(layer: Layer, bits: Bits, device: torch.device) -> Packed:
    """Random experts, the same ones every time."""
    torch.manual_seed(0)
    dtype = dtype_on(device)
    first, second = (
        random_matrices(layer.E, *shape, bits, layer.group, dtype, device)
        for shape in ((2 * layer.I, layer.H), (layer.H, layer.I))
    )
    order = kernels.device_table(device)[0].order
    arena = build_arena([first, second], dtype, order, device, paired=True)
    return Packed(layer, bits, first, second, arena)


def batch(layer: Layer, tokens: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, expert ids and gates."""
    torch.manual_seed(tokens)
    x = torch.randn(tokens, layer.H, device=device, dtype=dtype_on(device))
    ids = torch.rand(tokens, layer.E).topk(layer.A).indices.to(device)
    return x, ids, torch.rand(tokens, layer.A, device=device) + 0.1


@contextmanager
def using(table: Table | None, device: torch.device) -> Iterator[None]:
    """The kernels are launched by this table, if there is one."""
    original = kernels.device_table
    if table is not None:
        chosen = table, original(device)[1]
        kernels.device_table = lambda _: chosen  # type: ignore[assignment]
    try:
        yield
    finally:
        kernels.device_table = original


def check(packed: Packed, tokens: int, run: Run | None = None) -> float:
    """The worst block's relative error; raises ArithmeticError if it is more than rounding."""
    x, ids, gates = batch(packed.layer, tokens, packed.arena.buffer.device)
    run = run or ours(packed)
    wanted = layer_reference(x, ids, gates, packed.first, packed.second, SILU)
    what = f"{packed.layer.name}, {width(packed.bits)} bits, {tokens} tokens"
    return check_layer(run(x, ids, gates), wanted, x.dtype, what)


def ours(packed: Packed) -> Run:
    return lambda x, ids, gates: kernels.routed_experts(x, ids, gates, packed.arena, SILU)


def compile_all(jobs: Sequence[Job], device: torch.device) -> list[str]:
    """Compile what every job launches; what failed, in words. In the interpreter: nothing to do."""
    if device.type == "cpu":
        return [""] * len(jobs)
    workers = max(1, min(len(jobs), (os.cpu_count() or 2) - 1))
    context = get_context("forkserver")
    context.set_forkserver_preload(["gpu.cells"])  # torch is imported once, not by every worker
    with ProcessPoolExecutor(workers, context) as pool:
        return list(pool.map(compile_one, jobs, [str(device)] * len(jobs)))


def compile_one(job: Job, device: str) -> str:
    """Launch a job on zeros, in a process of its own."""
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources

    where = torch.device(device)
    try:
        with using(job.table, where):
            packed = Packed(job.layer, job.bits, (), (), zeros(job.layer, job.bits, where))
            ours(packed)(*batch(job.layer, job.tokens, where))
            torch.cuda.synchronize()
    except (CompilationError, OutOfResources) as error:
        return f"{type(error).__name__}: {error}".splitlines()[0][:200]
    return ""


def zeros(layer: Layer, bits: Bits, device: torch.device) -> Arena:
    """An arena of the right sizes that holds nothing."""
    one = replace(layer, E=len(bits) if isinstance(bits, tuple) else 1)
    small = pack_layer(one, bits, device).arena
    at = small.table[:, torch.arange(layer.E) % one.E]
    return replace(small, table=at.contiguous())


def timed_row(
    packed: Packed, tokens: int, others: dict[str, Run], peak: float, rounds: int
) -> dict[str, Any]:
    """Microseconds of ours and of the others, taking turns; GB/s counts the experts in use."""
    layer, device = packed.layer, packed.arena.buffer.device
    error = check(packed, tokens)
    given = batch(layer, tokens, device)
    runs = {"qmoe": ours(packed)} | others
    ready = {name: _ready(name, run, given, packed.arena) for name, run in runs.items()}
    seconds = in_turn(ready, rounds, device, given)
    mine = seconds["qmoe"]
    used = sum(packed.arena.expert_range(e)[1] for e in given[1].unique().tolist())
    row: dict[str, Any] = {
        "layer": layer.name, "group": layer.group, "bits": width(packed.bits), "tokens": tokens,
        "error": error, **{f"{name}_us": 1e6 * s for name, s in seconds.items()},
        "gbps": used / mine / 1e9, "share_of_read": used / mine / peak,
        "tflops": 2 * tokens * layer.A * 3 * layer.H * layer.I / mine / 1e12,
    }  # fmt: skip
    return row | {f"times_{name}": s / mine for name, s in seconds.items() if name != "qmoe"}


def _ready(name: str, run: Run, given: tuple[Tensor, ...], arena: Arena) -> Callable[[], Any]:
    """A CUDA graph of it where there can be one, else its launches."""

    def once() -> Tensor:
        return run(*given)

    device, table = given[0].device, kernels.device_table(given[0].device)[0]
    expands = launch.use_dense(table, given[1].numel(), arena.experts)  # reads counts back
    if name not in GRAPHS or (name == "qmoe" and expands):
        once()
        return once
    return captured(once, device)


def others_of(layer: Layer, bits: Bits, device: torch.device) -> dict[str, Run]:
    return rivals(layer, bits, dtype_on(device), device)
