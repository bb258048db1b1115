"""A good and a bad folder for every rule of every engine. The folders are headers alone."""

from typing import Any

import pytest
from engine_folders import make_folder

from qmoe.checkpoint.model_folder import ModelFolder
from qmoe.engines.check import ENGINES, check, engine
from qmoe.engines.rule import Setup, findings
from qmoe.engines.stored import read_contents
from qmoe.errors import CheckpointError, ConfigError

ATTENTION = "self_attn"
FIRST, SECOND = "mlp.experts.0", "mlp.experts.1"
CPU = {"experts": (4, 64, True), "dense": (4, 64, True)}
TINY = {"vocab_size": 64, "intermediate_size": 64, "max_position_embeddings": 64}
# Engine, how it runs, what is good, what is bad (of it), and the words that the finding has.
CASES: list[tuple[str, Setup, dict[str, Any], dict[str, Any], str]] = [
    ("vllm", Setup(), {}, {"method": "exl3"}, "'exl3'"),
    ("vllm", Setup(), {}, {"form": "pack-quantized-mixed"}, "'pack-quantized-mixed'"),
    ("vllm", Setup(), {}, {"form": "pack-quantized-rotated"}, "group_0.format"),
    ("vllm", Setup(), {}, {"own": {f"{FIRST}.up_proj": (8, 64, True)}}, f"{FIRST}.up_proj"),
    (
        "vllm",
        Setup(),
        {},
        {"own": {f"{SECOND}.{n}_proj": (8, 64, True) for n in ("gate", "up", "down")}},
        f"{SECOND}.down_proj",
    ),
    ("vllm", Setup(), {}, {"own": {f"{ATTENTION}.k_proj": (4, 64, True)}}, "k_proj: it has 4 bits"),
    ("vllm", Setup(), {"experts": (3, 64, True)}, {"experts": (1, 64, True)}, "it has 1 bits"),
    ("vllm", Setup(), {"experts": (4, -1, True)}, {"experts": (2, -1, True)}, "channel-wise"),
    ("vllm", Setup(), {"experts": (8, -1, True)}, {"experts": (8, -1, False)}, "zero points"),
    ("vllm", Setup(), {"experts": (4, -1, True)}, {"hidden": 320}, "hidden size of 320"),
    ("vllm", Setup(), {"experts": (4, 64, False)}, {"experts": (8, 64, False)}, "no kernel"),
    ("vllm", Setup(tp=2), {}, {"inner": 64}, "a device has 32 inputs"),
    ("vllm", Setup(tp=2), {}, {"inner": 192}, "down_proj"),
    (
        "vllm",
        Setup(tp=8),
        {"experts": (4, -1, False), "heads": 8, "kv_heads": 8},
        {"inner": 40},
        "gate and up outputs",
    ),
    ("vllm", Setup(tp=2), {"dense": (4, 128, True)}, {"dense": (4, 256, True)}, "o_proj"),
    ("vllm", Setup(tp=4), {"inner": 256}, {"heads": 2, "kv_heads": 2}, "heads: 2 heads"),
    ("vllm", Setup(tp=3), {"heads": 6, "hidden": 384, "kv_heads": 3, "inner": 192},
     {"kv_heads": 2}, "num_key_value_heads"),
    ("vllm", Setup(device="cpu"), CPU, {"experts": (4, 32, True)}, "experts.0"),
    ("vllm", Setup(device="cpu"), CPU, {"experts": (4, 64, False)}, "zero points"),
    ("vllm", Setup(device="cpu"), CPU, {"experts": (4, -1, True)}, "channel-wise"),
    ("vllm", Setup(device="cpu"), CPU, {"dense": (8, -1, True)}, "q_proj"),
    ("vllm", Setup(tp=2, device="cpu"), CPU, {"hidden": 96, "experts": (4, 64, True), "inner": 128,
     "dense": (4, -1, True)}, "a device has 48 inputs"),
    ("vllm", Setup(), {}, {"family": "gpt_oss"}, "no expert alone"),
    ("vllm", Setup(), {"family": "mixtral"}, {"family": "switch"}, "switch is not among"),
    ("sglang", Setup(), {}, {"method": "gptq"}, "'gptq'"),
    ("sglang", Setup(), {}, {"form": "mixed-precision"}, "quantization_config.format"),
    ("sglang", Setup(), {}, {"own": {f"{FIRST}.down_proj": (8, 64, True)}}, "down_proj"),
    ("sglang", Setup(), {}, {"own": {f"{ATTENTION}.v_proj": (4, 64, True)}}, "v_proj"),
    ("sglang", Setup(), {}, {"experts": (3, 64, True)}, "it has 3 bits"),
    ("sglang", Setup(), {"experts": (4, 64, False)}, {"dense": (8, -1, False)}, "zero points"),
    ("sglang", Setup(tp=2), {}, {"inner": 64}, "a device has 32 inputs"),
    ("sglang", Setup(tp=2), {"experts": (4, 32, True)}, {"inner": 192}, "96 inner features"),
    ("sglang", Setup(tp=2), {"dense": (4, 128, True)}, {"dense": (4, 256, True)}, "o_proj"),
    ("sglang", Setup(), {}, {"hidden": 320, "dense": (4, -1, True)}, "320 inputs"),
    ("sglang", Setup(tp=4), {"hidden": 512, "inner": 256}, {"heads": 2}, "num_attention_heads"),
    ("sglang", Setup(), {"latent": True, "dense": None}, {"dense": (8, -1, True)}, "kv_b_proj"),
    ("sglang", Setup(), {"family": "mixtral"}, {"family": "granite"}, "granite is not among"),
    ("transformers", Setup(), {}, {"method": "exl3"}, "'exl3'"),
    ("transformers", Setup(), {}, {"form": "pack-quantized-rotated"}, "rotated"),
    ("transformers", Setup(), {}, {"own": {f"{SECOND}.up_proj": (8, 64, True)}}, "experts.1"),
    ("transformers", Setup(), {}, {"experts": (4, 64, False)}, "zero points"),
    ("transformers", Setup(), {"family": "mixtral"}, {"family": "gpt_oss"}, "in one tensor"),
    ("transformers", Setup(), {}, {"family": "bailing_hybrid"}, "joins 3 tensors"),
    ("transformers", Setup(), {}, {"zero_expert_num": 2}, "2 experts without weights"),
    ("llama.cpp", Setup(), TINY, {"method": "exl3"}, "'exl3'"),
    ("llama.cpp", Setup(), TINY, {"form": "pack-quantized-rotated"}, "rotated"),
    ("llama.cpp", Setup(), {**TINY, "experts": (4, 64, False)}, {"experts": (8, 64, False)},
     "8 bits"),
    ("llama.cpp", Setup(), TINY, {"hidden": 176, "experts": (4, -1, True)}, "176 inputs"),
    ("llama.cpp", Setup(), TINY, {"norm_topk_prob": False}, "norm_topk_prob"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "setup", "good", "bad", "said"), CASES)
def test_rule(tmp_path, name, setup, good, bad, said):
    found = read_contents(ModelFolder(make_folder(tmp_path / "good", **good)))
    assert findings(engine(name), found, setup) == []
    found = read_contents(ModelFolder(make_folder(tmp_path / "bad", **{**good, **bad})))
    said_of = [str(finding) for finding in findings(engine(name), found, setup)]
    assert any(said in one for one in said_of), said_of


@pytest.mark.parametrize("name", ENGINES)
def test_every_rule_has_a_bad_folder(tmp_path, name):
    """And a source, a remedy and a sentence."""
    rules = engine(name).rules
    broken = set()
    for i, (other, setup, good, bad, _) in enumerate(CASES):
        if other == name:
            folder = make_folder(tmp_path / str(i), **{**good, **bad})
            found = findings(engine(name), read_contents(ModelFolder(folder)), setup)
            broken |= {rules.index(finding.rule) for finding in found}
    assert broken == set(range(len(rules)))
    for rule in rules:
        assert rule.says.endswith(".") and rule.remedy.endswith(".") and ": " in rule.source


def test_what_is_told(tmp_path):
    folder = make_folder(tmp_path / "bad", experts=(2, -1, True))
    told = check(folder, "vllm", tp=2)
    assert (told["engine"], told["passes"], len(told["broken"])) == ("vllm", False, 1)
    assert told["broken"][0]["name"] == "model.layers.0.mlp.experts.0.down_proj"
    assert "__init__" in told["broken"][0]["source"] and "plugin" in told["note"]
    assert check(make_folder(tmp_path / "good"), "vllm")["passes"]


def test_errors(tmp_path):
    folder = make_folder(tmp_path / "plain", quantization_config=None)
    with pytest.raises(ConfigError, match="is not quantized"):
        check(folder, "vllm")
    folder = make_folder(tmp_path / "good")
    with pytest.raises(ConfigError, match="engine: expected one of"):
        check(folder, "tensorrt")
    with pytest.raises(ConfigError, match="tp: expected at least 1, got 0"):
        check(folder, "vllm", tp=0)
    with pytest.raises(ConfigError, match="device: the rules of SGLang"):
        check(folder, "sglang", device="cpu")
    entry = {"quant_method": "compressed-tensors", "config_groups": {"g": {"targets": ["Linear"]}}}
    folder = make_folder(tmp_path / "damaged", quantization_config=entry)
    with pytest.raises(CheckpointError, match="bad quantization_config: KeyError: 'weights'"):
        check(folder, "vllm")
    entry = {"quant_method": "compressed-tensors", "config_groups": {}}
    folder = make_folder(tmp_path / "silent", quantization_config=entry)
    with pytest.raises(CheckpointError, match="says nothing of it"):
        check(folder, "vllm")
