"""Speed on a CPU beside others, in one run: qmoe, torch's own kernels, transformers, llama.cpp.

    python -P scripts/bench_speed.py WORK --like Qwen3-30B-A3B --layers 4 --llama

Makes a model of random weights in WORK (scripts/random_model.py), rounds it to 4 bits in groups of
32, and times, in turns and each in a process of its own: prefill of a prompt, and decoding at a
batch of 1 and of 8, per number of threads. Medians of the rounds are printed, with the seconds that
loading took and the memory of each process. With --llama a GGUF of the same shapes in Q4_0 runs in
llama.cpp's llama-bench (scripts/peers/llama_bench.py), which reads as many bytes per token.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE / "peers")]  # `python -P` leaves them out

QUANTIZE = ("--method", "rtn", "--group-size", "32", "--dense-bits", "4",
            "--set", "dense.group_size=32", "--lm-head-bits", "4")  # fmt: skip
KINDS = {
    "qmoe": ("qmoe", {}),
    "qmoe, torch's kernels": ("qmoe", {"QMOE_CPU_KERNELS": "off"}),
    "transformers bf16": ("original", {}),
}
Figures = dict[str, float]


class Worker:
    """A process that has loaded a model and measures when it is asked to."""

    def __init__(self, kind: str, path: Path, environment: dict[str, str]):
        command = [sys.executable, "-P", "-W", "ignore", __file__, "--worker", kind, str(path)]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            command, env=os.environ | environment, stdin=pipe, stdout=pipe, text=True
        )
        self.loaded = self._answer()

    def ask(self, threads: int, args: argparse.Namespace) -> Figures:
        assert self._process.stdin is not None
        job = {"threads": threads, "prompt": args.prompt, "tokens": args.tokens}
        print(json.dumps(job), file=self._process.stdin, flush=True)
        return self._answer()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _answer(self) -> Figures:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            sys.exit(f"a process that measures ended with status {self._process.wait()}")
        answer: Figures = json.loads(line)
        return answer


def work(kind: str, path: Path) -> None:
    """What a worker's process does."""
    import psutil
    import torch

    import qmoe
    from qmoe.checkpoint.model_folder import ModelFolder
    from qmoe.measure.baselines import original
    from qmoe.measure.bench import _run

    start = time.perf_counter()
    ours = kind == "qmoe"
    model = qmoe.load(path, progress=False)[0] if ours else original(ModelFolder(path))
    seconds = time.perf_counter() - start
    resident = psutil.Process().memory_info().rss
    print(json.dumps({"load_s": seconds, "resident_gb": resident / 1e9}), flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        torch.set_num_threads(job["threads"])
        first, rest = _run(model, job["prompt"], job["tokens"])
        _, eight = _run(model, 16, job["tokens"], 8)
        found = {"prefill": job["prompt"] / first, "decode": job["tokens"] / rest}
        print(json.dumps(found | {"decode, batch 8": 8 * job["tokens"] / eight}), flush=True)


def llama(found: dict[str, str], threads: int, args: argparse.Namespace) -> Figures:
    """One round of llama-bench: a prompt, and tokens behind a context as long."""

    def rate(*what: str) -> float:
        command = [found["llama_bench"], "-m", found["gguf"], "-t", str(threads), "-r", "1"]
        done = subprocess.run(
            [*command, "-o", "json", *what], capture_output=True, text=True, check=True
        )
        (row,) = json.loads(done.stdout)
        return float(row["avg_ts"])

    prompt = str(args.prompt)
    decode = rate("-p", "0", "-n", str(args.tokens), "-d", prompt)
    return {"prefill": rate("-p", prompt, "-n", "0"), "decode": decode}


def prepare(args: argparse.Namespace) -> tuple[Path, Path, dict[str, str] | None]:
    """The model, its quantized folder, and what llama.cpp runs, made if they are not there."""
    name = f"{args.like}-{args.layers}"
    model, quantized = args.work / name, args.work / f"{name}-int4"
    args.work.mkdir(parents=True, exist_ok=True)
    python = [sys.executable, "-P"]
    if not model.is_dir():
        make = [str(HERE / "random_model.py"), str(model), "--like", args.like]
        subprocess.run([*python, *make, "--layers", str(args.layers)], check=True)
    if not quantized.is_dir():
        command = [*python, "-m", "qmoe", "quantize", str(model), str(quantized), *QUANTIZE]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    if not args.llama:
        return model, quantized, None
    from environments import python_of

    peer = python_of("llama_bench", args.work)
    script = [HERE / "peers" / "llama_bench.py", model / "config.json"]
    command = [str(peer), *map(str, script), str(args.work / f"{name}.gguf")]
    command += ["--avx2"] * args.avx2
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return model, quantized, json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path, help="folder for models and environments")
    parser.add_argument("--like", default="Qwen3-30B-A3B", help="shapes, see random_model.py")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--llama", action="store_true", help="also llama.cpp (built on first use)")
    parser.add_argument("--avx2", action="store_true", help="as on a processor with AVX2 alone")
    args = parser.parse_args()
    if args.avx2 and args.only != ["qmoe"]:
        parser.error("--avx2 needs --only qmoe: torch's kernels would use newer instructions")
    model, quantized, peer = prepare(args)
    paths = {"qmoe": quantized, "original": model}
    limit = {"QMOE_CPU_KERNELS": "avx2"} if args.avx2 else {}
    workers = {name: Worker(KINDS[name][0], paths[KINDS[name][0]], KINDS[name][1] | limit)
               for name in args.only}  # fmt: skip
    if "qmoe" in workers:  # once more, now that its weights are prepared
        workers["qmoe"].close()
        workers["qmoe"] = Worker("qmoe", quantized, limit)
    rounds: dict[tuple[str, int], list[Figures]] = {}
    for i in range(args.rounds + 1):
        for threads in args.threads:
            asked = {name: worker.ask(threads, args) for name, worker in workers.items()}
            if peer is not None:
                asked["llama.cpp Q4_0"] = llama(peer, threads, args)
            for name, figures in asked.items():
                if i:  # the first round warms up
                    rounds.setdefault((name, threads), []).append(figures)
    show(args, workers, rounds)
    for worker in workers.values():
        worker.close()


def show(
    args: argparse.Namespace,
    workers: dict[str, Worker],
    rounds: dict[tuple[str, int], list[Figures]],
) -> None:
    """The table, in Markdown."""
    from bench_cpu_kernel import cpu_name

    print(f"\n{args.layers} layers of {args.like}'s shapes, on {cpu_name()}")
    print(f"medians of {args.rounds} rounds in turns, tokens/s\n")
    keys = ["prefill", "decode", "decode, batch 8"]
    titles = [f"prefill {args.prompt}", *keys[1:], "load s", "resident GB"]
    print(f"| model | threads | {' | '.join(titles)} |\n|{'---|' * (len(titles) + 2)}")
    for (name, threads), runs in sorted(rounds.items(), key=lambda item: item[0][1]):
        cells: list[Any] = [
            f"{median(run[key] for run in runs):.1f}" if key in runs[0] else "-" for key in keys
        ]
        loaded = workers[name].loaded if name in workers else {}
        cells += [f"{loaded[k]:.1f}" if loaded else "-" for k in ("load_s", "resident_gb")]
        print(f"| {name} | {threads} | {' | '.join(cells)} |")


if __name__ == "__main__":
    if "--worker" in sys.argv:
        work(sys.argv[2], Path(sys.argv[3]))
    else:
        main()
