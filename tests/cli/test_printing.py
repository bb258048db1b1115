"""A report that cannot be printed ends in an error in words, and in nothing else."""

import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
from helpers import mostly_slow
from processes import CLI

FULL = Path("/dev/full")


@pytest.fixture
def run(forks):
    """`run(*args)` is `qmoe ARGS` in a process of its own: its status and standard error."""

    def start(*args, env=(), **streams):
        settings = os.environ | {"PYTHONUNBUFFERED": ""} | dict(env)
        status, _, err = forks.run(CLI, *args, env=settings, **streams)
        return status, err

    return start


@pytest.mark.slow
@pytest.mark.skipif(not FULL.exists(), reason="needs /dev/full")
def test_a_full_disk_in_a_fresh_python():
    """The others are forks, whose streams are made by the tests."""
    command = [sys.executable, "-P", "-W", "ignore", "-c", CLI, "families", "mixtral"]
    with FULL.open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert done.stderr == "error: standard output: No space left on device, for the report\n"


@pytest.mark.skipif(not FULL.exists(), reason="needs /dev/full")
@pytest.mark.parametrize(
    "args, unbuffered",
    mostly_slow(
        [*product((["mixtral"], ["mixtral", "--json"]), ("", "1"))],
        lambda args, unbuffered: (len(args) == 1) == bool(unbuffered),
    ),
)
def test_a_full_disk(args, unbuffered, run):
    with FULL.open("w") as full:
        status, err = run("families", *args, stdout=full, env={"PYTHONUNBUFFERED": unbuffered})
        assert status == 1
        assert err == "error: standard output: No space left on device, for the report\n"
        status, _ = run("families", *args, stdout=full, stderr=full)
        assert status == 1


@pytest.mark.skipif(not FULL.exists(), reason="needs /dev/full")
def test_a_full_disk_for_the_help_and_for_an_error(run):
    with FULL.open("w") as full:
        status, err = run("quantize", "--help", stdout=full)
        assert status == 1 and err.startswith("error: standard output: No space"), err
        assert run("families", "warp_drive", stderr=full)[0] == 1


@pytest.mark.skipif(not FULL.exists(), reason="needs /dev/full")
def test_a_quantized_model_is_whole_though_its_report_cannot_be_printed(tmp_path, short, run):
    with FULL.open("w") as full:
        status, err = run("quantize", short, tmp_path / "out", "--method", "rtn", stdout=full)
    assert status == 1 and "Traceback" not in err
    assert err.endswith(f"the model in {tmp_path / 'out'} is whole, and has it\n"), err
    assert (tmp_path / "out" / "qmoe_report.json").exists()


@pytest.mark.parametrize("json", [[], ["--json"]])
def test_a_reader_that_has_gone(json, run):
    """`qmoe families | head -0`: no word, and no traceback."""
    read, write = os.pipe()
    os.close(read)
    status, err = run("families", "mixtral", *json, stdout=write)
    os.close(write)
    assert (status, err) == (1, "")


def test_a_name_that_the_encoding_cannot_show(tmp_path, quantized_short, run):
    text = tmp_path / "gedächtnis\udce4.txt"  # the last is no UTF-8 either
    text.write_text("words that a model may read, " * 400)
    for encoding in ("ascii", "utf-8"):
        status, err = run(
            "eval", quantized_short, "--text", text, "--samples", "1", "--seqlen", "32",
            env={"PYTHONIOENCODING": encoding},
        )  # fmt: skip
        assert (status, err) == (0, ""), err
