"""Shared by all tests: the repository root off sys.path, seeds, a tiny model to quantize."""

import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

# Triton decides when a kernel is defined whether its interpreter runs it: on CPUs it does, and
# `QMOE_TEST_DEVICE=cuda pytest tests/kernels` runs the compiled kernels instead.
if os.environ.get("QMOE_TEST_DEVICE", "cpu") == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")
else:
    os.environ.pop("TRITON_INTERPRET", None)

import pytest
import torch
from processes import ForkServer

ROOT = Path(__file__).resolve().parents[1]
# A folder named `kernels` on sys.path breaks transformers; `python -m pytest` would put it there.
sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != ROOT]

# Triton rewrites the source of its kernels and cannot if they are wrapped in type checks: they are
# loaded with jaxtyping's import hook out of the way.
importlib.import_module("qmoe.kernels.device")
hooked = list(sys.meta_path)
sys.meta_path[:] = [f for f in hooked if not type(f).__module__.startswith("jaxtyping")]
for name in ("activation", "coded", "dequant", "gemm", "route", "trellis", "turn", "unpack"):
    importlib.import_module(f"qmoe.kernels.device.{name}")
sys.meta_path[:] = hooked

DEMO = ROOT / "tests" / "data" / "demo-moe"


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def demo() -> Path:
    """The trained model that is committed with the tests."""
    return DEMO


@pytest.fixture(scope="session")
def quantized(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model quantized with the default settings on little text."""
    import qmoe

    path = tmp_path_factory.mktemp("quantized") / "q4"
    config = qmoe.QuantConfig(
        search_grid=False, calibration=qmoe.CalibrationConfig(samples=8, self_samples=0)
    )
    qmoe.quantize(demo, path, config, progress=False)
    return path


@pytest.fixture(scope="session")
def short(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model's first two layers: as real as the whole, in part of its time."""
    from helpers import first_layers

    return first_layers(demo, tmp_path_factory.mktemp("short") / "source", 2)


@pytest.fixture(scope="session")
def quantized_short(short: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """These two layers quantized on less text, with `helpers.QUICK`."""
    from helpers import QUICK

    import qmoe

    path = tmp_path_factory.mktemp("quantized-short") / "q4"
    qmoe.quantize(short, path, QUICK, progress=False)
    return path


@pytest.fixture(scope="session")
def forks() -> Iterator[ForkServer]:
    """Starts processes of their own that have imported qmoe."""
    server = ForkServer()
    yield server
    server.close()


@pytest.fixture
def bench_in_forks(forks: ForkServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that measure memory are forks, which have imported what they need."""

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        status, out, err = forks.run(command[-1])
        return subprocess.CompletedProcess(command, status, out, err)

    monkeypatch.setattr("qmoe.measure.bench.subprocess", SimpleNamespace(run=run))


@pytest.fixture
def quiet() -> Iterator[None]:
    """transformers says errors only."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    yield
    logging.set_verbosity(level)


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing is left in the user's cache of models' own code."""
    from transformers import dynamic_module_utils

    cache = str(tmp_path / "modules")
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", cache)
    monkeypatch.setenv("HF_MODULES_CACHE", cache)  # of processes that measure memory
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    for name in [n for n in sys.modules if n.split(".")[0] == "transformers_modules"]:
        del sys.modules[name]


@pytest.fixture
def nan_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.empty gives NaN, so that an output element nobody wrote is seen."""
    original = torch.empty

    def poisoned(*args: object, **kwargs: object) -> torch.Tensor:
        result = original(*args, **kwargs)
        return result.fill_(float("nan")) if result.is_floating_point() else result

    monkeypatch.setattr(torch, "empty", poisoned)
