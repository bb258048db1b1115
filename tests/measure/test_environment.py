"""What a bug report is told of the machine."""

import json
from types import SimpleNamespace

import pytest
import torch

from qmoe.cli.main import main
from qmoe.kernels.cpu.library import library, tier, tier_name
from qmoe.measure import environment


@pytest.fixture
def retried():
    """The instruction set is looked for again, before and after."""
    tier.cache_clear()
    yield
    tier.cache_clear()


def test_the_kernels_that_are_named_are_those_that_run(monkeypatch, retried):
    if library() is not None and tier_name() is not None:
        assert environment.cpu()["kernels"] == f"C kernels, {tier_name()}"
    tier.cache_clear()
    monkeypatch.setenv("QMOE_CPU_KERNELS", "off")
    assert environment.cpu()["kernels"] == "torch's own operations (QMOE_CPU_KERNELS=off)"


def test_kernels_that_are_not_installed(monkeypatch, retried):
    monkeypatch.delenv("QMOE_CPU_KERNELS", raising=False)
    monkeypatch.setattr("qmoe.kernels.cpu.library.library", lambda: None)
    monkeypatch.setattr(environment, "library", lambda: None)
    assert "not in this installation" in environment.cpu()["kernels"]


@pytest.mark.parametrize(
    "name, version, said",
    [("NVIDIA H100 80GB HBM3", (9, 0), "table of sm90"), ("Tesla P4", (6, 1), "none: Tesla P4")],
)
def test_gpus(name, version, said, monkeypatch):
    properties = SimpleNamespace(
        name=name, major=version[0], minor=version[1], multi_processor_count=132
    )
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (7, 9))
    from qmoe.kernels.layer import device_table

    device_table.cache_clear()
    (gpu,) = environment.environment()["gpus"]
    device_table.cache_clear()
    assert gpu["name"] == name and gpu["memory"] == 9 and said in gpu["kernels"]


def test_the_command_lists_the_cache_and_clears_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = tmp_path / "qmoe"
    assert main(["info"]) == 0 and "0 files" in capsys.readouterr().out
    folder.mkdir()
    for name in ("model-1.cpu", "model-2.cpu.x1.partial", "notes.txt"):
        (folder / name).write_bytes(b"12345")
    assert main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {file["nbytes"] for file in found["cache"]["files"]} == {5}
    assert len(found["cache"]["files"]) == 2 and not found["removed"]
    assert main(["info", "--clear-cache"]) == 0
    assert "removed " in capsys.readouterr().out
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]
