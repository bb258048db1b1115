"""The steps of scripts/gpu_check.py by name: at real sizes on a GPU, at toy sizes without one."""

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from gpu.record import Record
from gpu.uninstalled import ROOT

TESTS = ROOT / "tests" / "kernels"
WANTED = ("torch", "triton", "transformers", "safetensors", "compressed-tensors", "pytest",
          "bitsandbytes", "vllm", "pytest-xdist", "matplotlib", "rich")  # fmt: skip


def run(name: str, record: Record, out: Path, dry: bool) -> None:
    """Run a step and write what it finds into its record."""
    device = torch.device("cpu" if dry else "cuda")
    if name in ("kernels", "every kernel test", "sanitizer"):
        return tests(name, record, dry)
    if name == "environment":
        return environment(record, device)
    if name == "tune":
        from gpu.tune import tune
        from qmoe.kernels.launch import CONFIGS

        path = tune(record, device, out if dry else CONFIGS)
        record.row(what="wrote", path=path.name)
        return None if dry else shutil.copy(path, out)
    from gpu import bench

    if name == "decode":
        tokens = bench.DECODE if not dry else (1, 2)
        return bench.bench(record, device, bench.first_cells(device), tokens, 1 if dry else 11)
    if name == "small":
        tokens = bench.SMALL if not dry else (4,)
        return bench.bench(record, device, bench.first_cells(device), tokens, 1 if dry else 9)
    if name == "prefill":
        tokens = bench.PREFILL if not dry else (40,)
        return bench.bench(record, device, bench.first_cells(device), tokens, 1 if dry else 7)
    if name == "widths":
        tokens = (1, 8, 64, 4096) if not dry else (2,)
        return bench.bench(record, device, bench.other_cells(device), tokens, 1 if dry else 7)
    if name == "exl3":
        from gpu.coded import coded

        return coded(record, device, (1, 8, 64, 4096) if not dry else (3,), 1 if dry else 7)
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        if name == "models":
            from gpu.models import models

            return models(record, device, Path(folder), 4 if dry else 16)
        from gpu.decode import end_to_end

        layers = int(name.removeprefix("layers"))
        if dry:
            return end_to_end(record, device, Path(folder), 1, (1,))
        return end_to_end(record, device, Path(folder), layers, (1, 8))


def environment(record: Record, device: torch.device) -> None:
    """What is here, what is missing, and how fast memory is read."""
    from gpu.clock import read_bandwidth

    found = {}
    for package in WANTED:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "missing"
    name, memory = "CPU, in Triton's interpreter", 0
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        name, memory = properties.name, properties.total_memory
    record.row(device=name, GB=memory / 1e9, read_gbps=read_bandwidth(device) / 1e9,
               python=sys.version.split()[0], **found)  # fmt: skip


def tests(name: str, record: Record, dry: bool) -> None:
    """The kernels' tests, compiled: layers of real sizes first, the rest in a step of its own."""
    real = str(TESTS / "test_on_device.py")
    if name == "kernels":
        pytest(record, [real], dry)
    elif name == "every kernel test":
        # Without a GPU `make test` runs all of them.
        pure = [str(TESTS / "test_launch.py"), str(TESTS / "test_layout.py")]
        pytest(record, pure if dry else [str(TESTS), "--deselect", real], dry)
    elif dry or (tool := shutil.which("compute-sanitizer")) is None:
        record.leave_out("no compute-sanitizer here")
    else:
        small = [str(TESTS / "test_experts.py"), "-k", "linears or one_token or parts"]
        for kind in ("memcheck", "racecheck"):
            pytest(record, small, dry, [tool, "--tool", kind, "--error-exitcode", "9"])


def pytest(record: Record, which: list[str], dry: bool, before: Sequence[str] = ()) -> None:
    """pytest in a process of its own; its last line is a row."""
    workers = []
    if importlib.util.find_spec("xdist") is not None and not before and not dry:
        workers = ["-n", str(max(1, (os.cpu_count() or 2) - 2))]
    command = [
        *before, sys.executable, "-P", "-m", "pytest", "-v", "-o", "addopts=", "-W", "default",
        "--import-mode=importlib", "-p", "no:cacheprovider", "--maxfail=30", "--tb=short",
        "--durations=10", *workers, *which,
    ]  # fmt: skip
    environment = os.environ | ({} if dry else {"QMOE_TEST_DEVICE": "cuda"})
    # A file, so that a run that is cut short says which tests it was in.
    kind = f"-{before[2]}" if before else ""
    log = record.path.with_name(f"{record.path.stem}{kind}.log")
    with log.open("w") as file:
        done = subprocess.run(
            command, env=environment, stdout=file, stderr=subprocess.STDOUT, check=False
        )
    lines = [line for line in log.read_text().splitlines() if line]
    record.row(what=log.stem, result=lines[-1] if lines else "")
    if done.returncode:
        failures = [line for line in lines if line.startswith(("FAILED", "ERROR", "E  "))]
        record.problem(f"see {log.name}: " + "\n".join(failures[:40])[:4000])
