"""Plans of published models, from headers without weights, beside arithmetic by hand."""

import importlib.util
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from qmoe.checkpoint.model_folder import ModelFolder
from qmoe.config import QuantConfig, Scheme
from qmoe.model.source import open_source
from qmoe.plan.choose import measure
from qmoe.plan.in_memory import in_memory
from qmoe.plan.sizes import sizes, stacks

spec = importlib.util.spec_from_file_location("plan_table", ROOT / "scripts" / "plan_table.py")
plan_table = importlib.util.module_from_spec(spec)
spec.loader.exec_module(plan_table)


def opened(name, folder):
    plan_table.write_headers(plan_table.CONFIGS[name], folder)
    return open_source(ModelFolder.find(folder), torch.float32)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_qwen3_30b_a3b(tmp_path):
    """48 layers of 128 experts of three matrices of 2048 x 768; 32 query heads and 4 of keys and of
    values, of 128; 151936 words; 2 bytes a number."""
    source = opened("Qwen3-30B-A3B", tmp_path / "m")
    assert source.checkpoint.nbytes() // 10**7 == 6106  # 30.53 billion parameters, and headers
    config = QuantConfig(experts=Scheme(4, 128))
    parts = stacks(source, config)
    found = sizes(source, config, parts)
    weights = 48 * 128 * 3 * 2048 * 768
    attention = 48 * 2048 * 128 * (32 + 4 + 4 + 32)
    assert found.experts == weights // 2 == 14_495_514_624
    assert found.dense == attention
    channels = 48 * (128 * (32 + 4 + 4) + 2048)
    shapes = 16 * 48 * (4 + 128 * 3)
    assert found.scales == 2 * weights // 128 + 2 * channels + shapes
    assert found.embeddings == found.lm_head == 2 * 151936 * 2048
    routers = 48 * 128 * 2048
    norms = 48 * (2 * 2048 + 2 * 128) + 2048
    assert found.other == 2 * (routers + norms)
    # No row or column of it is padded, on no device: 16 and 128 divide all of them.
    for gpu in (False, True):
        packed = in_memory(source, config, parts, gpu).routed
        assert sum(module.integers * module.experts for module in packed) == found.experts
    run = measure(source, 8192)
    assert run.cache_bytes == 48 * 2 * 4 * 128 * 2 * 8192
    assert set(run.chosen.values()) == {8} and len(run.chosen) == 48


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_mixtral_8x7b(tmp_path):
    source = opened("Mixtral-8x7B", tmp_path / "m")
    config = QuantConfig(experts=Scheme(3, 64, symmetric=False), dense=None)
    found = sizes(source, config, stacks(source, config))
    weights = 32 * 8 * 3 * 4096 * 14336
    assert found.experts == weights * 3 // 8
    groups = weights // 64
    # 3-bit zero points of 4096 or 14336 rows fill whole words.
    assert found.scales == 2 * groups + groups * 3 // 8 + 16 * 32 * 8 * 3
    attention = 32 * 4096 * (4096 + 1024 + 1024 + 4096)
    rest = 32 * (8 * 4096 + 2 * 4096) + 4096
    assert found.dense == 0 and found.other == 2 * (attention + rest)
    assert measure(source, 4096, 3).cache_bytes == 3 * 32 * 2 * 8 * 128 * 2 * 4096


@pytest.mark.slow
def test_the_script_prints_a_row_for_each_size(tmp_path):
    script, page = ROOT / "scripts" / "plan_table.py", tmp_path / "docs" / "table.md"
    command = [sys.executable, "-P", script, "gpt-oss-20b", "--vram", "2GB", "--vram", "24GB"]
    done = subprocess.run([*command, "--out", page], capture_output=True, text=True, check=True)
    first, second = done.stdout.splitlines()[2:]
    assert "none:" in first and "of GPU memory missing" in first
    assert second.startswith("| gpt-oss-20b | 24GB | 4 bits, g32 |") and "100 %" in second
    assert done.stdout.strip() in page.read_text()
