"""The same text in vLLM as in qmoe. vLLM wants other versions of libraries than qmoe, so it is in
an environment of its own: QMOE_TEST_VLLM names its `bin` (docs/engines.md says how to make it)."""

import json
import os
import subprocess
from pathlib import Path

import bench_vllm
import pytest
import torch
from conftest import ROOT

import qmoe

VLLM = os.environ.get("QMOE_TEST_VLLM")


@pytest.mark.slow
@pytest.mark.skipif(VLLM is None, reason="QMOE_TEST_VLLM names no environment with vLLM")
def test_greedy_text_and_log_probabilities_are_qmoes(tmp_path):
    widths = {"model.layers.0.mlp.experts.gate_up_proj": "23482348" * 2}
    config = qmoe.QuantConfig("rtn", experts=qmoe.Scheme(4, 32, symmetric=False), widths=widths)
    qmoe.quantize(ROOT / "tests/data/demo-moe", tmp_path / "packed", config)
    ours = bench_vllm.reference(tmp_path / "packed", torch.float32)
    engine = {"model": str(tmp_path / "packed"), "dtype": "float32"}
    prompts = [one["prompt"] for one in ours]
    out = tmp_path / "out.json"
    job = {"engine": engine, "prompts": prompts, "tokens": bench_vllm.TOKENS, "out": str(out)}
    (tmp_path / "jobs.json").write_text(json.dumps([job]))
    python, script = Path(VLLM or "") / "python", ROOT / "scripts" / "vllm_texts.py"
    subprocess.run([python, "-P", script, "jobs.json"], cwd=tmp_path, check=True)
    found = bench_vllm.compared(ours, json.loads(out.read_text()))
    assert found["same"] == found["of"]
    assert found["logprob"] < 1e-4
