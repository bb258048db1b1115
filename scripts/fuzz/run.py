"""Hostile model folders: thousands of small damages, each to end in success or in a clear error.

    python -P scripts/fuzz/run.py --mutations 3000 --seed 0
    python -P scripts/fuzz/run.py --seed 0 --first 1234 --mutations 1 --verbose    # one again

Tiny models (a matrix per expert; fused experts in MXFP4; latent attention in FP8) and quantized
ones are spoiled by scripts/fuzz/mutations.py, one place or two at a time. `qmoe quantize` (rtn,
gptq), `qmoe inspect` or `qmoe.load` and a forward pass run on each in a process of its own with
limits on time and memory. A failure is any exception but a QmoeError, an error without words, a
hang, a crash, memory far beyond the model's, a destination or `.partial` left behind or missing, a
file read or written outside the folder, a connection, or a process started. Prints a table and each
distinct failure with what reproduces it; the exit status is 1 if there is one. Linux only; needs no
network and no GPU.
"""

import argparse
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ |= {
    "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1",
    "TQDM_DISABLE": "1",
}  # fmt: skip
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `python -P` leaves it out

import torch

import qmoe
import qmoe.cli.commands  # now, not in the process of every case
from fuzz.bases import make_bases
from fuzz.mutations import QUANTIZED, SOURCE
from qmoe.cli.main import main as qmoe_main

SECONDS, EXTRA = 30.0, 3 << 30  # of a case; bytes of address space beyond the parent's
RESIDENT = 1 << 30  # more than this is a blow-up: the models are of a megabyte
OPERATIONS = {
    False: ["rtn", "rtn", "gptq", "gptq", "gptq", "awq", "inspect source"],
    True: ["inspect", "load", "load", "inspect experts"],
}


@dataclass
class Outcome:
    """kind: success, error, or what failed; text: the message or the end of a traceback."""

    case: int
    kind: str
    text: str
    operation: str = ""
    mutation: str = ""
    seconds: float = 0.0


@dataclass
class Running:
    case: int
    folder: Path
    started: float = field(default_factory=time.monotonic)


def operate(operation: str, model: Path, out: Path, text: Path) -> int:
    """Run one operation as a user would; the exit status."""
    if operation == "load":
        loaded, _ = qmoe.load(model, progress=False)
        loaded(input_ids=torch.arange(8)[None] % loaded.get_input_embeddings().num_embeddings)
        return 0
    if operation.startswith("inspect"):
        return qmoe_main(["inspect", str(model)] + ["--experts"] * operation.endswith("experts"))
    options = ["--method", operation, "--group-size", "32"]
    if operation != "rtn":
        options += ["--calibration", str(text), "--samples", "2", "--seqlen", "32"]
    return qmoe_main(["quantize", str(model), str(out), *options])


def tree(folder: Path) -> dict[str, int]:
    """Everything below a folder by name, with its size."""
    return {str(p.relative_to(folder)): p.lstat().st_size for p in folder.rglob("*")}


class Watch:
    """What Python opens for writing outside the case, reads from where it must not, or reaches."""

    def __init__(self, case: Path):
        self.case, self.found, self.on = case, list[str](), False

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event in ("socket.connect", "subprocess.Popen", "os.system", "os.exec"):
            self.found.append(f"{event} {args[1:2]}")
        elif event == "open" and isinstance(args[0], str | bytes):
            path = os.path.realpath(os.fsdecode(args[0]))
            inside = Path(path).is_relative_to(self.case)
            if args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and not inside:
                if not path.startswith(("/dev/", "/proc/")):
                    self.found.append(f"writes {path}")
            elif path in ("/etc/passwd", "/dev/zero"):
                self.found.append(f"reads {path}")


def prepare(folder: Path, bases: dict[str, Path], seed: int, case: int) -> tuple[str, str]:
    """Make the case's folder; the operation and what was damaged."""
    rng = random.Random(f"{seed}:{case}")
    base = rng.choice(sorted(bases))
    quantized = base.startswith("quantized")
    operation = rng.choice(OPERATIONS[quantized])
    for copy in ("model", "outside"):
        shutil.copytree(bases[base], folder / copy)
    (folder / "outside" / "secret.txt").write_text("secret")
    for name in ("config", "tokenizer"):
        shutil.copyfile(bases[base] / f"{name}.json", folder / "outside" / f"{name}.1.0.0.json")
    mutation = rng.choice(QUANTIZED if quantized else SOURCE)
    done = f"{base}, {mutation(folder / 'model', rng)}"
    for path in (folder / "outside").iterdir():
        os.utime(path, (1, 2))  # reading it now changes its access time
    return operation, done


def child(running: Running, bases: dict[str, Path], seed: int, text: Path) -> None:
    """Runs in the process of a case: leaves result.json."""
    case, folder = running.case, running.folder
    os.setsid()
    log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", errors="backslashreplace")
    torch.set_num_threads(1)  # makes torch's thread pool anew; four threads at once would race to
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + EXTRA, used + EXTRA))
    try:
        operation, mutation = prepare(folder, bases, seed, case)
    except Exception:  # a mistake of this script
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    note = {"operation": operation, "mutation": mutation}
    (folder / "result.json").write_text(json.dumps(note | {"kind": "died", "text": ""}))
    before = tree(folder / "model")
    watch = Watch(folder)
    sys.addaudithook(watch)
    watch.on = True
    try:
        status = operate(operation, folder / "model", folder / "out", text)
        kind, said = ("success" if status == 0 else "error"), ""
    except qmoe.QmoeError as error:
        kind, said = "error", f"error: {error}"
    except BaseException as error:  # this is what the script looks for
        kind, said = f"traceback {type(error).__name__}", traceback.format_exc()
    watch.on = False
    sys.stdout.flush()
    sys.stderr.flush()
    if kind == "error" and not said:
        lines = (folder / "log").read_text(errors="replace").splitlines()
        said = next((line for line in lines if line.startswith("error: ")), "")
        if len(said) < 20:
            kind = "error without words"
    if before != tree(folder / "model"):
        kind, said = "the source changed", ""
    if watch.found:
        kind, said = "reached outside", watch.found[0]
    result = json.dumps(note | {"kind": kind, "text": said[-4000:]})
    (folder / "result.json").write_text(result)
    os._exit(0)


def judge(running: Running, status: int, peak: int) -> Outcome:
    """What a finished case came to, with what can be seen from outside."""
    folder = running.folder
    log = (folder / "log").read_text(errors="replace") if (folder / "log").exists() else ""
    try:
        note = json.loads((folder / "result.json").read_text())
    except (OSError, ValueError):
        note = {"kind": "script", "text": log[-3000:], "operation": "", "mutation": ""}
    outcome = Outcome(running.case, **note, seconds=time.monotonic() - running.started)
    if status:
        hung = outcome.seconds >= SECONDS
        outcome.kind = "hang" if hung else f"died, {outcome.kind}, status {status}"
        outcome.text = log[-1500:]
    elif peak > RESIDENT:
        outcome.kind, outcome.text = "memory", f"{peak >> 20} MB"
    left = {p.name for p in folder.iterdir()} - {"model", "outside", "log", "result.json"}
    makes = outcome.kind == "success" and outcome.operation in ("rtn", "gptq", "awq")
    wanted = {"out"} if makes else set()
    if left != wanted and outcome.kind in ("success", "error"):
        outcome.text = f"{sorted(left)} after {outcome.kind}: {outcome.text}"
        outcome.kind = "destination"
    read = [p.name for p in (folder / "outside").glob("*") if p.stat().st_atime > 1]
    if read and outcome.kind in ("success", "error"):
        outcome.kind, outcome.text = "reached outside", f"{read}: {outcome.text}"
    return outcome


def run(bases: dict[str, Path], work: Path, args: argparse.Namespace) -> list[Outcome]:
    """All cases, `args.jobs` at a time."""
    text = work / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 40)
    waiting = list(range(args.first, args.first + args.mutations))[::-1]
    running: dict[int, Running] = {}
    outcomes: list[Outcome] = []
    while waiting or running:
        while waiting and len(running) < args.jobs:
            now = Running(waiting.pop(), Path(tempfile.mkdtemp(dir=work)))
            pid = os.fork()
            if not pid:
                try:
                    child(now, bases, args.seed, text)
                finally:
                    os._exit(1)  # never back into the parent's loop
            running[pid] = now
        for pid, one in list(running.items()):
            if time.monotonic() - one.started > SECONDS:
                os.kill(pid, signal.SIGKILL)
            done, status, usage = os.wait4(pid, os.WNOHANG)
            if not done:
                continue
            outcomes.append(judge(running.pop(pid), status, usage.ru_maxrss << 10))
            shutil.rmtree(one.folder)
            if args.verbose or outcomes[-1].kind not in ("success", "error"):
                print(vars(outcomes[-1]) if args.verbose else outcomes[-1].kind, flush=True)
        time.sleep(0.005)
    return outcomes


def where(outcome: Outcome) -> str:
    """What makes a failure one of its own: its kind and the innermost line of a traceback."""
    lines = [line.strip() for line in outcome.text.splitlines() if line.startswith("  File ")]
    ours = [line for line in lines if "/qmoe/" in line or "/calibration/" in line]
    return " ".join([outcome.kind, *ours[-1:], *lines[-1:]]) if lines else outcome.kind


def show(outcomes: list[Outcome], seed: int, seconds: float) -> int:
    """Print the table and the distinct failures; how many there are."""
    table = Counter((o.operation, o.kind) for o in outcomes)
    for (operation, kind), count in sorted(table.items()):
        print(f"{operation:16} {kind:30} {count}")
    failures = [o for o in outcomes if o.kind not in ("success", "error")]
    distinct: dict[str, list[Outcome]] = {}
    for outcome in failures:
        distinct.setdefault(where(outcome), []).append(outcome)
    for key, group in distinct.items():
        o = group[0]
        print(f"\n{len(group)} x {key}\n  --seed {seed} --first {o.case} --mutations 1 --verbose")
        print(f"  {o.operation} on {o.mutation}\n  {o.text[-1500:]}")
    slowest = max(o.seconds for o in outcomes)
    rate = len(outcomes) / seconds
    print(f"{len(outcomes)} mutations, {len(failures)} failures, {len(distinct)} distinct; "
          f"{rate:.1f} a second, slowest {slowest:.1f} s")  # fmt: skip
    return len(distinct)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--mutations", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first mutation")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--errors", type=Path, help="write every error message to this file")
    parser.add_argument("--verbose", action="store_true", help="print every outcome")
    args = parser.parse_args(argv)
    sys.stdout.reconfigure(errors="backslashreplace")  # damage has odd characters
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="qmoe-fuzz-") as folder:
        work = Path(folder).resolve()
        bases = make_bases(work / "bases")
        started = time.monotonic()
        outcomes = run(bases, work, args)
    if args.errors:
        lines = sorted(f"{o.text}\t{o.operation}, {o.mutation}" for o in outcomes if o.text)
        args.errors.write_text("\n".join(lines), errors="backslashreplace")
    return int(show(outcomes, args.seed, time.monotonic() - started) > 0)


if __name__ == "__main__":
    sys.exit(main())
