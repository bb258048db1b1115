"""A run that was stopped, in any way, goes on and writes the same bytes."""

import json
import random
import shutil
import signal
import time
from itertools import product

import pytest
import torch
from helpers import (
    LITTLE_TEXT,
    ONE_DOMAIN,
    first_layers,
    interrupt_after,
    mostly_slow,
    same_files,
    save_random,
    slow,
)

import qmoe
from qmoe import QuantConfig
from qmoe.cli.main import main
from qmoe.errors import OutputError

SLOW = (
    "--preset",
    "fast",
    "--calibration",
    ONE_DOMAIN,
    "--samples",
    "12",
    "--set",
    "calibration.batch=1",
)


@pytest.fixture(scope="module")
def source(demo, tmp_path_factory):
    """Three layers: time enough to be stopped in."""
    return first_layers(demo, tmp_path_factory.mktemp("three") / "source", 3)


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory):
    """What an uninterrupted run writes."""
    folder = tmp_path_factory.mktemp("whole")
    assert main(["quantize", str(source), str(folder / "out"), *SLOW]) == 0
    return folder / "out"


def stop(forks, tmp_path, source, sign, shards, delay=0.0):
    """Start a run and stop it once it has finished that many shards."""
    process = forks.quantize(source, tmp_path / "out", *SLOW)
    partial = tmp_path / "out.partial"
    while len(list(partial.glob(".qmoe-shard-*.json"))) < shards:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.005)
    time.sleep(delay)
    process.send_signal(sign)
    err = process.communicate()[1]
    assert not (tmp_path / "out").exists()
    return process.returncode, err


@pytest.mark.parametrize("shards", [1, slow(2)])
def test_a_killed_run_goes_on_to_the_same_bytes(forks, tmp_path, source, whole, shards):
    delay = random.Random(shards).random() * 0.2
    status, _ = stop(forks, tmp_path, source, signal.SIGKILL, shards, delay)
    assert status == -signal.SIGKILL and (tmp_path / "out.partial").exists()
    assert main(["quantize", str(source), str(tmp_path / "out"), *SLOW]) == 0
    assert same_files(whole, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("sign", [signal.SIGINT, slow(signal.SIGTERM)], ids=["ctrl-c", "kill"])
def test_an_interrupted_run_says_so_and_goes_on(forks, tmp_path, source, whole, sign):
    status, err = stop(forks, tmp_path, source, sign, 1)
    assert status == 130, err
    assert "interrupted: the same command goes on" in err
    assert "Traceback" not in err
    assert main(["quantize", str(source), str(tmp_path / "out"), *SLOW]) == 0
    assert same_files(whole, tmp_path / "out")


METHODS = ["rtn", "awq", "gptq", "awq-gptq"]


@pytest.mark.parametrize(
    "method, symmetric",
    # Runs that are killed, above, are GPTQ's.
    mostly_slow(
        [*product(METHODS, (True, False))],
        lambda method, symmetric: (method, symmetric) == ("rtn", True),
    ),
)
def test_every_method_goes_on_to_the_same_bytes(tmp_path, demo, method, symmetric, monkeypatch):
    source = save_random("qwen3_moe", tmp_path / "source", demo, torch.bfloat16)
    scheme = qmoe.Scheme(3, 32, symmetric)
    search_grid = method == "gptq" and not symmetric  # once is enough: it takes long
    config = QuantConfig(method, scheme, scheme, search_grid=search_grid, calibration=LITTLE_TEXT)
    qmoe.quantize(source, tmp_path / "whole", config, progress=False)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 1)
        with pytest.raises(KeyboardInterrupt):
            qmoe.quantize(source, tmp_path / "out", config, progress=False)
    qmoe.quantize(source, tmp_path / "out", config, progress=False)
    assert same_files(tmp_path / "whole", tmp_path / "out")


def test_other_settings_are_refused_and_named(tmp_path, short, monkeypatch):
    config = QuantConfig("rtn")
    with monkeypatch.context() as patch:
        interrupt_after(patch, 1)
        with pytest.raises(KeyboardInterrupt):
            qmoe.quantize(short, tmp_path / "out", config, progress=False)
    with pytest.raises(OutputError, match="unfinished work that differs .*damp was 0.01, is 0.5"):
        qmoe.quantize(short, tmp_path / "out", QuantConfig("rtn", damp=0.5), progress=False)
    shard = next((tmp_path / "out.partial").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:1000])
    with pytest.raises(OutputError, match="unfinished work is damaged"):
        qmoe.quantize(short, tmp_path / "out", config, progress=False)


def test_work_of_another_layout_is_refused_by_name(tmp_path, short, monkeypatch):
    """As an older version left it: its notes would be misread."""
    config = QuantConfig("rtn")
    with monkeypatch.context() as patch:
        interrupt_after(patch, 1)
        with pytest.raises(KeyboardInterrupt):
            qmoe.quantize(short, tmp_path / "out", config, progress=False)
    marker = tmp_path / "out.partial" / ".qmoe-partial"
    told = json.loads(marker.read_text())
    del told["fingerprint"]["layout"]
    marker.write_text(json.dumps(told))
    before = sorted(p.name for p in marker.parent.iterdir())
    with pytest.raises(OutputError, match=f"{marker.parent}: .* another version of qmoe"):
        qmoe.quantize(short, tmp_path / "out", config, progress=False)
    assert sorted(p.name for p in marker.parent.iterdir()) == before


def test_nothing_finished_leaves_nothing(tmp_path, short, monkeypatch):
    interrupt_after(monkeypatch, 0)
    with pytest.raises(KeyboardInterrupt):
        qmoe.quantize(short, tmp_path / "out", QuantConfig("rtn"), progress=False)
    assert list(tmp_path.iterdir()) == []


def test_two_runs_do_not_write_one_destination(tmp_path, source, short, forks):
    process = forks.quantize(source, tmp_path / "out", *SLOW)
    while not (tmp_path / "out.partial" / ".qmoe-partial").exists():
        assert process.poll() is None
        time.sleep(0.01)
    try:
        with pytest.raises(OutputError, match=f"process {process.pid} on .* is writing it"):
            qmoe.quantize(short, tmp_path / "out", QuantConfig("rtn"), progress=False)
    finally:
        process.kill()
        process.communicate()
    shutil.rmtree(tmp_path / "out.partial")
