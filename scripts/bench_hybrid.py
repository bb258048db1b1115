"""Experts in host memory: what the CPU takes for them, and what a copy to a GPU would.

    python -P scripts/bench_hybrid.py --threads 2

For random experts of Qwen3-30B-A3B's shapes (or `--hidden` and `--inner`), as many as take
`--memory` bytes and so come from memory and from no cache, with 16-bit activations that are rounded
to 8 bits: microseconds of the CPU for an expert with some rows, and the bytes of
experts that it reads in a second. Beside it is what the cost model (kernels/hosted/placement.py)
says of the same machine, and what a copy to the GPU takes, which is assumed where there is none.
"""

import argparse
import sys
import time

import torch

from qmoe.cli import tables
from qmoe.config import Scheme
from qmoe.kernels.activation import Activation
from qmoe.kernels.cpu.stack import CpuStack
from qmoe.kernels.hosted.hybrid import measured_rates
from qmoe.solvers.rtn import rtn
from qmoe.system.sizes import parse_size

SILU = Activation("silu")


def main() -> int:
    args = _arguments()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    one = _stack(args, 1).nbytes()
    experts = -(-parse_size("--memory", args.memory) // one)
    stack = _stack(args, experts)
    nbytes = stack.nbytes() / experts
    rates = measured_rates(device, stack, args.hidden, nbytes)
    rows = []
    for count in args.rows:
        seconds = _seconds(stack, experts, args.hidden, count)
        rows.append([
            str(count),
            f"{1e6 * seconds:.1f}",
            f"{nbytes / seconds / 1e9:.2f}",
            f"{1e6 * rates.on_cpu(nbytes, count):.1f}",
            f"{1e6 * nbytes * rates.copy:.1f}",
        ])  # fmt: skip
    shape = f"{args.bits} bits, {args.hidden} x {args.inner}"
    title = f"{experts} experts, {shape}, {nbytes / 1e6:.2f} MB an expert"
    header = ["rows", "CPU, us", "GB/s", "by the model, us", "copy, us"]
    tables.show(title, header, rows)
    print(f"rates: {rates.known}; threads: {args.threads}")
    more = (rates.copy - rates.read) / rates.row if rates.row else float("inf")
    print(f"a copy is faster from {max(1, int(more) + 2)} rows on")
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--inner", type=int, default=768)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--memory", default="2GB", help="bytes of all experts")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16, 33, 64])
    return parser.parse_args()


def _stack(args: argparse.Namespace, experts: int) -> CpuStack:
    scheme = Scheme(args.bits, 128)
    first = torch.randn(1, 2 * args.inner, args.hidden) * args.hidden**-0.5
    second = torch.randn(1, args.hidden, args.inner) * args.inner**-0.5
    stacks = [[rtn(weight, scheme, torch.bfloat16)] * experts for weight in (first, second)]
    return CpuStack(stacks, torch.bfloat16, SILU)


def _seconds(stack: CpuStack, experts: int, hidden: int, rows: int) -> float:
    """Of an expert with so many rows, the best of a few tries."""
    x, gates = torch.randn(rows, hidden).bfloat16(), torch.ones(rows, experts)
    ids = torch.arange(experts).expand(rows, experts).contiguous()
    found = []
    for _ in range(5):
        start = time.perf_counter()
        stack.experts(x, ids, gates, lambda product: product)
        found.append(time.perf_counter() - start)
    return min(found) / experts


if __name__ == "__main__":
    sys.exit(main())
