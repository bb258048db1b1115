"""A container's user may have no home that can be written, or none at all, not even a name."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

NAMELESS = """
import os, pwd, sys
for name in [n for n in os.environ if n.startswith(("HF_", "XDG_"))]:
    del os.environ[name]
os.environ.pop("HOME", None)
os.environ |= {home}
if "HOME" not in os.environ:
    def nobody(uid): raise KeyError(uid)
    pwd.getpwuid = nobody
from qmoe.cli.main import main
sys.exit(main(sys.argv[1:]))
"""
HOMES = [{"HOME": "/proc/1"}, {}]


def qmoe(home: dict[str, str], folder: Path, *args: object) -> tuple[int, str, str]:
    code = NAMELESS.format(home=home | {"HF_HUB_OFFLINE": "1"})
    command = [sys.executable, "-P", "-W", "ignore", "-c", code, *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("home", HOMES, ids=["not writable", "none"])
def test_local_text_needs_no_home(tmp_path, quantized, home):
    rows = [{"text": f"In year {i} the question was asked again, for once."} for i in range(200)]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    shutil.copyfile(tmp_path / "data" / "train.jsonl", tmp_path / "t.jsonl")
    texts = ("--text", "t.jsonl", "--text", f"hf:{tmp_path}/data")
    found = qmoe(home, tmp_path, "eval", quantized, "--samples", 1, "--seqlen", 16, *texts)
    assert found[0] == 0 and not found[2] and "perplexity" in found[1], found
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data", "t.jsonl"]


@pytest.mark.parametrize("home", HOMES, ids=["not writable", "none"])
def test_what_needs_a_cache_says_how_to_name_one(tmp_path, demo, home):
    status, _, err = qmoe(home, tmp_path, "quantize", "owner/name", "out")
    assert status == 1 and err.startswith("error: owner/name: no such local folder"), err
    assert "HF_HOME" in err
    args = ("quantize", demo, "out", "--calibration", "hf:owner/name/x")
    status, _, err = qmoe(home, tmp_path, *args)
    last = err.splitlines()[-1]
    assert status == 1 and last.startswith("error: hf:owner/name/x: cannot load the dataset"), err
    assert "HF_HOME" in last and "examples/s" not in err
