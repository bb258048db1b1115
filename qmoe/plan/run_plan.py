"""qmoe_plan.json: how a model is to be run in the memory that it was made for."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import get_args

import torch

from qmoe.checkpoint.folders import read_json
from qmoe.config import Kv
from qmoe.errors import CheckpointError, ConfigError
from qmoe.plan.placement import CUDA, CUDA_HOST, Budget, Placement
from qmoe.system.files import write_json
from qmoe.system.host_memory import PROCESS, room
from qmoe.system.sizes import format_size

FILE = "qmoe_plan.json"


@dataclass(frozen=True)
class RunPlan:
    """Bytes. vram, ram: that were given, None where there is no GPU. context, batch: tokens of a
    sequence, and sequences. gpu, host: that loading and running take beyond what CUDA and the
    process take themselves. expert_memory: of the GPU for routed experts, None where all lie in the
    memory that computes. hybrid: whether the CPU computes the experts that are not on the GPU; they
    are copied to slots otherwise. kv: see above."""

    vram: int | None
    ram: int
    context: int
    batch: int
    gpu: int
    host: int
    expert_memory: int | None
    hybrid: bool
    kv: Kv = "bf16"

    @classmethod
    def of(
        cls, placement: Placement, budget: Budget, context: int, batch: int, kv: Kv
    ) -> "RunPlan":
        """What a placement that fits comes to."""
        gpu, host = placement.total()
        on_gpu = budget.gpu is not None
        return cls(
            budget.gpu,
            budget.host,
            context,
            batch,
            gpu - CUDA if on_gpu else 0,
            host - PROCESS - (CUDA_HOST if on_gpu else 0),
            placement.expert_memory,
            placement.hybrid,
            kv,
        )

    def write(self, path: Path) -> None:
        """Into a file."""
        write_json(path, asdict(self))

    @classmethod
    def read(cls, path: Path) -> "RunPlan":
        """Of a file, or of a folder that has one. Raises CheckpointError if it is none."""
        file = path / FILE if path.is_dir() else path
        if not file.is_file():
            raise CheckpointError(
                f"{file}: there is no plan; `qmoe quantize --vram` writes one into the folder, and "
                "`qmoe plan --save` into a file"
            )
        found = read_json(file)
        kinds = {
            name: (int, type(None)) if name in ("vram", "expert_memory") else (int,)
            for name in cls.__dataclass_fields__
        } | {"hybrid": (bool,), "kv": (str,)}
        for name, kind in kinds.items():
            value = found.get(name, "missing")
            wrong = type(value) not in kind or (type(value) is int and value < 0)
            if wrong or (name == "kv" and value not in get_args(Kv)):
                raise CheckpointError(f"{file}: {name} is {value!r:.100}; make the plan again")
        return cls(**{name: found[name] for name in kinds})

    def check(self, device: torch.device, given: Path) -> None:
        """Raises ConfigError if it is for another kind of device, or takes more memory than is free
        here. given: the plan's name, for the error."""
        gpu, there = free_on(device), room()
        if (gpu is None) != (self.vram is None):
            wanted = "a CPU" if self.vram is None else "a GPU"
            raise ConfigError(
                f"{given}: the plan is for {wanted}, the device is {device}; load the model on "
                f"{wanted}, or without the plan"
            )
        for name, need, free, why in (
            ("GPU memory", self.gpu, gpu or 0, f"free on {device}"),
            ("host memory", self.host, there.nbytes, f"free {there.reason}"),
        ):
            if need > free:
                raise ConfigError(
                    f"{given}: the plan needs {format_size(need)} of {name}, which is "
                    f"{need - free} bytes more than the {format_size(free)} that are {why}; free "
                    "some, or plan for less memory (`qmoe plan`)"
                )


def free_on(device: torch.device) -> int | None:
    """Free bytes of a GPU's memory; None for a device that is none."""
    return int(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else None
