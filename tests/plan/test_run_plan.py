"""The plan in a file: what is written is read, what is damaged is refused."""

import json

import pytest
import torch

from qmoe.errors import CheckpointError, ConfigError
from qmoe.plan.placement import CUDA, CUDA_HOST, Budget, Part, Placement
from qmoe.plan.run_plan import FILE, RunPlan
from qmoe.system.host_memory import PROCESS

PLAN = RunPlan(12, 34, 56, 1, 7, 8, 9, True)


def test_what_is_written_is_read(tmp_path):
    PLAN.write(tmp_path / FILE)
    assert RunPlan.read(tmp_path) == RunPlan.read(tmp_path / FILE) == PLAN


def test_what_cuda_and_the_process_take_is_not_asked_for_again():
    parts = [Part("CUDA itself", CUDA, CUDA_HOST), Part("Python", 0, PROCESS), Part("x", 70, 30)]
    placement = Placement(parts, None, 50, 0.5, (1, 1), (0, 0), True)
    found = RunPlan.of(placement, Budget(10**9, 10**10), 64, 2, "int8")
    assert found == RunPlan(10**9, 10**10, 64, 2, 70, 30, 50, True, "int8")


@pytest.mark.parametrize(
    "change",
    [{"vram": "12GB"}, {"host": -1}, {"hybrid": 1}, {"context": None}, {"gpu": 1.5}, {"kv": "fp8"}],
    ids=str,
)
def test_a_damaged_plan_is_refused_by_its_field(tmp_path, change):
    (name,) = change
    written = {**vars(PLAN), **change}
    (tmp_path / FILE).write_text(json.dumps(written))
    with pytest.raises(CheckpointError, match=f"{name} is"):
        RunPlan.read(tmp_path)
    del written[name]
    (tmp_path / FILE).write_text(json.dumps(written))
    with pytest.raises(CheckpointError, match=f"{name} is 'missing'"):
        RunPlan.read(tmp_path)


def test_a_plan_for_a_gpu_is_not_for_a_cpu(tmp_path):
    with pytest.raises(ConfigError, match="the plan is for a GPU, the device is cpu"):
        PLAN.check(torch.device("cpu"), tmp_path)
