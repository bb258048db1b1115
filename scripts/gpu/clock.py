"""Time on a GPU: CUDA graphs, so that launching is not counted; cold caches; medians.

On a CPU, for dry runs, the same calls with an ordinary clock.
"""

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor

FLUSH = 256 << 20  # bytes read between two runs: more than any second-level cache holds
# Cycles that the GPU waits before each run, so that the host has launched all of it by then: what a
# busy host launches late would be taken for the kernels' time.
AHEAD = 1_000_000


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def captured(run: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """`run` as a CUDA graph's replay, after three runs that compile and warm up; on a CPU `run`.

    Raises RuntimeError if `run` reads something back to the host.
    """
    if device.type == "cpu":
        run()
        return run
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def in_turn(
    runs: dict[str, Callable[[], Any]],
    rounds: int,
    device: torch.device,
    inputs: Sequence[Tensor] = (),
) -> dict[str, float]:
    """Median seconds of each, all of them once in every round, with cold caches: weights come from
    memory, as in a model with many layers. inputs: what the layer before has just written, and
    caches therefore hold."""
    cold = torch.ones(FLUSH // 4 if device.type == "cuda" else 1, device=device)
    timings: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            if device.type == "cuda":
                torch.cuda._sleep(AHEAD)
            cold.sum()
            for tensor in inputs:
                tensor.copy_(tensor.clone())
            timings[name].append(once(run, device))
    return {name: median(seconds) for name, seconds in timings.items()}


def once(run: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one run. The host is ahead of the GPU: it launches while caches are emptied."""
    if device.type == "cpu":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def read_bandwidth(device: torch.device) -> float:
    """Bytes/s of reading 1 GiB (on a CPU 16 MiB), the best of ten: the roof of a decode step."""
    data = torch.ones((1 << 30 if device.type == "cuda" else 1 << 24) // 4, device=device)
    return data.nbytes / min(once(data.sum, device) for _ in range(10))
