"""How fast the CPU kernels compute with EXL3's codes, beside int4 and exllamav3's own CPU kernel.

    python -P scripts/bench_trellis_kernel.py [--tier avx2] [--rates 2 3 4] [--threads 1 2]
    python -P scripts/bench_trellis_kernel.py --exllamav3 DIR

A layer of Qwen3-30B-A3B's shapes with random codes and 64 experts, of which a token takes 8. DIR is
an unpacked wheel of exllamav3 (1.6.5 was used; MIT), whose CPU kernel torch builds from the sources
in it with g++ and ninja. That kernel has an instruction set of its own choice. Rounds take turns,
and the best of each is shown. Decode walks through the experts, so that weights come from memory.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))  # `python -P` leaves it out

from bench_cpu_kernel import Best, cpu_name
from torch import Tensor

H, I, E, A = 2048, 768, 64, 8  # noqa: E741
PREFILL = 256
BIND = """#include <torch/extension.h>
#include "moe_mul1.h"
PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) { m.def("make_layer", &exl3_moe_cpu_make_layer);
  m.def("forward", &exl3_moe_cpu_forward, py::call_guard<py::gil_scoped_release>()); }"""
Run = Callable[[Tensor, Tensor, Tensor], Any]


def random_codes(n: int, k: int, rate: float) -> Any:
    from qmoe.format.trellis import Codes

    codes = torch.randint(-(1 << 15), 1 << 15, (E, k // 16, n // 16, int(16 * rate)))
    suh, svh = torch.randn(E, k).half(), (torch.randn(E, n) / k**0.5).half()
    return Codes(codes.to(torch.int16), suh, svh, "mul1", n, k)


def ours(matrices: list[Any], rate: float) -> Run:
    from qmoe.config import CHANNEL, Scheme
    from qmoe.format.trellis import Trellis
    from qmoe.kernels.activation import Activation
    from qmoe.kernels.cpu.trellis_stack import TrellisStack

    scheme = Scheme(rate, CHANNEL, codebook="mul1")
    gate, up, down = matrices
    stacks = [Trellis((gate, up), scheme), Trellis((down,), scheme)]
    silu = Activation("silu")
    stack = TrellisStack(stacks, torch.bfloat16, silu)
    return lambda x, ids, gates: stack.experts(x.bfloat16(), ids, gates, silu)


def integers(bits: int) -> Run:
    from qmoe.kernels.activation import Activation
    from qmoe.kernels.cpu.stack import CpuStack
    from qmoe.kernels.reference import random_matrices

    cpu, silu = torch.device("cpu"), Activation("silu")
    one = random_matrices(1, 2 * I, H, bits, 32, torch.bfloat16, cpu)
    two = random_matrices(1, H, I, bits, 32, torch.bfloat16, cpu)
    stack = CpuStack([one * E, two * E], torch.bfloat16, silu)
    return lambda x, ids, gates: stack.experts(x.bfloat16(), ids, gates, silu)


def theirs(kernel: Any, matrices: list[Any], threads: int) -> Run:
    parts = [list(tensor) for codes in matrices for tensor in codes.tensors()]
    handle = kernel.make_layer(*parts, [], [], [], 0, 0.0, 0)

    def run(x: Tensor, ids: Tensor, gates: Tensor) -> Tensor:
        out = torch.empty(len(x), H)
        kernel.forward(handle, x.half(), ids, gates.half(), out, threads)
        return out

    run.kept = parts  # type: ignore[attr-defined]  # the handle holds pointers
    return run


def build(folder: Path) -> Any:
    from torch.utils import cpp_extension

    source, bind = (folder / "exllamav3/exllamav3_ext/cpu").resolve(), folder / "bind.cpp"
    bind.write_text(BIND)
    files = [str(bind), str(source / "moe_mul1.cpp")]
    flags = ["-O2", "-std=c++20"]
    return cpp_extension.load(
        "ex3cpu", files, extra_include_paths=[str(source)], extra_cflags=flags
    )


def measure(runs: dict[str, Run], seconds: float) -> dict[str, float]:
    best, ids = Best(), torch.arange(A)[None]
    x, one = torch.randn(PREFILL, H), torch.randn(1, H)
    many = torch.stack([torch.randperm(E)[:A] for _ in range(PREFILL)])
    gates, only = torch.full((PREFILL, A), 1 / A), torch.full((1, A), 1 / A)
    end = time.perf_counter() + seconds * len(runs)
    while time.perf_counter() < end:
        for name, run in runs.items():
            for _ in range(8):
                ids = (ids + A) % E
                best.time(f"decode {name}", partial(run, one, ids, only))
            best.time(f"prefill {name}", partial(run, x, many, gates))
    return best.seconds


def compare(mine: Run, others: Run, rate: float) -> None:
    """Say how far outputs for the same bytes lie apart."""
    given = (torch.randn(4, H), torch.randint(0, E, (4, A)), torch.full((4, A), 1 / A))
    a, b = (run(*given).float() for run in (mine, others))
    print(f"rate {rate:g}: outputs differ by {(a - b).norm() / b.norm():.4f} of their size\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tier", help="an instruction set instead of the best, for qmoe alone")
    parser.add_argument("--rates", type=float, nargs="+", default=[2, 3, 4])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seconds", type=float, default=3, help="per kernel and rate")
    parser.add_argument("--exllamav3", type=Path, metavar="DIR", help="an unpacked wheel")
    options = parser.parse_args()
    if options.tier:
        os.environ["QMOE_CPU_KERNELS"] = options.tier
    from qmoe.kernels.cpu.library import tier_name

    kernel = None if options.exllamav3 is None else build(options.exllamav3)
    print(f"{cpu_name()}; tier {tier_name()}; torch {torch.__version__}\n")
    head = "| threads | kernel | decode us | G weights/s | prefill ms | GOPS |\n" + "|---" * 6 + "|"
    weights = 3 * H * I * A
    for threads in options.threads:
        torch.set_num_threads(threads)
        runs = {"qmoe int4": integers(4)}
        for rate in options.rates:
            matrices = [random_codes(n, k, rate) for n, k in ((I, H), (I, H), (H, I))]
            runs[f"qmoe exl3 {rate:g}"] = ours(matrices, rate)
            if kernel is not None:
                runs[f"exllamav3 {rate:g}"] = theirs(kernel, matrices, threads)
                compare(runs[f"qmoe exl3 {rate:g}"], runs[f"exllamav3 {rate:g}"], rate)
        taken = measure(runs, options.seconds)
        print(head)
        for name in runs:
            decode, prefill = taken[f"decode {name}"], taken[f"prefill {name}"]
            print(
                f"| {threads} | {name} | {decode * 1e6:.0f} | {weights / decode / 1e9:.1f} "
                f"| {prefill * 1e3:.1f} | {2 * weights * PREFILL / prefill / 1e9:.0f} |"
            )


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
