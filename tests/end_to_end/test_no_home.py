"""A container's user may have no home that can be written, or none at all, not even a name."""

import json
import shutil
import subprocess
import sys

import pytest
from helpers import mostly_slow

# A fresh process, since libraries look for a home while they are imported; one for all commands.
NAMELESS = """
import contextlib, io, json, os, pwd, sys
for name in [n for n in os.environ if n.startswith(("HF_", "XDG_"))]:
    del os.environ[name]
os.environ.pop("HOME", None)
os.environ |= {home}
if "HOME" not in os.environ:
    def nobody(uid): raise KeyError(uid)
    pwd.getpwuid = nobody
from qmoe.cli.main import main
for command in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(command)
    print(json.dumps([status, out.getvalue(), err.getvalue()]))
"""
HOMES = {"not writable": {"HOME": "/proc/1"}, "none": {}}


@pytest.mark.parametrize(
    "home", mostly_slow([(name,) for name in HOMES], lambda name: name == "none")
)
def test_without_a_home(tmp_path, demo, quantized_short, home):
    """Local text needs none; what needs a cache says how to name one."""
    rows = [{"text": f"In year {i} the question was asked again, for once."} for i in range(200)]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    shutil.copyfile(tmp_path / "data" / "train.jsonl", tmp_path / "t.jsonl")
    texts = ("--text", "t.jsonl", "--text", f"hf:{tmp_path}/data")
    commands = [
        ["eval", str(quantized_short), "--samples", "1", "--seqlen", "16", *texts],
        ["quantize", "owner/name", "out"],
        ["quantize", str(demo), "out", "--calibration", "hf:owner/name/x"],
    ]
    code = NAMELESS.format(home=HOMES[home] | {"HF_HUB_OFFLINE": "1"})
    command = [sys.executable, "-P", "-W", "ignore", "-c", code, json.dumps(commands)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and not done.stderr, done.stderr
    local, model, text = [json.loads(line) for line in done.stdout.splitlines()]
    assert local[0] == 0 and not local[2] and "perplexity" in local[1], local
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data", "t.jsonl"]
    assert model[0] == 1 and model[2].startswith("error: owner/name: no such local folder"), model
    last = text[2].splitlines()[-1]
    assert text[0] == 1 and last.startswith("error: hf:owner/name/x: cannot load the dataset"), text
    assert "HF_HOME" in model[2] and "HF_HOME" in last and "examples/s" not in text[2]
