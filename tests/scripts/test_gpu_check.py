"""The kit for GPUs: whoever would time a wrong tile catches it; a step that hangs is ended."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
CPU = torch.device("cpu")


@pytest.fixture
def kit(monkeypatch):
    """The modules of scripts/gpu."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    from gpu import bench, cells, record, tune

    yield bench, cells, record, tune
    for name in [name for name in sys.modules if name == "gpu" or name.startswith("gpu.")]:
        del sys.modules[name]


@pytest.fixture
def wrong_tile(monkeypatch):
    """One expert's first two byte planes are swapped, as a wrong index would."""
    from qmoe.kernels import arena

    right, calls = arena.pack, []

    def swapped(q, bits, order):
        packed = right(q, bits, order)
        calls.append(bits)
        if len(calls) == 3:  # the second expert's first matrix
            packed = packed.clone()
            packed[:8192] = packed[:8192].view(2, 4096).flip(0).flatten()
        return packed

    monkeypatch.setattr(arena, "pack", swapped)


def few(cells):
    return replace(cells.TOY[0], E=2, A=2)


def test_the_benchmark_refuses_a_wrong_tile(kit, wrong_tile, tmp_path):
    bench, cells, record, _ = kit
    found = record.Record(tmp_path / "bench.json")
    bench.bench(found, CPU, [(few(cells), 4)], (2,), 1)
    assert not found.rows and "a block of 128 outputs is off" in found.problems[0]


def test_the_tuner_refuses_a_wrong_tile(kit, wrong_tile, tmp_path):
    _, cells, record, tune = kit
    found = record.Record(tmp_path / "tune.json")
    packed = cells.pack_layer(few(cells), 4, CPU)
    cell = tune.Cell(packed.layer, 4, 2)
    assert tune.compare(packed, cell, {"the table": None}, found) == {}
    assert "a block of 128 outputs is off" in found.problems[0]


def test_the_kernels_own_check_refuses_a_wrong_tile(kit, wrong_tile):
    _, cells, _, _ = kit
    with pytest.raises(ArithmeticError, match="a block of 128 outputs is off"):
        cells.check(cells.pack_layer(few(cells), 4, CPU), 2)


@pytest.mark.slow  # so does `make gpu-dry-run`
def test_a_right_tile_is_timed(kit, tmp_path):
    bench, cells, record, _ = kit
    found = record.Record(tmp_path / "bench.json")
    bench.bench(found, CPU, [(few(cells), 4)], (1,), 1)
    assert found.finish() and found.rows[0]["qmoe_us"] > 0
    assert json.loads((tmp_path / "bench.json").read_text())["status"] == "passed"


def test_the_tuner_takes_what_is_fastest_everywhere(kit):
    *_, tune = kit
    slow, fast, partial = (tune.Tile(8, n, 4, 2) for n in (32, 64, 128))
    seen = {slow: {"a": 9.0, "b": 9.0}, fast: {"a": 4.0, "b": 5.0}, partial: {"a": 1.0}}
    assert tune.best(seen) == fast
    table = tune.device_table(CPU)[0]
    never, by = tune.NEVER, {0: 1.0}
    trials = {
        "waves": [(8, {1: 2.0, 2: 1.0}), (64, {1: 1.0, 2: 1.1})],
        "inline_rows": [(16, {0: 2.0, 256: 1.0}), (64, {0: 1.0, 256: 2.0})],
        "dense_rows": [
            (128, by | {never: 0.5}),
            (256, by | {never: 2.0}),
            (512, by | {never: 3.0}),
        ],
    }
    chosen = tune.chosen(table, trials)
    assert (chosen.waves, chosen.inline_rows, chosen.dense_rows) == (2, 16, 256)


def test_a_page_says_what_was_cut_short(kit, tmp_path, monkeypatch):
    from gpu import page

    monkeypatch.setattr(page, "DOCS", tmp_path / "docs")
    here = {"device": "Some GPU", "GB": 80.0, "read_gbps": 3000.0, "python": "3.12"}
    row = dict(layer="toy", group=32, bits="4", tokens=1, qmoe_us=2.0, bf16_us=6.0, times_bf16=3.0)
    row |= dict(gbps=10.0, share_of_read=0.5, tflops=1.0, error=0.001)
    for name, status, rows in (("environment", "passed", [here]), ("decode", "running", [row])):
        text = json.dumps({"status": status, "seconds": 1, "problems": [], "rows": rows})
        (tmp_path / f"{name}.json").write_text(text)
    text = page.page(tmp_path).read_text()
    assert "| decode | cut short |" in text and "| toy g32 | 4 | 1 | 2.0 | 6.0 | 3.00 |" in text


def test_a_step_that_hangs_is_ended_and_the_rest_goes_on(tmp_path):
    code = "import sys; sys.path.insert(0, %r); import gpu_check as g; "
    code += "print(g.run([sys.executable, '-c', 'import time; time.sleep(60)'], 0.5))"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code % str(SCRIPTS)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "124"
