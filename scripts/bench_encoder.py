"""What the search for EXL3's codes costs and loses, by rate and beam.

    python -P scripts/bench_encoder.py [--tier avx2] [--rates 2 3 4] [--beams 64 128 256 512 1024]

Tiles of Gaussian values, one thread, CPU time. Shown is the error over that of the search of all
states on the same tiles, milliseconds for a tile of 256 weights, the same where the error under a
Hessian is minimized, as `qmoe quantize` does, and the hours that this alone takes for the 30
billion weights of Qwen3-30B-A3B's size on 8 and 16 such cores.
"""

import argparse
import time

import torch

TILES, FULL = 48, 16  # tiles in all, and of those that all states are searched for


def milliseconds(
    wanted: torch.Tensor,
    rate: float,
    beam: int,
    tier: str | None,
    metric: torch.Tensor | None = None,
) -> tuple[float, torch.Tensor]:
    from qmoe.kernels.cpu.encode import encode

    best, errors = float("inf"), torch.empty(0)
    for _ in range(3 if beam else 1):
        start = time.thread_time()
        errors = encode(wanted, rate, "mul1", beam, tier, metric)[1]
        best = min(best, time.thread_time() - start)
    return best / len(wanted) * 1e3, errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tier", help="an instruction set instead of the best")
    parser.add_argument("--rates", type=float, nargs="+", default=[2, 3, 4])
    parser.add_argument("--beams", type=int, nargs="+", default=[64, 128, 256, 512, 1024])
    options = parser.parse_args()
    from qmoe.solvers.trellis import share_of

    print(
        "| rate | beam | error / all states | ms a tile | under a Hessian | h on 8 cores "
        "| h on 16 |\n" + "|---" * 7 + "|"
    )
    for rate in options.rates:
        wanted = torch.randn(TILES, 256) * share_of(rate, fed_back=False)
        taken, least = milliseconds(wanted[:FULL], rate, 0, options.tier)
        print(f"| {rate:g} | all | 1 | {taken:.1f} | | | |")
        for beam in options.beams:
            taken, errors = milliseconds(wanted, rate, beam, options.tier)
            share = errors[:FULL].sum() / least.sum()
            mix = torch.randn(1, 16, 8)
            shaped, _ = milliseconds(wanted, rate, beam, options.tier, mix @ mix.mT + torch.eye(16))
            hours = shaped / 1e3 * 30e9 / 256 / 3600
            print(
                f"| {rate:g} | {beam} | {share:.3f} | {taken:.2f} | {shaped:.2f} "
                f"| {hours / 8:.1f} | {hours / 16:.1f} |"
            )


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(0)
    main()
