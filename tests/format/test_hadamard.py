"""Rotated weights: the transform itself, models that hold them, and what says so on disk."""

import json

import pytest
import torch
from helpers import ONE_DOMAIN, assert_close, first_layers, save_random, slow
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import qmoe
import qmoe.runtime.modules
from qmoe import CalibrationConfig, QuantConfig, Scheme
from qmoe.checkpoint.model_folder import ModelFolder
from qmoe.errors import CheckpointError, ConfigError
from qmoe.format.compressed_tensors import Schemes, unpacked_tensors
from qmoe.format.grid import dequantize
from qmoe.format.hadamard import block_for, rotate, rotate_moments
from qmoe.measure.baselines import rounded_to_nearest
from qmoe.measure.families import families
from qmoe.measure.family_check import check
from qmoe.packed.audit import audit_folder
from qmoe.solvers.awq import output_error
from qmoe.solvers.solve import solve

LITTLE = CalibrationConfig(text=ONE_DOMAIN, samples=8, seqlen=64, self_samples=0)


def test_rotation_is_the_normalized_hadamard_matrix_in_blocks():
    R = rotate(torch.eye(12), 4)
    block = torch.tensor([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]) / 2
    assert torch.equal(R, torch.block_diag(block, block, block))
    x = torch.randn(5, 12)
    assert_close(rotate(rotate(x, 4), 4), x)
    assert rotate(x, 0) is x
    H = x.T @ x
    assert_close(rotate_moments(H, 4), rotate(x, 4).T @ rotate(x, 4))


def test_16_bits_rotate_without_a_bias():
    """The square root of 128 is no number of bfloat16: scaling by it must not change the size."""
    x = torch.randn(4096, 128)
    ratio = rotate(x.bfloat16(), 128).double().square().mean() / x.double().square().mean()
    assert abs(float(ratio) - 1) < 5e-4


@pytest.mark.parametrize("sizes, block", [([2048, 768], 256), ([64, 96], 32), ([64, 33], 1)])
def test_the_largest_block_that_divides_all(sizes, block):
    assert block_for(sizes) == block


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_weights_with_outliers_lose_less(method):
    W, x = torch.randn(2, 16, 64), torch.randn(2, 200, 64)
    W[:, :, 3] *= 30
    x[:, :, 3] /= 30
    H, lost = x.mT @ x, []
    for scheme in (Scheme(4, 64, False), Scheme(4, 64, False, rotation=64)):
        made = solve(
            W, H, scheme, method,
            scale_dtype=torch.float32, act_order=True, damp=0.01, search_grid=True,
        )  # fmt: skip
        assert made.quantized.scheme == scheme
        error = output_error(dequantize(made.quantized) - W, H) / output_error(W, H)
        assert_close(torch.tensor(made.error), error.sqrt(), most=1e-2, rms=1e-2)
        lost.append(error)
    assert (lost[1] < 0.5 * lost[0]).all()


@pytest.mark.parametrize(
    "family", [slow("qwen3_moe"), slow("qwen2_moe"), "deepseek_v3", slow("gpt_oss"), slow("llama4")]
)
def test_a_reloaded_model_equals_the_one_with_dequantized_weights(family, tmp_path):
    """Shared experts, grouped routing, biases, experts stored transposed and interleaved."""
    config = QuantConfig(
        experts=Scheme(4, 32, False), dense=Scheme(8, -1), search_grid=False, rotate="online",
        calibration=LITTLE,
    )  # fmt: skip
    (known,) = [f for f in families() if f.model_type == family]
    report = check(known, tmp_path, config)
    assert report["rotated"] and report["bytes"]["experts 16-bit"] == 0
    assert report["config"]["experts"]["rotation"] == report["config"]["dense"]["rotation"] >= 16


def test_a_tuned_model_and_its_lm_head(tmp_path, demo):
    """Tuning changes norms and routers too, so the other model is made of all that was written."""
    save_random("qwen3_moe", tmp_path / "source", demo, torch.float32)
    config = QuantConfig(
        experts=Scheme(4, 32, False), dense=Scheme(8, -1), lm_head=Scheme(8, 64), search_grid=False,
        tune=3, rotate="online", calibration=LITTLE,
    )  # fmt: skip
    qmoe.quantize(tmp_path / "source", tmp_path / "out", config, progress=False)
    model, _ = qmoe.load(tmp_path / "out", progress=False)
    schemes = Schemes(json.loads((tmp_path / "out" / "config.json").read_text()), "here")
    stored: dict[str, torch.Tensor] = {}
    for file in (tmp_path / "out").glob("*.safetensors"):
        stored |= load_file(file)
    tensors = {n: t.contiguous() for n, t in unpacked_tensors(stored, schemes).items()}
    save_file(tensors, tmp_path / "source" / "model.safetensors", metadata={"format": "pt"})
    twin = AutoModelForCausalLM.from_pretrained(tmp_path / "source", dtype=torch.float32)
    ids = torch.randint(4096, (2, 16), generator=torch.Generator().manual_seed(1))
    assert model.lm_head.rotation >= 32
    with torch.no_grad():
        assert_close(model(ids).logits, twin(ids).logits, most=1e-3, rms=1e-4)


def test_rounding_it_is_compared_with_is_not_rotated(folder):
    with rounded_to_nearest(folder, ModelFolder(folder.parent / "source")) as twin:
        assert "transform_config" not in (twin.path / "config.json").read_text()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, demo):
    """One trained layer, symmetric, experts alone, by the command's own route."""
    path = tmp_path_factory.mktemp("rotated")
    first_layers(demo, path / "source", 1)
    config = QuantConfig(
        experts=Scheme(4, 32), dense=None, search_grid=False, rotate="online", calibration=LITTLE
    )
    qmoe.quantize(path / "source", path / "out", config, progress=False)
    return path / "out"


def test_what_config_json_says(folder):
    """Golden: compressed-tensors' terms, for experts alone."""
    entry = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert {entry["format"], *(g["format"] for g in entry["config_groups"].values())} == {
        "pack-quantized-rotated"
    }
    (scheme,) = entry["transform_config"]["config_groups"].values()
    targets = [r"re:.*\.experts\.(expert_)?\d+\..*"]
    ignore = entry["ignore"]
    assert scheme["type"] == "hadamard" and not scheme["randomize"] and scheme["head_dim"] >= 32
    assert scheme["apply"] == [
        {"targets": targets, "location": "input", "inverse": False, "ignore": ignore},
        {"targets": targets, "location": "weight_input", "inverse": True, "ignore": ignore},
    ]


def test_its_folder_passes_the_audit_and_loads_rotated(folder):
    model, _ = qmoe.load(folder, progress=False)
    assert model.model.layers[0].mlp.experts.qmoe_rotations[0] >= 32
    digests = json.loads((folder / "qmoe_report.json").read_text())["digests"]
    audit_folder(ModelFolder(folder), digests)


@pytest.mark.parametrize(
    "change",
    [
        {"type": "random-hadamard"},
        {"randomize": True},
        {"head_dim": 48},
        {"head_dim": None},
        {"apply": []},
        {"unknown": 1},
    ],
)
def test_other_transforms_are_refused(folder, change):
    """They used to be ignored, which loads a model that talks nonsense."""
    config = json.loads((folder / "config.json").read_text())
    groups = config["quantization_config"]["transform_config"]["config_groups"]
    next(iter(groups.values())).update(change)
    with pytest.raises(CheckpointError, match="transform"):
        Schemes(config, "here")


@pytest.mark.parametrize("lost", ["transform_config", "format"])
def test_rotated_weights_are_never_taken_for_plain_ones(folder, lost):
    config = json.loads((folder / "config.json").read_text())
    entry = config["quantization_config"]
    entry |= (
        {"transform_config": None} if lost == "transform_config" else {"format": "pack-quantized"}
    )
    with pytest.raises(CheckpointError, match="transform"):
        Schemes(config, "here")


def test_what_cannot_be_rotated(tmp_path, demo):
    with pytest.raises(ConfigError, match="AWQ"):
        QuantConfig(method="awq", search_grid=False, refit=False, rotate="online")
    with pytest.raises(ConfigError, match="power of two"):
        Scheme(4, 32, rotation=48)
    with pytest.raises(ConfigError, match="same block"):
        QuantConfig(experts=Scheme(4, 32, rotation=32))
    config = QuantConfig(experts=Scheme(4, 32, rotation=1 << 12), dense=None, calibration=LITTLE)
    with pytest.raises(ConfigError, match="do not divide"):
        qmoe.quantize(demo, tmp_path / "out", config, progress=False)


def test_the_kernels_give_what_torchs_form_gives(folder, monkeypatch):
    """The activation is not fused into a kernel, as a rotation follows it."""
    ids = torch.arange(60, 65)[None]
    plain, _ = qmoe.load(folder, torch.float32, progress=False)
    monkeypatch.setattr(qmoe.runtime.modules, "uses_arena", lambda device: True)
    packed, _ = qmoe.load(folder, torch.float32, progress=False)
    assert packed.model.layers[0].mlp.experts.qmoe_arena.activation is None
    with torch.no_grad():
        assert_close(packed(input_ids=ids).logits, plain(input_ids=ids).logits)
