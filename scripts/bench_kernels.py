"""Time the kernels on the GPU that is here; without one, say so and run the static report.

Tests run first. For each layer shape and batch: our experts, torch's grouped product in bfloat16,
bitsandbytes NF4 expert by expert, and vLLM's Triton kernel where vLLM is installed, taking turns in
every round; medians. GB/s counts the bytes of the experts in use; the peak is measured by reading.
"""

import argparse
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from qmoe.config import Scheme
from qmoe.kernels.activation import Activation
from qmoe.kernels.arena_stack import ArenaStack
from qmoe.kernels.offline.roofline import LAYERS, Layer
from qmoe.tables import show
from qmoe.types import Quantized

ROOT = Path(__file__).parents[1]
Run = Callable[[Tensor, Tensor, Tensor], Tensor]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--bits", type=int, nargs="+", default=[4], help="2, 3, 4 or 8")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 16, 64, 256, 2048])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--skip-tests", action="store_true")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU here: nothing is timed. The static report follows.", flush=True)
        command = [sys.executable, "-P", str(ROOT / "scripts" / "kernel_report.py")]
        return subprocess.run(command, check=False).returncode
    if not args.skip_tests:
        tests = [sys.executable, "-m", "pytest", "-q", str(ROOT / "tests" / "kernels")]
        if subprocess.run(tests, check=False, cwd=ROOT / "tests").returncode:
            print("the kernels' tests fail: nothing is timed")
            return 1
    peak = read_bandwidth()
    print(f"{torch.cuda.get_device_name()}: reads at {peak / 1e9:.0f} GB/s, measured")
    for bits in args.bits:
        for layer in LAYERS:
            rows = [bench(layer, bits, T, args.rounds, peak) for T in args.tokens]
            show(
                f"{layer.name}, int{bits} g{layer.group}: microseconds, medians of {args.rounds}",
                ["tokens", *NAMES, "GB/s", "of peak", "TFLOP/s", "against bf16"],
                rows,
            )
    return 0


NAMES = ["qmoe", "bf16", "nf4", "vllm"]


def bench(layer: Layer, bits: int, T: int, rounds: int, peak: float) -> list[str]:
    """One row: medians in microseconds of those that ran, and what ours amounts to."""
    torch.manual_seed(0)
    x = torch.randn(T, layer.H, device="cuda", dtype=torch.bfloat16)
    ids = torch.stack([torch.randperm(layer.E)[: layer.A] for _ in range(T)]).cuda()
    gates = torch.rand(T, layer.A, device="cuda")
    stack = random_stack(layer, bits)
    runs: dict[str, Run] = {"qmoe": lambda *a: stack.experts(*a, Activation("silu"))}
    runs |= rivals(layer) | (vllm_triton(layer) if bits == 4 else {})
    timings: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(rounds + 3):  # the first three warm up
        for name, run in runs.items():
            seconds = timed(lambda r=run: r(x, ids, gates))
            if i >= 3:
                timings[name].append(seconds)
    ours = median(timings["qmoe"])
    used = len(ids.unique()) / layer.E * stack.nbytes()
    work = 2 * T * layer.A * 3 * layer.H * layer.I
    cells = [f"{1e6 * median(t):.1f}" if (t := timings.get(n)) else "-" for n in NAMES]
    speed = f"{median(timings['bf16']) / ours:.2f}" if "bf16" in timings else "-"
    return [
        str(T),
        *cells,
        f"{used / ours / 1e9:.0f}",
        f"{used / ours / peak:.0%}",
        f"{work / ours / 1e12:.1f}",
        speed,
    ]


def random_stack(layer: Layer, bits: int) -> ArenaStack:
    """A layer's experts with random integers: what they say does not matter to a clock."""
    half = 1 << (bits - 1)

    def matrix(n: int, k: int) -> Quantized:
        q = torch.randint(-half, half, (layer.E, n, k), dtype=torch.int8)
        scale = torch.full((layer.E, n, k // layer.group), 0.01, dtype=torch.bfloat16)
        return Quantized(q, scale, None, Scheme(bits, layer.group))

    matrices = [matrix(2 * layer.I, layer.H), matrix(layer.H, layer.I)]
    device = torch.device("cuda")
    return ArenaStack(matrices, torch.bfloat16, device, Activation("silu"), paired=True)


def rivals(layer: Layer) -> dict[str, Run]:
    """What else can compute the layer here; bf16 only if its weights fit twice."""
    found: dict[str, Run] = {}
    size = 2 * layer.E * 3 * layer.H * layer.I
    if 2 * size > torch.cuda.mem_get_info()[0]:
        return found
    shape = (layer.E, 2 * layer.I, layer.H), (layer.E, layer.H, layer.I)
    first, second = (torch.randn(s, device="cuda", dtype=torch.bfloat16) * 0.02 for s in shape)
    found["bf16"] = lambda x, ids, gates: grouped_bf16(x, ids, gates, first, second)
    from qmoe.baselines import Nf4Stack
    from qmoe.kernels.moe import moe_forward

    packed = Nf4Stack(first), Nf4Stack(second)
    found["nf4"] = lambda x, ids, gates: moe_forward(x, ids, gates, *packed, Activation("silu"))
    return found


def vllm_triton(layer: Layer) -> dict[str, Run]:
    """vLLM's Triton int4 experts, if vLLM is installed; its interface is that of 2026."""
    try:
        from vllm.model_executor.layers.fused_moe import fused_experts
        from vllm.model_executor.layers.fused_moe.config import int4_w4a16_moe_quant_config
    except ImportError:
        return {}

    def words(n: int, k: int) -> Tensor:
        return torch.randint(0, 256, (layer.E, n, k // 2), dtype=torch.uint8, device="cuda")

    def scales(n: int, k: int) -> Tensor:
        shape = (layer.E, n, k // layer.group)
        return torch.full(shape, 0.01, dtype=torch.bfloat16, device="cuda")

    first, second = (2 * layer.I, layer.H), (layer.H, layer.I)
    w1, w2 = words(*first), words(*second)
    config = int4_w4a16_moe_quant_config(
        w1_scale=scales(*first),
        w2_scale=scales(*second),
        w1_zp=None,
        w2_zp=None,
        block_shape=[0, layer.group],
    )

    def run(x: Tensor, ids: Tensor, gates: Tensor) -> Tensor:
        return fused_experts(x, w1, w2, topk_weights=gates, topk_ids=ids.int(), quant_config=config)

    return {"vllm": run}


def grouped_bf16(x: Tensor, ids: Tensor, gates: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """torch's grouped product on 16-bit weights."""
    order = ids.flatten().argsort(stable=True)
    ends = torch.bincount(ids.flatten(), minlength=len(first)).cumsum(0).int()
    rows = order // ids.shape[1]
    product = torch.nn.functional.grouped_mm
    mid = Activation("silu")(product(x[rows], first.transpose(1, 2), offs=ends))
    out = product(mid, second.transpose(1, 2), offs=ends) * gates.flatten()[order, None].to(x.dtype)
    return torch.zeros_like(x).index_add_(0, rows, out)


def timed(run: Callable[[], Tensor]) -> float:
    """Seconds on the GPU, the caches cold: experts of other layers come between two uses."""
    torch.empty(256 << 20, dtype=torch.int8, device="cuda").zero_()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def read_bandwidth() -> float:
    """Bytes/s of reading 1 GiB, the best of ten."""
    data = torch.ones(1 << 28, dtype=torch.float32, device="cuda")
    return data.nbytes / min(timed(lambda: data.sum()) for _ in range(10))


if __name__ == "__main__":
    sys.exit(main())
