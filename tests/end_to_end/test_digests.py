"""The bytes of small quantized models are those that were recorded, on every x86-64 processor."""

import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
RECORDED = HERE.parent / "data" / "digests.json"


@pytest.mark.slow
@pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"),
    reason="other processors round sums in other orders; the digests are of x86-64",
)
def test_models_have_the_recorded_digests(tmp_path):
    command = [sys.executable, "-P", "-W", "ignore", str(HERE / "digests.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout) == json.loads(RECORDED.read_text())
