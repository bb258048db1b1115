"""Experts and linears in widths and groups of their own: written, resumed, audited, run."""

import json
import shutil

import pytest
import torch
from helpers import LITTLE_TEXT, assert_close, interrupt_after, same_files, save_random, slow
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import qmoe
import qmoe.packed.load
import qmoe.runtime.modules
from qmoe import QuantConfig, Scheme
from qmoe.checkpoint.model_folder import ModelFolder
from qmoe.config import CHANNEL
from qmoe.errors import CheckpointError, ConfigError
from qmoe.format.compressed_tensors import Schemes, unpacked_tensors
from qmoe.kernels.arena_stack import ArenaStack
from qmoe.measure.baselines import original

IDS = torch.arange(60, 72)[None]
LAYER = "model.layers.0"
FIRST, SECOND = (f"{LAYER}.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj"))


def mixed(symmetric=False, **changes):
    scheme = Scheme(3, 32, symmetric)
    widths = {
        FIRST: "2348" * 4,
        SECOND: "8" * 16,
        f"{LAYER}.self_attn.q_proj": "8",
        f"{LAYER}.self_attn.o_proj": "4",
    }
    groups = {f"{LAYER}.mlp.experts": 64, "model.layers.1.mlp.experts": CHANNEL,
              f"{LAYER}.self_attn.q_proj": CHANNEL}  # fmt: skip
    settings = {"search_grid": False, "calibration": LITTLE_TEXT, "groups": groups} | changes
    return QuantConfig(experts=scheme, dense=scheme, widths=widths, **settings)


@pytest.fixture(scope="module", params=[slow(True), False])
def written(request, short, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixed") / "out"
    qmoe.quantize(short, folder, mixed(request.param), progress=False)
    return folder


@pytest.fixture
def reference(written, short, tmp_path):
    """The original with the weights that the packed ones stand for."""
    config = json.loads((written / "config.json").read_text())
    schemes = Schemes(config, "here")
    stored = {}
    for file in sorted(written.glob("*.safetensors")):
        stored |= load_file(file)
    weights = unpacked_tensors(stored, schemes)
    model = original(ModelFolder(short), torch.float32)
    for name, parameter in model.named_parameters():
        if name in weights:
            parameter.data.copy_(weights[name])
    for i, layer in enumerate(model.model.layers):
        experts, own = layer.mlp.experts, f"model.layers.{i}.mlp.experts"
        for e in range(experts.num_experts):
            rows = [weights[f"{own}.{e}.{name}.weight"] for name in ("gate_proj", "up_proj")]
            experts.gate_up_proj.data[e] = torch.cat(rows)
            experts.down_proj.data[e] = weights[f"{own}.{e}.down_proj.weight"]
    return model


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


def test_a_mixed_model_runs_as_what_its_weights_stand_for(written, reference):
    model, _ = qmoe.load(written, torch.float32, progress=False)
    assert_close(logits(model), logits(reference))


def test_without_c_kernels(written, reference, monkeypatch):
    monkeypatch.setattr(qmoe.runtime.modules, "uses_cpu_kernels", lambda device: False)
    model, _ = qmoe.load(written, torch.float32, progress=False)
    assert model.model.layers[0].mlp.experts.qmoe_first.scheme.bits == 8
    assert_close(logits(model), logits(reference))


@pytest.mark.slow
def test_in_the_triton_kernels(written, reference, monkeypatch):
    for module in (qmoe.packed.load, qmoe.runtime.modules):
        monkeypatch.setattr(module, "uses_arena", lambda device: True)
    model, _ = qmoe.load(written, torch.float32, progress=False)
    assert isinstance(model.model.layers[0].mlp.experts.qmoe_arena, ArenaStack)
    assert_close(logits(model), logits(reference))


def test_each_matrix_is_stored_in_its_width(written):
    config = json.loads((written / "config.json").read_text())["quantization_config"]
    found = Schemes({"quantization_config": config}, "here")
    own = f"{LAYER}.mlp.experts"
    assert [found.of(f"{own}.{e}.up_proj").bits for e in range(5)] == [2, 3, 4, 8, 2]
    assert found.of(f"{own}.3.down_proj").bits == 8
    assert found.of(f"{LAYER}.self_attn.q_proj").bits == 8
    assert found.of(f"{LAYER}.self_attn.k_proj").bits == 3
    assert found.of("model.layers.1.mlp.experts.0.gate_proj").bits == 3
    assert found.of(f"{LAYER}.mlp.gate") is None
    assert config["format"] == "pack-quantized-mixed"
    tensors = load_file(next(iter(sorted(written.glob("*.safetensors")))))
    packed = [tensors[f"{own}.{e}.up_proj.weight_packed"] for e in range(4)]
    shapes = [tensors[f"{own}.{e}.up_proj.weight_shape"].tolist() for e in range(4)]
    words = [32 * t.shape[1] // k for t, (_, k) in zip(packed, shapes, strict=True)]
    assert words == [2, 3, 4, 8]


@pytest.mark.parametrize("method", ["rtn", slow("gptq")])
def test_a_mixed_run_goes_on_to_the_same_bytes(tmp_path, short, method, monkeypatch):
    config = mixed(method=method)
    qmoe.quantize(short, tmp_path / "whole", config, progress=False)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 1)
        with pytest.raises(KeyboardInterrupt):
            qmoe.quantize(short, tmp_path / "out", config, progress=False)
    qmoe.quantize(short, tmp_path / "out", config, progress=False)
    assert same_files(tmp_path / "whole", tmp_path / "out")


def test_widths_that_are_alike_are_the_scheme(tmp_path, short):
    """Digits that say what the scheme says change nothing."""
    config = QuantConfig("rtn", Scheme(4, 32))
    qmoe.quantize(short, tmp_path / "a", config, progress=False)
    said = QuantConfig("rtn", Scheme(4, 32), widths={FIRST: "4" * 16})
    qmoe.quantize(short, tmp_path / "b", said, progress=False)
    for file in (tmp_path / "a").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()
    configs = [(tmp_path / name / "config.json").read_text() for name in ("a", "b")]
    assert configs[0] == configs[1]


@pytest.mark.slow
def test_tuning_and_distilling_keep_each_width(tmp_path, short):
    qmoe.quantize(short, tmp_path / "out", mixed(tune=2, distill=1), progress=False)
    model, _ = qmoe.load(tmp_path / "out", torch.float32, progress=False)
    assert logits(model).isfinite().all()


@pytest.mark.parametrize("family", [slow("mixtral"), "gpt_oss", slow("deepseek_v3")])
def test_other_layouts(tmp_path, demo, family):
    """Experts that are stored otherwise: other names, one tensor for all, interleaved rows."""
    folder = save_random(family, tmp_path / "m", demo, torch.float32)
    experts = "model.layers.1.mlp.experts"
    count = qmoe.quantize(folder, tmp_path / "q", QuantConfig("rtn", Scheme(4, 32)), progress=False)
    E = {"mixtral": 4, "gpt_oss": 4, "deepseek_v3": 8}[family]
    widths = {f"{experts}.down_proj": ("23" * E)[:E], f"{experts}.gate_up_proj": ("48" * E)[:E]}
    config = QuantConfig("rtn", Scheme(4, 32, False), widths=widths)
    report = qmoe.quantize(folder, tmp_path / "out", config, progress=False)
    assert report["bytes"]["experts packed"] != count["bytes"]["experts packed"]
    model, _ = qmoe.load(tmp_path / "out", torch.float32, progress=False)
    assert logits(model).isfinite().all()


@pytest.mark.parametrize(
    "widths, said",
    [
        ({FIRST: "22"}, "has 16 matrices, and 2 digits were given"),
        ({"model.layers.0.mlp.experts": "2"}, "nothing that is quantized is called"),
        ({f"{LAYER}.self_attn.q_pro": "4"}, f"the nearest is {LAYER}.self_attn.q_proj"),
    ],
)
def test_widths_of_what_is_not_there(tmp_path, short, widths, said):
    with pytest.raises(ConfigError, match=said):
        qmoe.quantize(short, tmp_path / "out", QuantConfig("rtn", widths=widths), progress=False)
    assert list(tmp_path.iterdir()) == []


def test_vllm_takes_one_scheme_for_a_layer(tmp_path, short):
    widths = {FIRST: "2" * 16, SECOND: "2" * 16}
    config = QuantConfig("rtn", Scheme(4, 32), widths=widths, target="vllm")
    report = qmoe.quantize(short, tmp_path / "out", config, progress=False)
    stored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert stored["format"] == "pack-quantized"
    assert any("plain transformers" in line for line in report["fallbacks"])
    for changed in ({SECOND: "4" * 16}, {FIRST: "24" * 8}, {f"{LAYER}.self_attn.q_proj": "4"}):
        config = QuantConfig("rtn", Scheme(4, 32), widths=widths | changed, target="vllm")
        with pytest.raises(ConfigError, match="vllm cannot run what these settings make"):
            qmoe.quantize(short, tmp_path / "other", config, progress=False)


def test_plain_transformers_refuses_a_mixed_model(written, tmp_path):
    """It would decode all experts by one scheme. (Without a producer, qmoe leaves the folder to
    transformers' own loader.)"""
    folder = shutil.copytree(written, tmp_path / "plain")
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]["producer"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="pack-quantized-mixed"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_gate_and_up_of_an_expert_must_be_alike(written, tmp_path):
    folder = shutil.copytree(written, tmp_path / "other")
    config = json.loads((folder / "config.json").read_text())
    for group in config["quantization_config"]["config_groups"].values():
        name, other = (f"{LAYER}.mlp.experts.{e}.up_proj" for e in (0, 1))
        group["targets"] = [target for target in group["targets"] if target != name]
        group["targets"] += [name] if other in group["targets"] else []
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="expert 0 of .*gate and up at once"):
        qmoe.load(folder, progress=False)
