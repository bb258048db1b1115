"""The audit finds what was tampered with, after quantizing and after loading."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import qmoe
from qmoe.checkpoint.model_folder import ModelFolder
from qmoe.cli.main import main
from qmoe.errors import AuditError, CheckpointError
from qmoe.packed.audit import audit_folder, audit_model


@pytest.fixture
def folder(quantized_short, tmp_path):
    return shutil.copytree(quantized_short, tmp_path / "q")


def tamper(folder, change, shard="model-00002-of-00003.safetensors"):
    tensors = load_file(folder / shard)
    change(tensors)
    save_file(tensors, folder / shard, metadata={"format": "pt"})
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"] = {n: f for n, f in index["weight_map"].items() if f != shard}
    index["weight_map"] |= dict.fromkeys(tensors, shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


EXPERT = "model.layers.1.mlp.experts.3.down_proj"


def test_every_byte_has_a_kind(quantized_short):
    audit = audit_folder(ModelFolder(quantized_short))
    stored = {}
    for file in quantized_short.glob("*.safetensors"):
        stored |= load_file(file)
    assert sum(audit.bytes.values()) == sum(t.nbytes for t in stored.values())
    kinds = audit.bytes
    weights = 2 * 16 * 3 * 256 * 128  # layers, experts, matrices of an expert
    assert kinds["experts packed"] == weights // 2
    assert kinds["experts packed"] + kinds["experts scales"] <= 0.28 * 2 * weights
    assert kinds["router"] == 2 * 16 * 256 * 2
    assert kinds["embeddings"] == 4096 * 256 * 2
    assert kinds["experts 16-bit"] == kinds["dense 16-bit"] == 0


@pytest.mark.parametrize(
    "change, finding",
    [
        (
            lambda t: t.pop(f"{EXPERT}.weight_scale"),
            r"missing: .*down_proj_scale: has 15 of 16 tensors",
        ),
        (
            lambda t: t[f"{EXPERT}.weight_scale"].fill_(float("nan")),
            "holds NaN or Inf: .*weight_scale",
        ),
        (lambda t: t[f"{EXPERT}.weight_scale"].fill_(0), "a scale that is not positive"),
        (lambda t: t.update({"model.layers.1.extra": torch.ones(1)}), "belongs to no parameter"),
        (
            lambda t: t.update(
                {f"{EXPERT}.weight_packed": t[f"{EXPERT}.weight_packed"][:, :2].contiguous()}
            ),
            "down_proj.weight_packed: has shape",
        ),
        (lambda t: t.pop("model.layers.1.input_layernorm.weight"), "missing: .*input_layernorm"),
    ],
)
def test_tampering_with_the_folder_is_found(folder, change, finding):
    tamper(folder, change)
    with pytest.raises((AuditError, CheckpointError), match=finding):
        audit_folder(ModelFolder(folder))
    with pytest.raises((AuditError, CheckpointError)):
        qmoe.load(folder, progress=False)


def test_bytes_other_than_those_solved_are_found(folder, capsys):
    tamper(folder, lambda t: t[f"{EXPERT}.weight_packed"].fill_(0))
    assert main(["inspect", str(folder)]) == 1
    expected = "decodes to other weights than were solved: model.layers.1.mlp.experts.down_proj"
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize(
    "change, finding",
    [
        (lambda t: t.half(), "not the one that was written"),
        (lambda t: t + 1, "not the one that was written"),
        (lambda t: t[:128].clone(), r"has shape \(128,\), the model needs \(256,\)"),
        (lambda t: t.short(), "is stored as torch.int16, the model needs torch.float32"),
        (lambda t: t.int(), "is stored as torch.int32, the model needs torch.float32"),
    ],
)
def test_damage_to_what_is_not_packed_is_found(folder, change, finding, capsys):
    name = "model.layers.1.input_layernorm.weight"
    tamper(folder, lambda t: t.update({name: change(t[name])}))
    assert main(["inspect", str(folder)]) == 1
    assert re.search(finding, capsys.readouterr().err)


def test_a_damaged_generation_config_is_named(folder):
    (folder / "generation_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="bad generation_config.json"):
        qmoe.load(folder, progress=False)


def test_a_wrong_weight_shape_is_found(folder):
    def change(tensors):
        tensors[f"{EXPERT}.weight_shape"] = torch.tensor([128, 256])

    tamper(folder, change)
    with pytest.raises(CheckpointError, match=r"layers.1.mlp.experts.down_proj: weight_shape says"):
        qmoe.load(folder, progress=False)


def test_an_unpacked_expert_in_memory_is_found(quantized_short):
    model, _ = qmoe.load(quantized_short, progress=False)
    audit_model(model, "here")
    module = model.model.layers[1].mlp.experts
    delattr(module, "qmoe_arena" if hasattr(module, "qmoe_arena") else "qmoe_first")
    with pytest.raises(AuditError, match="routed experts not packed|layers.1.mlp.experts"):
        audit_model(model, "here")


def test_a_parameter_without_data_is_found(quantized_short):
    model, _ = qmoe.load(quantized_short, progress=False)
    model.model.norm.weight = torch.nn.Parameter(torch.empty(256, device="meta"))
    with pytest.raises(AuditError, match="has no data: model.norm.weight"):
        audit_model(model, "here")


def test_no_routed_expert_is_left_in_16_bits_in_memory(quantized_short):
    model, _ = qmoe.load(quantized_short, progress=False)
    kinds = audit_model(model, "here").bytes
    assert kinds["experts packed"] == 2 * 16 * 3 * 256 * 128 // 2
    assert kinds["experts 16-bit"] == kinds["dense 16-bit"] == 0
