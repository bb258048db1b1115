"""`--target` keeps to an engine's rules: what settings are going to make is what is then there."""

from dataclasses import replace

import pytest
import torch
from helpers import LITTLE_TEXT, save_random

import qmoe
from qmoe import QuantConfig, Scheme
from qmoe.checkpoint.model_folder import ModelFolder
from qmoe.engines.settings import check_target, contents_of
from qmoe.engines.stored import read_contents
from qmoe.errors import ConfigError
from qmoe.model.source import open_source

RTN = QuantConfig("rtn", Scheme(4, 32), Scheme(8, -1))
FIRST = "model.layers.0.mlp.experts"


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("qwen3_moe", RTN),
        ("qwen3_moe", replace(RTN, widths={f"{FIRST}.down_proj": "242424"})),
        ("qwen3_moe", replace(RTN, experts=Scheme(3, 32, symmetric=False), lm_head=Scheme(4, 32))),
        ("mixtral", replace(RTN, dense=None)),
        ("gpt_oss", RTN),
        ("deepseek_v3", RTN),
    ],
)
def test_what_is_planned_is_what_is_stored(tmp_path, demo, family, config):
    source = save_random(family, tmp_path / "source", demo, torch.bfloat16)
    qmoe.quantize(source, tmp_path / "packed", config, progress=False)
    planned = contents_of(open_source(ModelFolder(source), torch.float32), config)
    stored = read_contents(ModelFolder(tmp_path / "packed"))
    by_name = {matrix.name: matrix for matrix in planned.matrices}
    assert by_name == {matrix.name: matrix for matrix in stored.matrices}
    assert set(stored.unpacked) - set(planned.unpacked) <= {"model.embed_tokens"}


@pytest.fixture(scope="module")
def source(demo, tmp_path_factory):
    return save_random("qwen3_moe", tmp_path_factory.mktemp("source") / "m", demo, torch.bfloat16)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"target": "sglang"}, "a device has 32 inner features"),
        ({"target": "sglang", "experts": Scheme(2, 32)}, "it has 2 bits"),
        ({"target": "vllm", "experts": Scheme(2, -1)}, "experts.0.gate_proj.*it has 2 bits"),
        ({"target": "vllm", "rotate": "online"}, "pack-quantized-rotated"),
        ({"target": "vllm", "widths": {f"{FIRST}.down_proj": "2" * 6}}, "experts.0.gate_proj"),
        ({"target": "llama.cpp", "experts": Scheme(8, 32, symmetric=False)}, "zero points"),
        ({"target": "llama.cpp"}, "norm_topk_prob"),
    ],
)
def test_settings_that_the_target_cannot_run(source, tmp_path, settings, said):
    config = replace(RTN, **settings)
    with pytest.raises(ConfigError, match=rf"(?s)target: .* cannot run what.*{said}"):
        qmoe.quantize(source, tmp_path / "out", config, progress=False)
    assert list(tmp_path.iterdir()) == []


def test_settings_that_it_runs(source):
    opened = open_source(ModelFolder(source), torch.float32)
    for target in ("qmoe", "vllm"):
        check_target(opened, replace(RTN, target=target))


def test_a_budget_may_choose_any_width(tmp_path, demo):
    """SGLang runs 4 and 8 bits alone, which is said before anything is measured."""
    sizes = {"hidden_size": 128, "moe_intermediate_size": 64, "head_dim": 32}
    wide = save_random("qwen3_moe", tmp_path / "wide", demo, torch.bfloat16, **sizes)
    config = QuantConfig(experts=Scheme(4, 32), calibration=LITTLE_TEXT, target="sglang")
    check_target(open_source(ModelFolder(wide), torch.float32), config)
    budget = qmoe.Budget(bits=4.5, guard_text="heldout:austen")
    with pytest.raises(ConfigError, match="it has 2 bits"):
        qmoe.quantize_to_size(wide, tmp_path / "out", budget, config, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["wide"]
