"""Whole models of several families: quantize, reload, and compare with clients nobody here wrote.

Weights are kept in float32 so that every comparison can be tight.
"""

import json
import subprocess
import sys
from itertools import product

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from helpers import FAMILIES, ONE_DOMAIN, assert_close, mostly_slow, save_random, slow
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import qmoe
from qmoe import CalibrationConfig, QuantConfig, Scheme

# gpt-oss stores its experts fused: plain transformers has no names for them.
FEW = ("deepseek_v3", "qwen2_moe")
NAMED = [family for family in FAMILIES if family != "gpt_oss"]
CALIBRATION = CalibrationConfig(ONE_DOMAIN, samples=6, seqlen=64, batch=2, self_samples=0)
IDS = torch.arange(1, 33).view(2, 16) * 37

# A line read is a model's folder, a line written what went wrong with it, or nothing.
PLAIN_CLIENT = """
import sys, torch
from transformers import AutoModelForCausalLM

def run(folder):
    assert not [m for m in sys.modules if m.startswith("qmoe")]
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["mismatched_keys"], info
    assert not [k for k in info["unexpected_keys"] if "expert" in k], info
    with torch.no_grad():
        torch.save(model(input_ids=torch.load(f"{folder}/ids.pt")).logits, f"{folder}/logits.pt")

for line in sys.stdin:
    try:
        run(line.strip())
        print(flush=True)
    except Exception as error:
        print(repr(f"{type(error).__name__}: {error}"), flush=True)
"""


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """`plain(folder)` has a process that knows nothing of qmoe load a model and compute logits.

    Returns them, or None, and all that the process said. It is one process for all models, since
    most of its time would go into its imports.
    """
    said = tmp_path_factory.mktemp("plain") / "said"
    command = [sys.executable, "-P", "-W", "ignore", "-c", PLAIN_CLIENT]

    def ask(folder):
        torch.save(IDS, folder / "ids.pt")
        before = said.stat().st_size
        client.stdin.write(f"{folder}\n")
        client.stdin.flush()
        error = client.stdout.readline()
        assert error, said.read_text()  # it ended
        told = said.read_bytes()[before:].decode() + error.strip()
        return None if error.strip() else torch.load(folder / "logits.pt"), told

    with (
        said.open("w") as stderr,
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True
        ) as client,
    ):
        yield ask


def quantize(family, tmp_path, demo, **settings):
    source = save_random(family, tmp_path / "source", demo, torch.float32)
    config = QuantConfig(**{"search_grid": False, "calibration": CALIBRATION, **settings})
    report = qmoe.quantize(source, tmp_path / "quantized", config, progress=False)
    return source, tmp_path / "quantized", report


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def dequantized_twin(source, quantized, path):
    """The source folder with every quantized weight replaced by what compressed-tensors unpacks."""
    config = json.loads((quantized / "config.json").read_text())["quantization_config"]
    known = {k: v for k, v in config.items() if k in QuantizationConfig.model_fields}
    groups = list(QuantizationConfig.model_validate(known).config_groups.values())
    tensors = {}
    for file in quantized.glob("*.safetensors"):
        tensors |= load_file(file)
    plain = {}
    for name, tensor in tensors.items():
        if name.endswith(".weight_packed"):
            module = name.removesuffix("_packed").removesuffix(".weight")
            routed = ".experts." in module
            scheme = groups[0] if routed or len(groups) == 1 else groups[-1]
            local = {
                s: tensors[f"{module}.{s}"]
                for s in ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape")
                if f"{module}.{s}" in tensors
            }
            unpack = BaseCompressor.get_value_from_registry("pack-quantized").decompress
            plain[f"{module}.weight"] = unpack(local, scheme)["weight"].contiguous()
        elif not name.endswith(("_scale", "_zero_point", "_shape")):
            plain[name] = tensor
    path.mkdir()
    save_file(plain, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text((source / "config.json").read_text())
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


@pytest.mark.parametrize(
    "family, symmetric",  # below plain transformers loads the symmetric ones
    mostly_slow([*product(NAMED, (True, False))], lambda f, s: not s and f in FEW),
)
def test_reloaded_equals_the_model_with_dequantized_weights(family, symmetric, tmp_path, demo):
    source, quantized, report = quantize(
        family, tmp_path, demo, experts=Scheme(4, 32, symmetric), dense=Scheme(8, -1, symmetric)
    )
    model, _ = qmoe.load(quantized, progress=False)
    assert_close(logits(model), logits(dequantized_twin(source, quantized, tmp_path / "twin")))
    assert report["bytes"]["experts 16-bit"] == report["bytes"]["dense 16-bit"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("family", NAMED)
def test_plain_transformers_gives_the_same_logits_without_qmoe(family, tmp_path, demo, plain):
    _, quantized, report = quantize(family, tmp_path, demo, experts=Scheme(4, 32))
    assert report["symmetric"]
    model, _ = qmoe.load(quantized, progress=False)
    found, told = plain(quantized)
    assert found is not None, told[-3000:]
    assert_close(logits(model), found)


@pytest.mark.parametrize("bits", [slow(2), 3, slow(8)])
def test_plain_transformers_loads_other_widths(bits, tmp_path, demo, plain):
    _, quantized, _ = quantize("mixtral", tmp_path, demo, experts=Scheme(bits, 32))
    model, _ = qmoe.load(quantized, progress=False)
    found, told = plain(quantized)
    assert found is not None, told[-3000:]
    assert_close(logits(model), found)


@pytest.mark.parametrize(
    "experts, dense, complaint",
    [
        (Scheme(4, 32, False), Scheme(8, -1), "conversion"),  # it drops experts' zero points
        (Scheme(4, 32), Scheme(4, 64, False), "MISMATCH"),  # it expects unpacked zero points
    ],
)
def test_plain_transformers_refuses_zero_points_loudly(
    experts, dense, complaint, tmp_path, demo, plain
):
    """transformers 5.23 cannot load them: it must raise, never load something else."""
    _, quantized, report = quantize("qwen3_moe", tmp_path, demo, experts=experts, dense=dense)
    assert not report["symmetric"]
    found, told = plain(quantized)
    assert found is None and complaint in told


def test_plain_transformers_refuses_rotated_weights_loudly(tmp_path, demo, plain):
    """It knows nothing of transform_config and would multiply them with inputs that are not."""
    _, quantized, report = quantize(
        "qwen3_moe", tmp_path, demo, experts=Scheme(4, 32), rotate="online"
    )
    assert report["symmetric"] and report["rotated"]
    found, told = plain(quantized)
    assert found is None and "pack-quantized-rotated" in told


@pytest.mark.parametrize("tied", [slow(False), True])
def test_plain_transformers_loads_a_fused_rotation(tied, tmp_path, demo, plain):
    source = save_random(
        "qwen3_moe", tmp_path / "source", demo, torch.float32, tie_word_embeddings=tied
    )
    config = QuantConfig(
        search_grid=False, calibration=CALIBRATION, experts=Scheme(4, 32), rotate="fused"
    )
    qmoe.quantize(source, tmp_path / "quantized", config, progress=False)
    model, _ = qmoe.load(tmp_path / "quantized", progress=False)
    found, told = plain(tmp_path / "quantized")
    assert found is not None, told[-3000:]
    assert_close(logits(model), found)


@pytest.mark.parametrize("dense", [Scheme(4, 32), slow(Scheme(8, -1)), slow(None)], ids=str)
def test_lm_head_can_be_quantized(dense, tmp_path, demo, plain):
    source, quantized, report = quantize(
        "qwen3_moe", tmp_path, demo, experts=Scheme(4, 32), dense=dense, lm_head=Scheme(8, 64)
    )
    model, _ = qmoe.load(quantized, progress=False)
    assert type(model.lm_head).__name__ == "PackedLinear" and model.lm_head.stack.scheme == Scheme(
        8, 64
    )
    found, told = plain(quantized)
    assert found is not None, told[-3000:]
    assert_close(logits(model), found)


def test_dense_linears_can_be_left_alone(tmp_path, demo, plain):
    source, quantized, report = quantize(
        "qwen2_moe", tmp_path, demo, experts=Scheme(4, 32), dense=None
    )
    before, after = load_file(source / "model.safetensors"), {}
    for file in quantized.glob("*.safetensors"):
        after |= load_file(file)
    same = [n for n in before if n in after]
    assert "model.layers.0.mlp.shared_expert.up_proj.weight" in same
    assert all(torch.equal(before[n], after[n]) for n in same)
    assert report["bytes"]["dense 16-bit"] > 0 and report["bytes"]["dense packed"] == 0
    found, told = plain(quantized)
    assert found is not None, told[-3000:]


@pytest.mark.parametrize(
    "family",
    mostly_slow([(f,) for f in FAMILIES], lambda f: f == "gpt_oss"),
)
def test_awq_folds_leave_the_unrounded_model_as_it_was(family, tmp_path, demo):
    """At 8 bits AWQ's folding is all that is left to see: the logits must be the original's."""
    source, quantized, report = quantize(
        family, tmp_path, demo, method="awq", experts=Scheme(8, 32), dense=Scheme(8, -1)
    )
    model, _ = qmoe.load(quantized, progress=False)
    got = logits(model)
    expected = logits(AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32))
    # The median token: in a random model rounding sends some tokens to another expert.
    error = (got - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert error.median() < 0.05
    changed = load_file(source / "model.safetensors")
    stored = {}
    for file in quantized.glob("*.safetensors"):
        stored |= load_file(file)
    folded = [n for n in stored if n in changed and not torch.equal(stored[n], changed[n])]
    assert any("norm" in n for n in folded), "no norm took a scale"


@pytest.mark.slow
def test_more_than_ten_layers_load(tmp_path, demo):
    """`layers.1` is a prefix of `layers.10`."""
    source = save_random("qwen3_moe", tmp_path / "s", demo, torch.float32, num_hidden_layers=12)
    config = QuantConfig("rtn", Scheme(4, 32))
    qmoe.quantize(source, tmp_path / "q", config, progress=False)
    model, _ = qmoe.load(tmp_path / "q", progress=False)
    assert logits(model).isfinite().all()


def test_tensors_that_the_family_ignores_are_dropped_and_reported(tmp_path, demo):
    source = save_random("deepseek_v3", tmp_path / "s", demo, torch.float32)
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.61.enorm.weight"] = torch.ones(64)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    config = QuantConfig("rtn", Scheme(4, 32))
    report = qmoe.quantize(source, tmp_path / "q", config, progress=False)
    assert "model.layers.61.enorm.weight" in report["fallbacks"][-1]
    qmoe.load(tmp_path / "q", progress=False)


def test_experts_in_a_middle_layer_only(tmp_path, demo):
    source = save_random(
        "qwen3_moe",
        tmp_path / "s",
        demo,
        torch.float32,
        num_hidden_layers=3,
        mlp_only_layers=[0, 2],
        intermediate_size=96,
    )
    config = QuantConfig(experts=Scheme(4, 32), search_grid=False, calibration=CALIBRATION)
    qmoe.quantize(source, tmp_path / "q", config, save_statistics=tmp_path / "st", progress=False)
    config = QuantConfig(experts=Scheme(4, 32), dense=None, search_grid=False)
    qmoe.quantize(
        source, tmp_path / "q2", config, statistics_from=[tmp_path / "st"], progress=False
    )
    assert logits(qmoe.load(tmp_path / "q2", progress=False)[0]).isfinite().all()


@pytest.mark.parametrize("bits", [3, 8])
def test_linears_of_odd_sizes(bits, tmp_path, demo):
    """torch's int8 kernel reads past rows that are no multiple of 16; 40 is none."""
    source = save_random("deepseek_v3", tmp_path / "s", demo, torch.float32, q_lora_rank=40)
    config = QuantConfig("rtn", Scheme(4, 32), Scheme(bits, -1))
    qmoe.quantize(source, tmp_path / "q", config, progress=False)
    expected = logits(dequantized_twin(source, tmp_path / "q", tmp_path / "t"))
    for dtype, most in ((torch.float32, 1e-4), (torch.bfloat16, 0.05)):
        model, _ = qmoe.load(tmp_path / "q", dtype, activations="bf16", progress=False)
        error = (logits(model).float() - expected).norm(dim=-1) / expected.norm(dim=-1)
        assert error.median() < most, dtype


def test_experts_stored_in_one_tensor_give_the_same_as_expert_by_expert(tmp_path, demo):
    """A family that publishes single experts, but saved in the layout it has in memory."""
    source = save_random("qwen3_moe", tmp_path / "s", demo, torch.float32)
    config = QuantConfig("rtn", Scheme(4, 32))
    qmoe.quantize(source, tmp_path / "single", config, progress=False)
    whole = AutoModelForCausalLM.from_pretrained(source).state_dict()
    save_file(whole, source / "model.safetensors", metadata={"format": "pt"})
    qmoe.quantize(source, tmp_path / "fused", config, progress=False)
    found = []
    for folder in ("single", "fused"):
        files = sorted((tmp_path / folder).glob("*.safetensors"))
        found.append({k: v for file in files for k, v in load_file(file).items()})
    assert found[0] and found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])


def test_router_is_named_in_ignore_as_the_checkpoint_names_it(tmp_path, demo):
    _, quantized, _ = quantize("mixtral", tmp_path, demo, method="rtn", experts=Scheme(4, 32))
    ignore = json.loads((quantized / "config.json").read_text())["quantization_config"]["ignore"]
    assert "model.layers.0.block_sparse_moe.gate" in ignore and "model.layers.0.mlp.gate" in ignore
    assert "lm_head" in ignore and "model.embed_tokens" not in ignore
