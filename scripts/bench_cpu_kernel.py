"""How fast the C kernels compute on this CPU: decode against memory, prefill against arithmetic.

    python -P scripts/bench_cpu_kernel.py [--tier avx2] [--bits 2 3 4 8] [--shape qwen3]

Layers of random weights in the shapes of Qwen3-30B-A3B and Mixtral-8x7B, groups of 32. Rounds take
turns (read bandwidth, qmoe at each width, torch's int4 kernel, bfloat16), and the best of each is
shown: other work on the machine only takes time away. Decode walks through experts so that weights
come from memory. GB/s counts packed codes, scales and zero points of the experts that were used.
"""

import argparse
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

SHAPES = {
    "qwen3": ("Qwen3-30B-A3B", 128, 8, 2048, 768),
    "mixtral": ("Mixtral-8x7B", 8, 2, 4096, 14336),
}
PREFILL = 512
SLICE = (
    1 << 24
)  # bytes read at once: about as long as a decoded token, of memory that is not cached


def cpu_name() -> str:
    """Model name of the processor and the instruction sets that matter here."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    known = {key.strip(): value.strip() for key, value in fields.items()}
    flags = set(known.get("flags", "").split())
    sets = sorted(flags & {"avx2", "avx_vnni", "avx512_vnni", "amx_int8"})
    return f"{known.get('model name', 'unknown CPU')} ({', '.join(sets)})"


class Best:
    """The shortest time of each thing that was timed, in rounds."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def time(self, name: str, call: Callable[[], object]) -> None:
        start = time.perf_counter()
        call()
        taken = time.perf_counter() - start
        self.seconds[name] = min(taken, self.seconds.get(name, taken))


def layer(shape: str, bits: int) -> tuple:  # type: ignore[type-arg]
    """A CpuStack of the whole layer and the bytes of one expert."""
    from qmoe.kernels.activation import Activation
    from qmoe.kernels.cpu.stack import CpuStack
    from qmoe.kernels.reference import random_matrices

    _, E, _, H, I = SHAPES[shape]  # noqa: E741
    cpu = torch.device("cpu")
    one = random_matrices(1, 2 * I, H, bits, 32, torch.bfloat16, cpu)
    two = random_matrices(1, H, I, bits, 32, torch.bfloat16, cpu)
    stack = CpuStack([one * E, two * E], torch.bfloat16, Activation("silu"))
    return stack, stack.nbytes() / E


def rotate(ids: Tensor, E: int) -> Tensor:
    """The next experts, so that none is used again before all others were."""
    return (ids + ids.shape[1]) % E


def torch_int4(H: int, I: int, experts: int) -> Callable[[Tensor, int], Tensor]:  # noqa: E741
    """torch's int4 kernel on matrices [2 I, H] in bfloat16, groups of 32, symmetric."""
    convert = torch.ops.aten._convert_weight_to_int4pack_for_cpu
    one = convert(torch.randint(0, 16, (2 * I, H), dtype=torch.int32), 1)
    packed = [one.clone() for _ in range(experts)]
    scale = torch.rand(H // 32, 2 * I, 2).bfloat16()
    return lambda x, e: torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed[e], 32, scale)


def measure(shape: str, widths: list[int], threads: int, seconds: float) -> None:
    name, E, A, H, I = SHAPES[shape]  # noqa: E741
    torch.set_num_threads(threads)
    stacks = {bits: layer(shape, bits) for bits in widths}
    rivals = torch_int4(H, I, min(E, 32))
    dense = torch.randn(2 * I, H).bfloat16()
    memory = torch.ones(1 << 28).view(-1, SLICE // 4)
    silu = next(iter(stacks.values()))[0].activation
    best, ids = Best(), torch.arange(A)[None]
    x, one = torch.randn(PREFILL, H).bfloat16(), torch.randn(1, H).bfloat16()
    many = torch.stack([torch.randperm(E)[:A] for _ in range(PREFILL)])
    gates, only = torch.rand(PREFILL, A), torch.rand(1, A)
    end, turn = time.perf_counter() + seconds * (len(widths) + 1), 0
    while time.perf_counter() < end:
        for part in memory[turn * 8 % len(memory) :][:8]:
            best.time("read", partial(torch.dot, part, part))
        for bits, (stack, _) in stacks.items():
            for _ in range(8):
                ids = rotate(ids, E)
                best.time(f"decode {bits}", partial(stack.experts, one, ids, only, silu))
            best.time(f"prefill {bits}", partial(stack.experts, x, many, gates, silu))
        turn += 1
        e = turn % min(E, 32)
        for rows in (1, 64):
            part = x[:rows]
            best.time(f"int4 {rows}", lambda p=part, e=e: rivals(p, e))
            best.time(f"bf16 {rows}", lambda p=part: p @ dense.T)
    show(name, threads, best.seconds, {b: size for b, (_, size) in stacks.items()}, shape)


def show(name: str, threads: int, t: dict[str, float], sizes: dict[int, float], shape: str) -> None:
    _, _, A, H, I = SHAPES[shape]  # noqa: E741
    read = SLICE / t["read"] / 1e9
    work = 2 * 3 * H * I * A
    print(f"\n{name}, {threads} thread{'s' * (threads > 1)}: memory is read at {read:.1f} GB/s\n")
    print("| bits | decode us | GB/s | of read | prefill 512 ms | GOPS |")
    print("|---|---|---|---|---|---|")
    for bits, size in sizes.items():
        decode, prefill = t[f"decode {bits}"], t[f"prefill {bits}"]
        speed = size * A / decode / 1e9
        print(
            f"| {bits} | {decode * 1e6:.0f} | {speed:.1f} | {speed / read:.0%} "
            f"| {prefill * 1e3:.0f} | {work * PREFILL / prefill / 1e9:.0f} |"
        )
    bytes4, work1 = 2 * I * H * (0.5 + 4 / 32), 4 * I * H
    print(
        f"\ntorch, one [{2 * I}, {H}]: int4pack {bytes4 / t['int4 1'] / 1e9:.1f} GB/s at 1 row, "
        f"{work1 * 64 / t['int4 64'] / 1e9:.0f} GFLOP/s at 64; bfloat16 "
        f"{work1 * 64 / t['bf16 64'] / 1e9:.0f} GFLOP/s at 64"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tier", help="an instruction set instead of the best")
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4, 8])
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seconds", type=float, default=3, help="per width and shape")
    options = parser.parse_args()
    if options.tier:
        os.environ["QMOE_CPU_KERNELS"] = options.tier
    from qmoe.kernels.cpu.library import tier_name

    print(f"{cpu_name()}; tier {tier_name()}; torch {torch.__version__}")
    for shape in options.shape:
        for threads in options.threads:
            measure(shape, options.bits, threads, options.seconds)


if __name__ == "__main__":
    main()
