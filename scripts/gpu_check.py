"""Prove and measure the kernels on the GPU that is here, the most important first.

    python scripts/gpu_check.py --out DIR --minutes 8
    python scripts/gpu_check.py --out DIR --minutes 8 --resume     # what is missing
    python scripts/gpu_check.py --out DIR --dry-run                # on a CPU, toy sizes
    python scripts/gpu_check.py --out DIR --page                   # docs/gpu/<device>.md, of DIR

qmoe need not be installed and no network is needed: torch >= 2.10, triton >= 3.6, transformers,
safetensors, compressed-tensors, greenlet, jaxtyping and pytest are. What else it would use
(bitsandbytes, vllm, pytest-xdist, matplotlib, compute-sanitizer) is left out with a word. Each step
is a process of its own and writes DIR/<step>.json row by row, so a crash or a kill loses one step.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Seconds a step is worth at most, of eight minutes.
STEPS = {
    "environment": 30,
    "kernels": 150,
    "tune": 115,
    "decode": 50,
    "prefill": 50,
    "small": 40,
    "models": 50,
    "layers4": 55,
    "layers12": 90,
    "widths": 80,
    "exl3": 120,
    "every kernel test": 180,
    "sanitizer": 60,
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--minutes", type=float, default=8, help="no step runs past this")
    parser.add_argument("--resume", action="store_true", help="leave out steps that passed")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, at toy sizes")
    parser.add_argument("--only", nargs="+", choices=list(STEPS), default=list(STEPS))
    parser.add_argument("--page", action="store_true", help="write the page of DIR, run nothing")
    parser.add_argument("--step", choices=list(STEPS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.step:
        return one_step(args)
    sys.path.insert(0, str(ROOT / "scripts"))  # with `python -P` it is not there
    from gpu.uninstalled import link_package

    os.environ["PYTHONPATH"] = os.pathsep.join([
        str(link_package(args.out / "path")), str(ROOT / "scripts"),
        *filter(None, [os.environ.get("PYTHONPATH")]),
    ])  # fmt: skip
    if args.dry_run:
        os.environ |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    if args.page:
        return run([sys.executable, "-P", "-m", "gpu.page", str(args.out)], 120)
    return all_steps(args)


def all_steps(args: argparse.Namespace) -> int:
    """Run what there is time for; 0 if every step passed."""
    end = time.monotonic() + 60 * args.minutes
    results: dict[str, str] = {}
    for name in [name for name in STEPS if name in args.only]:
        left = end - time.monotonic()
        if args.resume and status(args.out / f"{name}.json") == "passed":
            results[name] = "passed before"
            continue
        if left < 10:
            results[name] = "no time left"
            continue
        print(f"{name}, {left:.0f} s left", flush=True)
        code = run(command(args, name), min(left, STEPS[name]))
        results[name] = status(args.out / f"{name}.json") if code != TIMEOUT else "cut short"
        if results[name] == "running":
            results[name] = f"crashed, status {code}"
    width = max(map(len, results))
    print("\n".join(f"{name:{width}}  {result}" for name, result in results.items()))
    return 0 if all(r.startswith(("passed", "left out")) for r in results.values()) else 1


TIMEOUT = 124


def run(command: list[str], seconds: float) -> int:
    """Exit status, 124 if it was ended after so many seconds, with all its processes."""
    process = subprocess.Popen(command, cwd=ROOT / "tests", start_new_session=True)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return TIMEOUT


def command(args: argparse.Namespace, name: str) -> list[str]:
    flags = ["--dry-run"] * args.dry_run + ["--resume"] * args.resume
    return [sys.executable, "-P", __file__, "--out", str(args.out), "--step", name, *flags]


def status(path: Path) -> str:
    import json

    return str(json.loads(path.read_text())["status"]) if path.is_file() else "crashed"


def one_step(args: argparse.Namespace) -> int:
    """A step in this process; 0 if nothing was wrong."""
    from gpu import steps
    from gpu.record import Record

    record = Record(args.out / f"{args.step}.json", args.resume)
    steps.run(args.step, record, args.out, args.dry_run)
    return 0 if record.finish() else 1


if __name__ == "__main__":
    sys.exit(main())
