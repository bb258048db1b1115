"""A rotation fused into the weights around the residual stream: the same model, other numbers."""

import json
from itertools import product

import pytest
import torch
from helpers import (
    ONE_DOMAIN,
    assert_close,
    interrupt_after,
    mostly_slow,
    same_files,
    save_random,
    slow,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import qmoe
from qmoe import CalibrationConfig, QuantConfig, Scheme
from qmoe.checkpoint.model_folder import ModelFolder
from qmoe.errors import CalibrationError, ConfigError, UnsupportedModelError
from qmoe.format.hadamard import rotate
from qmoe.measure.evaluate import evaluate
from qmoe.measure.families import families, save_tiny
from qmoe.measure.family_check import check
from qmoe.model.source import open_source
from qmoe.pipeline.checks import estimate_bytes
from qmoe.rotation.find_rotation import find_fused_rotation
from qmoe.rotation.fused_rotation import turn

LITTLE = CalibrationConfig(text=ONE_DOMAIN, samples=4, seqlen=64, batch=2, self_samples=0)
CONFIG = QuantConfig(
    experts=Scheme(4, 32),
    dense=Scheme(8, -1),
    search_grid=False,
    rotate="fused",
    calibration=LITTLE,
)
IDS = torch.arange(1, 33).view(2, 16) * 15


def family(name):
    (known,) = [f for f in families() if f.model_type == name]
    return known


def quantize(source, out, **changes):
    config = QuantConfig(**{**vars(CONFIG), **changes})
    return qmoe.quantize(source, out, config, progress=False)


@pytest.mark.parametrize("H", [1, 12, 96, 768, 2048])
def test_it_is_a_hadamard_matrix_with_signs(H):
    R, block = turn(torch.eye(H)), H & -H
    assert_close(R @ R.T, torch.eye(H))
    one = torch.ones(1, 1)
    while len(one) < block:
        one = torch.cat([torch.cat([one, one], 1), torch.cat([one, -one], 1)])
    signs = R[:, :1].sign() if block == H else R[:, ::block].sum(1, keepdim=True).sign()
    assert_close(R * signs, torch.block_diag(*[one * block**-0.5] * (H // block)))
    assert H < 12 or 0 < int((signs > 0).sum()) < H
    if block <= 256:
        assert torch.equal(turn(torch.eye(H) * signs), rotate(torch.eye(H), block))


NAMES = ["qwen3_moe", "qwen2_moe", "deepseek_v3", "gpt_oss", "llama4_text", "qwen3_next"]


@pytest.mark.parametrize("name", mostly_slow([(n,) for n in NAMES], lambda n: n == "gpt_oss"))
def test_a_reloaded_model_equals_the_one_with_what_was_written(name, tmp_path):
    """Shared experts, biases, latent attention, transposed and interleaved experts, norms of 1 + w,
    linear attention."""
    report = check(family(name), tmp_path, CONFIG)
    assert not report["rotated"] and report["bytes"]["experts 16-bit"] == 0
    entry = json.loads((tmp_path / "quantized" / "config.json").read_text())["quantization_config"]
    assert entry["format"] == "pack-quantized" and "transform_config" not in entry


@pytest.mark.parametrize(
    "name, tied",
    mostly_slow(
        [*product(("qwen3_moe", "gpt_oss", "qwen3_next"), (False, True))],
        lambda name, tied: (name, tied) == ("qwen3_moe", True),
    ),
)
def test_it_is_the_original_up_to_rounding(name, tied, tmp_path):
    """In 8 bits it differs from the original by about as much as without a rotation."""
    save_tiny(family(name), tmp_path / "source")
    path = tmp_path / "source" / "config.json"
    config = json.loads(path.read_text()) | {"tie_word_embeddings": tied}
    path.write_text(json.dumps(config))
    if tied:
        file = tmp_path / "source" / "model.safetensors"
        tensors = {n: t for n, t in load_file(file).items() if n != "lm_head.weight"}
        save_file(tensors, file, metadata={"format": "pt"})
    original = AutoModelForCausalLM.from_pretrained(tmp_path / "source", dtype=torch.float32)
    lost = {}
    for way in ("off", "fused"):
        report = quantize(
            tmp_path / "source",
            tmp_path / way,
            rotate=way,
            experts=Scheme(8, 32),
            method="rtn",
            refit=False,
        )
        model, _ = qmoe.load(tmp_path / way, progress=False)
        with torch.no_grad():
            found, wanted = model(IDS).logits, original(IDS).logits
        error = (found - wanted).norm(dim=-1) / wanted.norm(dim=-1)
        lost[way] = float(error.median())
    assert lost["fused"] < 2 * lost["off"] < 0.1
    stored = {}
    for file in (tmp_path / "fused").glob("*.safetensors"):
        stored |= load_file(file)
    assert "lm_head.weight" in stored
    assert any("lm_head" in line for line in report["fallbacks"]) == tied
    assert json.loads((tmp_path / "fused" / "config.json").read_text())["tie_word_embeddings"] is (
        False
    )
    norms = [
        v for n, v in stored.items() if n.endswith(("input_layernorm.weight", "model.norm.weight"))
    ]
    assert len(norms) >= 3 and all(len(v.unique()) == 1 and v[0] in (0, 1) for v in norms)


def test_all_that_changed_is_written_in_its_own_dtype(tmp_path, demo):
    """Also linears that are left in 16 bits, and tuned norms and routers."""
    source = save_random("qwen2_moe", tmp_path / "source", demo, torch.bfloat16)
    quantize(source, tmp_path / "out", dense=None, tune=2, lm_head=Scheme(8, 64))
    before, after = load_file(source / "model.safetensors"), {}
    for file in (tmp_path / "out").glob("*.safetensors"):
        after |= load_file(file)
    changed = {n for n in before if n in after and not torch.equal(before[n], after[n])}
    assert {after[n].dtype for n in changed} == {torch.bfloat16}
    unchanged = {n.removesuffix(".bias")[-6:] for n in after if n in before and n not in changed}
    assert unchanged == {"q_proj", "k_proj", "v_proj"}


@pytest.mark.parametrize(
    "name, changes",
    mostly_slow(
        [
            ("qwen3_moe", {"tune": 2}),
            ("qwen3_moe", {"dense": None}),
            ("gpt_oss", {"lm_head": Scheme(8, 64)}),
        ],
        lambda name, changes: "dense" in changes,
    ),
)
def test_a_run_goes_on_to_the_same_bytes(name, changes, tmp_path, demo, monkeypatch):
    """Also where what is not packed is rounded to 16 bits: the layers behind it must see that."""
    source = save_random(name, tmp_path / "source", demo, torch.bfloat16)
    quantize(source, tmp_path / "whole", **changes)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        interrupt_after(patched, 1)
        quantize(source, tmp_path / "out", **changes)
    quantize(source, tmp_path / "out", **changes)
    assert same_files(tmp_path / "whole", tmp_path / "out")


def test_statistics_of_another_stream_are_refused(tmp_path, demo):
    source = save_random("mixtral", tmp_path / "source", demo, torch.float32)
    qmoe.quantize(
        source, tmp_path / "out", QuantConfig(**{**vars(CONFIG), "refit": False}),
        save_statistics=tmp_path / "stats", progress=False,
    )  # fmt: skip
    for way, good in (("fused", True), ("off", False)):
        config = QuantConfig(**{**vars(CONFIG), "refit": False, "rotate": way})

        def again(config=config, way=way):
            qmoe.quantize(
                source, tmp_path / way, config,
                statistics_from=[tmp_path / "stats"], progress=False,
            )  # fmt: skip

        if good:
            again()
        else:
            with pytest.raises(CalibrationError, match="another stream: rotated"):
                again()
            assert not (tmp_path / way).exists()


@pytest.mark.parametrize(
    "name, complaint",
    [
        ("dbrx", "LayerNorm.*no RMSNorm"),
        ("switch_transformers", "an encoder and a decoder"),
        slow("gemma4_text", r"layers\.0"),
        slow("jetmoe", "modules of their own"),
        slow("longcat_flash", "identity experts"),
        # Beyond the tokens it looks at.
        slow("dots3_note_text", r"layers\.0: rotate fused: differs"),
        slow("qwen3_vl_moe", "visual.* is not called for text"),
    ],
)
def test_what_cannot_be_rotated_is_refused_by_name(name, complaint, tmp_path):
    save_tiny(family(name), tmp_path / "source")
    with pytest.raises(UnsupportedModelError, match=f"{complaint}.*--rotate online"):
        quantize(tmp_path / "source", tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("tied", [None, slow(False), slow(True)])
def test_it_can_be_compared_with_its_original(tied, tmp_path, demo):
    source = save_random(
        "mixtral", tmp_path / "source", demo, torch.float32, tie_word_embeddings=tied is True
    )
    path = source / "config.json"
    config = json.loads(path.read_text())
    if tied is None:
        del config["tie_word_embeddings"]
    path.write_text(json.dumps(config))
    quantize(source, tmp_path / "out", experts=Scheme(8, 32), method="rtn", refit=False)
    found = evaluate(tmp_path / "out", against=source, text=ONE_DOMAIN, samples=1, seqlen=32)
    assert 0 < found["overall"]["qmoe"]["kl"] < 0.05


def test_what_matters_to_no_token_at_hand_gets_more_of_them(tmp_path, monkeypatch):
    """An indexer that chooses 32 of 32 tokens could be rotated wrongly unseen."""
    save_tiny(family("deepseek_v32"), tmp_path / "source")
    source = open_source(ModelFolder(tmp_path / "source"), torch.float32)
    with torch.no_grad():
        assert "lm_head" in find_fused_rotation(source).outside.norms["model.norm"].readers
        assert all(p.is_meta for p in source.model.parameters())
        monkeypatch.setattr("qmoe.rotation.find_rotation.LENGTHS", (32,))
        with pytest.raises(UnsupportedModelError, match="indexer.*does not matter to 32 tokens"):
            find_fused_rotation(source)


@pytest.mark.parametrize("tied", [False, True])
def test_a_head_that_is_added_is_counted_beforehand(tied, tmp_path, demo):
    folder = save_random("mixtral", tmp_path / "s", demo, torch.float32, tie_word_embeddings=tied)
    source = open_source(ModelFolder(folder), torch.float32)
    off = QuantConfig(**{**vars(CONFIG), "rotate": "off"})
    added = estimate_bytes(source, CONFIG) - estimate_bytes(source, off)
    assert added == tied * source.checkpoint.tensor_bytes("model.embed_tokens.weight")
    assert source.adds_lm_head(CONFIG) == tied and not source.adds_lm_head(off)


def test_settings_that_exclude_it():
    with pytest.raises(ConfigError, match="AWQ"):
        QuantConfig(method="awq", search_grid=False, refit=False, rotate="fused")
    with pytest.raises(ConfigError, match="online"):
        QuantConfig(experts=Scheme(rotation=64), dense=None, rotate="fused")


def test_a_wrong_guess_is_noticed(tmp_path, demo, monkeypatch):
    """What is found is proved: with a writer left out, the layer is named."""
    folder = save_random("mixtral", tmp_path / "s", demo, torch.float32)
    source = open_source(ModelFolder(folder), torch.float32)
    monkeypatch.setattr("qmoe.rotation.find_rotation.is_experts", lambda module: False)
    with torch.no_grad(), pytest.raises(UnsupportedModelError, match=r"layers\.0: .*differs"):
        find_fused_rotation(source)
