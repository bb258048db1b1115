"""What qmoe runs on: versions, processor, GPUs, kernels, memory and the cache, for bug reports."""

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch

from qmoe._version import __version__
from qmoe.kernels.cpu.library import OFF, VARIABLE, library, tier_name
from qmoe.runtime.prepared import cache_folder, prepared_files
from qmoe.system.host_memory import room

PACKAGES = (
    "torch", "triton", "transformers", "compressed-tensors", "safetensors", "tokenizers",
    "datasets", "accelerate", "bitsandbytes", "huggingface-hub", "numpy", "vllm",
)  # fmt: skip
# Instructions that the C kernels or torch choose code by, as the kernel of Linux names them.
FEATURES = (
    "avx2", "f16c", "fma", "avx_vnni", "avx512f", "avx512bw", "avx512vl", "avx512_vnni",
    "avx512_bf16", "amx_tile", "amx_int8", "amx_bf16", "asimd", "asimddp", "i8mm", "sve",
)  # fmt: skip


def environment() -> dict[str, Any]:
    """Versions, CPU, GPUs, the kernels that run on each, memory in bytes, and the cache.

    No model is read. Raises ConfigError if QMOE_CPU_KERNELS names an instruction set that this
    processor or installation does not have.
    """
    there = room()
    folder = cache_folder()
    return {
        "qmoe": __version__,
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "cpu": cpu(),
        "gpus": [_gpu(i) for i in range(torch.cuda.device_count())],
        "memory": {
            "total": int(psutil.virtual_memory().total),
            "free": there.nbytes,
            "free_is": there.reason,
        },
        "cache": {
            "folder": None if folder is None else str(folder),
            "files": [vars(file) | {"path": str(file.path)} for file in prepared_files()],
        },
    }


def cpu() -> dict[str, Any]:
    """The processor: its name, architecture, cores, instructions, torch's threads, and the kernels
    that packed weights run through on it."""
    listed = _cpuinfo()
    flags = set((listed.get("flags") or listed.get("Features") or "").split())
    return {
        "name": listed.get("model name") or platform.processor() or platform.machine(),
        "architecture": platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "features": [name for name in FEATURES if name in flags],
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "kernels": _cpu_kernels(),
    }


def _cpu_kernels() -> str:
    """In words, what computes with packed weights on the CPU, and why it is not the C kernels."""
    name = tier_name()
    if name is not None:
        return f"C kernels, {name}"
    if os.environ.get(VARIABLE) == OFF:
        reason = f"{VARIABLE}={OFF}"
    elif library() is None:
        reason = "the C kernels are not in this installation"
    else:
        reason = "the C kernels have no fast code for this processor"
    return f"torch's own operations ({reason})"


def _gpu(i: int) -> dict[str, Any]:
    """A GPU: its name, architecture, memory in bytes, and the tuning table of its kernels, or why
    there are none."""
    properties = torch.cuda.get_device_properties(i)
    free, total = torch.cuda.mem_get_info(i)
    found = {"name": properties.name, "memory": total, "free": free}
    found["capability"] = f"{properties.major}.{properties.minor}"
    if _version("triton") is None:
        return found | {"kernels": "none: triton is not installed"}
    from qmoe.kernels.layer import device_table

    try:
        table, _ = device_table(torch.device("cuda", i))
    except ValueError as error:
        return found | {"kernels": f"none: {error}"}
    return found | {"kernels": f"Triton kernels, table of {table.arch}"}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpuinfo() -> dict[str, str]:
    """The first processor of /proc/cpuinfo, by key; empty where there is no such file."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().split("\n\n")[0].splitlines() if path.is_file() else []
    pairs = (line.partition(":") for line in lines)
    return {key.strip(): value.strip() for key, _, value in pairs}
