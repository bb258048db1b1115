"""Attention and RMS norms on a CPU: the C kernels beside what transformers runs without them.

    python -P scripts/bench_cpu_attention.py [--threads 1]

Shapes are those of a layer of Qwen3-30B-A3B in bfloat16: 32 heads of 128 on 4 key heads, rows of
2048. Medians of rounds in turns, in microseconds, weights and inputs in the caches.
"""

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch
from torch.nn.functional import scaled_dot_product_attention

from qmoe.kernels.cpu.attention import RmsNorm, attention_now, rms_norm_now

ROUNDS, SECONDS = 9, 0.1


def microseconds(run: Callable[[], object]) -> float:
    """Of one call, over at least SECONDS."""
    count, start = 0, time.perf_counter()
    while (taken := time.perf_counter() - start) < SECONDS:
        run()
        count += 1
    return 1e6 * taken / count


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    torch.set_num_threads(parser.parse_args().threads)
    print("| what | torch | C | torch / C |\n|---|---|---|---|")
    for queries, keys in ((1, 512), (1, 4096), (512, 512)):
        q = torch.randn(1, 32, queries, 128).bfloat16()
        k, v = torch.randn(2, 1, 4, keys, 128).bfloat16()
        causal = queries > 1
        row(
            f"attention, {queries} queries, {keys} keys",
            lambda q=q, k=k, v=v, causal=causal: scaled_dot_product_attention(
                q, k, v, is_causal=causal, enable_gqa=True
            ),
            lambda q=q, k=k, v=v, causal=causal: attention_now(q, k, v, None, 128**-0.5, causal),
        )
    weight, kind = torch.randn(2048).bfloat16(), RmsNorm(1e-6, 0.0, True)
    for rows in (1, 512):
        x = torch.randn(rows, 2048).bfloat16()
        row(
            f"norm, {rows} rows",
            lambda x=x: written_out(x, weight),
            lambda x=x: rms_norm_now(x, weight, kind),
        )


def row(name: str, torchs: Callable[[], object], ours: Callable[[], object]) -> None:
    rounds = [(microseconds(torchs), microseconds(ours)) for _ in range(ROUNDS)]
    a, b = (median(part) for part in zip(*rounds, strict=True))
    print(f"| {name} | {a:.1f} | {b:.1f} | {a / b:.2f} |", flush=True)


@torch.no_grad()
def written_out(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """As transformers' Qwen3-MoE has it."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


if __name__ == "__main__":
    main()
