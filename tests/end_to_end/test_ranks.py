"""Several processes quantize one model; in one process nothing of that is noticed."""

import json
import os
import subprocess
import sys

import pytest
import torch
from helpers import assert_close, first_layers
from safetensors import safe_open

from qmoe.system import distributed

OPTIONS = ("--samples", "10", "--self-samples", "6")
OPTIONS += ("--set", "calibration.batch=2", "--set", "search_grid=false")


def quantize(demo, out, *launcher, more=()):
    command = [sys.executable, "-P", "-m", *launcher, "qmoe", "quantize", str(demo), str(out)]
    # Sums are split by thread, and torchrun gives each process one.
    alone = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([*command, *OPTIONS, *more], capture_output=True, text=True, env=alone)


def by_two(demo, out, more=()):
    launcher = ("torch.distributed.run", "--nproc-per-node", "2", "--module")
    return quantize(demo, out, *launcher, more=more)


def weights(folder):
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                yield name, file.get_tensor(name)


@pytest.mark.slow
def test_two_processes_write_what_one_does(tmp_path, demo):
    for out, run in (("one", quantize), ("two", by_two)):
        done = run(demo, tmp_path / out)
        assert done.returncode == 0, done.stderr
        assert "audit passed" in done.stdout and done.stdout.count("became") == 1
    one, two = dict(weights(tmp_path / "one")), dict(weights(tmp_path / "two"))
    assert len(one) > 600 and one.keys() == two.keys()
    # Sums over the text are added in another order, but in float64, and rounded once.
    assert all(torch.equal(one[name], two[name]) for name in one)
    reports = [json.loads((tmp_path / n / "qmoe_report.json").read_text()) for n in ("one", "two")]
    for a, b in zip(*(report["layers"] for report in reports), strict=True):
        for name, entry in a["experts"].items():
            assert entry["tokens"] == b["experts"][name]["tokens"]
            assert entry["borrowed"] == b["experts"][name]["borrowed"]
        assert a["error"] == pytest.approx(b["error"], rel=1e-3)


@pytest.mark.slow
def test_two_processes_save_statistics_together(tmp_path, demo):
    """The first one writes them, but all must solve in the same steps."""
    source = first_layers(demo, tmp_path / "source", 1)
    for name, run in (("one", quantize), ("two", by_two)):
        done = run(source, tmp_path / name, more=("--save-statistics", str(tmp_path / f"s-{name}")))
        assert done.returncode == 0, done.stderr
    one, two = dict(weights(tmp_path / "s-one")), dict(weights(tmp_path / "s-two"))
    assert (
        one.keys() <= two.keys() and len(one) > 8
    )  # linears fed alike share theirs in one process
    for name in one:
        assert_close(two[name], one[name])


@pytest.mark.slow
def test_a_refusal_reaches_every_process(tmp_path, demo):
    (tmp_path / "out").mkdir()
    done = by_two(demo, tmp_path / "out")
    assert done.returncode != 0 and "already exists" in done.stderr
    assert list((tmp_path / "out").iterdir()) == []


def test_shares_are_neighbours_and_cover_everything(monkeypatch):
    for count in (1, 2, 3, 7):
        monkeypatch.setattr(distributed, "count", lambda n=count: n)
        parts = []
        for r in range(count):
            monkeypatch.setattr(distributed, "rank", lambda n=r: n)
            parts += distributed.shard(range(10))
        assert parts == list(range(10))


def test_alone_everything_is_ones_own():
    x = torch.arange(3)
    distributed.all_reduce(x)
    assert distributed.all_gather_object(5) == [5] and distributed.broadcast("a") == "a"
    assert distributed.all_gather(x) is x and x.tolist() == [0, 1, 2]
