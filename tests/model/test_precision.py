"""What a model's class keeps in float32 is in float32 wherever qmoe loads it, to the last digit.

Values are spread as training spreads them: at an offset of 7 bfloat16 has eight values in all for
the biases by which a router chooses, and a zero bias would hide that.
"""

import json
from dataclasses import replace

import pytest
import torch
from helpers import ONE_DOMAIN, slow
from safetensors.torch import load_file, save_file

import qmoe
from qmoe import QuantConfig, Scheme
from qmoe.checkpoint.model_config import model_class
from qmoe.checkpoint.model_folder import ModelFolder
from qmoe.config import CHANNEL, CalibrationConfig
from qmoe.errors import AuditError, ConfigError
from qmoe.measure.baselines import original
from qmoe.measure.evaluate import evaluate
from qmoe.measure.families import families, save_tiny
from qmoe.measure.family_check import check, check_in_bfloat16, dequantize_into, run
from qmoe.measure.logits import resident, streamed
from qmoe.model import precision
from qmoe.model.skeleton import inputs_of
from qmoe.model.source import open_source
from qmoe.packed.audit import audit_unpacked
from qmoe.packed.load import Loading
from qmoe.packed.skeleton import open_packed

FAMILIES = {family.model_type: family for family in families()}
ROUNDED = QuantConfig("rtn", Scheme(8, CHANNEL), Scheme(8, CHANNEL))
BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"
IDS = torch.arange(1, 65).view(2, 32) * 3

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("quiet")]


def made(family, path, dtype=torch.bfloat16, config=ROUNDED):
    """A tiny model and its quantized folder."""
    save_tiny(FAMILIES[family], path / "source", dtype=dtype)
    report = qmoe.quantize(path / "source", path / "quantized", config, progress=False)
    return path / "source", path / "quantized", report


@torch.no_grad()
@pytest.mark.parametrize(
    "family", ["deepseek_v3", "gpt_oss", slow("jamba"), slow("nemotron_h"), slow("qwen3_next")]
)
def test_routes_and_logits_in_bfloat16_are_transformers(family, tmp_path):
    source, quantized, _ = made(family, tmp_path)
    config = open_packed(ModelFolder(quantized)).model.config
    twin = model_class(config).from_pretrained(source, dtype=torch.float32).eval()
    dequantize_into(twin, quantized, torch.float32)
    inputs = inputs_of(twin, IDS)
    kept, lost = check_in_bfloat16(source, quantized, run(twin, inputs), inputs)
    assert kept >= 0.93 and lost < 0.05


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "family",
    ["afmoe", "bailing_hybrid", "deepseek_v4", "ernie4_5_moe", "hy_v4", "longcat_flash"],
)
def test_originals_have_transformers_dtypes_and_values(family, dtype, tmp_path):
    """As eval streams them and as they write calibration text; the lists for float16 differ."""
    save_tiny(FAMILIES[family], tmp_path, dtype=torch.bfloat16)
    source = open_source(ModelFolder(tmp_path), dtype)
    source.weights.load(source.checkpoint.names(), dtype)
    source.weights.tie()
    twin = model_class(source.model.config).from_pretrained(tmp_path, dtype=dtype)
    for ours, theirs in [
        (source.model.state_dict(), twin.state_dict()),
        (dict(source.model.named_buffers()), dict(twin.named_buffers())),
    ]:
        assert ours.keys() == theirs.keys()
        for name, wanted in theirs.items():
            assert ours[name].dtype == wanted.dtype and torch.equal(ours[name], wanted), name
    assert precision.in_float32(twin, dtype, twin.state_dict()) or dtype == torch.bfloat16


def test_the_streamed_original_chooses_the_experts_of_the_resident_one(tmp_path):
    source, quantized, _ = made("deepseek_v3", tmp_path)
    batches = [("x", IDS)]
    opened = open_source(ModelFolder(source), torch.bfloat16)
    [ours] = streamed(opened, batches, torch.bfloat16)
    [theirs] = resident(original(ModelFolder(source)), batches)
    assert torch.equal(ours, theirs)
    result = evaluate(quantized, against=source, text=ONE_DOMAIN, samples=1, seqlen=32,
                      loading=Loading(activations="bf16"))  # fmt: skip
    assert result["overall"]["qmoe"]["kl"] < 0.2


def test_a_rounded_bias_does_not_pass_the_audit(tmp_path, monkeypatch):
    _, quantized, _ = made("deepseek_v3", tmp_path)
    model, _ = qmoe.load(quantized, progress=False)
    assert model.get_buffer(BIAS).dtype == torch.float32
    assert len(model.get_buffer(BIAS).unique()) == 6
    monkeypatch.setattr("qmoe.model.skeleton.keep_in_float32", lambda model, dtype: None)
    with pytest.raises(AuditError, match="is torch.bfloat16, its class keeps it in float32"):
        qmoe.load(quantized, progress=False)


def test_the_audit_compares_values_with_what_is_stored(tmp_path):
    _, quantized, _ = made("gpt_oss", tmp_path)
    source = open_packed(ModelFolder(quantized))
    source.model = qmoe.load(quantized, progress=False)[0]
    audit_unpacked(source, "here")
    biases = source.model.get_submodule("model.layers.0.mlp.experts").qmoe_first_bias
    for tensor in (biases, source.model.model.norm.weight):
        before = tensor.clone()
        tensor.view(-1)[3] += 1
        with pytest.raises(AuditError, match="is not what is stored"):
            audit_unpacked(source, "here")
        tensor.copy_(before)
    audit_unpacked(source, "here")


def test_numbers_that_a_dtype_does_not_have_are_refused(tmp_path):
    _, quantized, _ = made("qwen3_moe", tmp_path)
    [shard] = [f for f in quantized.glob("*.safetensors") if "model.norm.weight" in load_file(f)]
    tensors = load_file(shard)
    tensors["model.norm.weight"][0] = 1e5
    save_file(tensors, shard, {"format": "pt"})
    with pytest.raises(ConfigError, match=r"model.norm.weight .*torch.float16.*bfloat16"):
        qmoe.load(quantized, torch.float16, progress=False)
    qmoe.load(quantized, progress=False)


def test_linears_that_the_class_keeps_are_not_quantized(tmp_path):
    report = check(FAMILIES["deepseek_v32"], tmp_path, replace(ROUNDED, experts=Scheme(8, 32)))
    name = "model.layers.0.self_attn.indexer.weights_proj"
    assert f"{name}: not quantized, its class keeps it in float32" in report["fallbacks"]
    assert (
        name
        in json.loads((tmp_path / "quantized" / "config.json").read_text())["quantization_config"][
            "ignore"
        ]
    )
    model, _ = qmoe.load(tmp_path / "quantized", torch.float16, progress=False)
    assert model.get_submodule(name).weight.dtype == torch.float32


def test_a_head_that_the_class_keeps_is_not_quantized(tmp_path):
    save_tiny(FAMILIES["hy_v4"], tmp_path / "source")
    config = replace(ROUNDED, lm_head=Scheme(8, CHANNEL))
    with pytest.raises(ConfigError, match="class keeps it in float32; leave lm_head out"):
        qmoe.quantize(tmp_path / "source", tmp_path / "quantized", config, progress=False)


def test_a_loaded_model_stays_in_its_dtype(tmp_path):
    _, quantized, _ = made("deepseek_v3", tmp_path)
    model, _ = qmoe.load(quantized, progress=False)
    for change in (model.half, model.float, lambda: model.to(torch.float16)):
        with pytest.raises(ConfigError, match="load it again with dtype=torch"):
            change()
    assert model.to("cpu") is model and model.bfloat16() is model
    assert model.to(dtype=torch.bfloat16, device="cpu") is model
    assert model.get_buffer(BIAS).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_without_a_dtype_in_the_config_the_weights_tell_it(dtype, tmp_path):
    source, quantized, _ = made("qwen3_moe", tmp_path, dtype)
    config = json.loads((quantized / "config.json").read_text())
    del config["dtype"]
    (quantized / "config.json").write_text(json.dumps(config))
    assert qmoe.load(quantized, progress=False)[0].model.norm.weight.dtype == dtype


def test_tuning_does_not_round_what_is_stored_in_float32(tmp_path):
    text = CalibrationConfig(ONE_DOMAIN, samples=4, seqlen=32, self_samples=0)
    config = QuantConfig(experts=Scheme(4, 32), search_grid=False, tune=2, calibration=text)
    source, quantized, _ = made("ernie4_5_moe", tmp_path, config=config)
    name = "model.layers.1.mlp.gate.weight"
    before, after = {}, {}
    for folder, tensors in ((source, before), (quantized, after)):
        for file in folder.glob("*.safetensors"):
            tensors |= load_file(file)
    assert after[name].dtype == before[name].dtype == torch.float32
    assert not torch.equal(after[name], before[name])
    assert not torch.equal(after[name], after[name].bfloat16().float())
