"""Kill a quantizing run at random moments, let it go on, and compare what it wrote.

    python scripts/crash_test.py --kills 30

Starts `qmoe quantize` on a small random model and kills it with SIGKILL at a random moment, again
and again; the same command goes on each time, and whenever it gets to its end every byte of the
result must be that of an uninterrupted run. Then the same with SIGINT, SIGTERM and SIGHUP, after
which the process must say that it can go on; and with a disk that is full for a while (a tmpfs in a
mount namespace of its own, which needs Linux's `unshare`). Exit status 1 if anything differs.
"""

import argparse
import filecmp
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
POLITE = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# More experts than are solved at once, so that a run can be cut off between two units of a layer.
SHAPE = ["--hidden", "512", "--experts", "144", "--intermediate", "32", "--layers", "4"]
OPTIONS = ["--group-size", "32", "--samples", "24", "--seqlen", "64"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=30, help="times to kill with SIGKILL")
    parser.add_argument("--signals", type=int, default=9, help="times to kill with the others")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--on-tmpfs", nargs=3, type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.on_tmpfs:
        return full_disk(*args.on_tmpfs)
    # What nohup or a shell's `&` made this process ignore, the runs it starts would ignore too.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    with tempfile.TemporaryDirectory(prefix="qmoe-crash-") as name:
        folder = Path(name)
        source, whole, disk = folder / "source", folder / "whole", folder / "disk"
        make = [sys.executable, "-P", str(HERE / "random_model.py"), str(source), *SHAPE]
        subprocess.run(make, check=True, capture_output=True)
        times = uninterrupted(source, whole)
        killer = Killer(source, whole, folder / "out", times, random.Random(args.seed))
        bad = killer.rounds([signal.SIGKILL] * args.kills)
        bad += killer.rounds([POLITE[i % len(POLITE)] for i in range(args.signals)])
        disk.mkdir()
        inside = ["unshare", "--map-root-user", "--mount", sys.executable, "-P", __file__]
        inside += ["--on-tmpfs", str(source), str(whole), str(disk)]
        bad += subprocess.run(inside).returncode != 0
    print("every result is byte for byte the same" if not bad else f"{bad} FAILED")
    return int(bool(bad))


def begin(source: Path, out: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-P", "-m", "qmoe", "quantize", str(source), str(out), *OPTIONS]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def partial(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


def wait_for(process: subprocess.Popen[str], path: Path) -> None:
    while not path.exists() and process.poll() is None:
        time.sleep(0.01)


def uninterrupted(source: Path, out: Path) -> tuple[float, float]:
    """Run to the end; seconds until it begins to write, and until it ends."""
    start = time.monotonic()
    process = begin(source, out)
    wait_for(process, partial(out))
    first = time.monotonic() - start
    error = process.communicate()[1]
    if process.returncode:
        raise SystemExit(error)
    whole = time.monotonic() - start
    print(
        f"uninterrupted: {whole:.1f} s, of which {first:.1f} until the first byte is written",
        flush=True,
    )
    return first, whole


@dataclass
class Killer:
    source: Path
    whole: Path
    out: Path
    times: tuple[float, float]
    rng: random.Random

    def rounds(self, signs: list[signal.Signals]) -> int:
        """Kill once with each of the signals, finishing in between and at the end; returns how
        often something was wrong."""
        bad = finished = resumed = 0
        left = list(signs)
        while left or partial(self.out).exists():
            process = begin(self.source, self.out)
            went_on = partial(self.out).exists()
            if left:
                self._after(process, self.rng.uniform(self.times[0] * 0.9, self.times[1]))
                process.send_signal(left[0])
            error = process.communicate()[1]
            if self.out.exists():  # also if the signal came when all was done
                finished, resumed = finished + 1, resumed + went_on
                bad += not self._is_whole()
            elif left:
                bad += self._is_bad(process.returncode, error, left.pop(0))
            else:
                raise SystemExit(f"an unfinished run did not go on: {error}")
            print(f"  {len(signs) - len(left)} kills, {finished} finished", flush=True)
        names = ", ".join(sorted({sign.name for sign in signs}))
        print(
            f"{names}: killed {len(signs)} times, finished {finished} times, "
            f"{resumed} of them going on from unfinished work; {bad} bad",
            flush=True,
        )
        return bad

    def _after(self, process: subprocess.Popen[str], seconds: float) -> None:
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            return

    def _is_bad(self, status: int, error: str, sign: signal.Signals) -> bool:
        if sign == signal.SIGKILL:
            good = status == -sign
        else:
            good = status == 130 and "the same command goes on" in error
        if not good or "Traceback" in error:
            print(f"after {sign.name}: exit status {status}, {error[-2000:]}")
            return True
        return False

    def _is_whole(self) -> bool:
        good = same(self.whole, self.out)
        subprocess.run(["rm", "-r", str(self.out)], check=True)
        return good


def same(a: Path, b: Path) -> bool:
    """Whether two folders hold the same files with the same bytes."""
    names = sorted(p.name for p in a.iterdir())
    if names != sorted(p.name for p in b.iterdir()):
        print(f"other files than uninterrupted: {sorted(p.name for p in b.iterdir())}")
        return False
    _, differing, missing = filecmp.cmpfiles(a, b, names, shallow=False)
    if differing or missing:
        print(f"other bytes than uninterrupted: {differing + missing}")
    return not differing and not missing


def full_disk(source: Path, whole: Path, disk: Path) -> int:
    """In a mount namespace of its own: the disk fills after a shard, then has room again."""
    size = 4 * sum(p.stat().st_size for p in whole.iterdir())
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(disk)], check=True)
    out, ballast = disk / "out", disk / "ballast"
    process = begin(source, out)
    wait_for(process, partial(out) / ".qmoe-shard-0.json")
    with ballast.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(1 << 20))
        except OSError:
            pass  # full
    error = process.communicate()[1]
    told = process.returncode == 1 and "the disk is full; run the same command again" in error
    if not told or "Traceback" in error or out.exists():
        print(f"full disk: exit status {process.returncode}, {error[-2000:]}")
        return 1
    ballast.unlink()
    process = begin(source, out)
    error = process.communicate()[1]
    if process.returncode or not same(whole, out):
        print(f"after the full disk: exit status {process.returncode}, {error[-2000:]}")
        return 1
    print("full disk: said so, went on from unfinished work when there was room")
    return 0


if __name__ == "__main__":
    sys.exit(main())
