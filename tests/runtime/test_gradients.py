"""Gradients through packed weights, and adapters of PEFT on packed models."""

from types import SimpleNamespace

import pytest
import torch
from helpers import assert_close, save_random, slow
from transformers import AutoModelForCausalLM

import qmoe
from qmoe import QuantConfig, Scheme
from qmoe.errors import ConfigError
from qmoe.measure.family_check import dequantize_into
from qmoe.runtime.gradients import Placeholder, expanding, product, unchangeable

IDS = torch.arange(60, 84).view(2, 12)


@pytest.fixture
def peft():
    return pytest.importorskip("peft", reason="PEFT is of the dev extra")


WARNINGS = (
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning",
    # It looks for experts where an adapter is on linears only.
    "ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning",
)


def of_peft(test):
    """PEFT's own warnings, which nobody here can mend."""
    for warning in WARNINGS:
        test = pytest.mark.filterwarnings(warning)(test)
    return test


def pair(family, folder, demo, experts=Scheme(4, 32), **changes):  # noqa: B008
    """A packed model of random weights, and transformers' own with the dequantized ones."""
    source = save_random(family, folder / "source", demo, torch.float32, **changes)
    config = QuantConfig("rtn", experts, Scheme(8, -1))
    qmoe.quantize(source, folder / "quantized", config, progress=False)
    packed = AutoModelForCausalLM.from_pretrained(folder / "quantized")
    twin = AutoModelForCausalLM.from_pretrained(source).requires_grad_(False)
    with torch.no_grad():
        dequantize_into(twin, folder / "quantized", torch.float32)
    return packed, twin


def test_a_product_has_the_gradient_of_its_inputs():
    torch.manual_seed(0)
    weights = torch.randn(3, 5, 4, dtype=torch.float64)
    x = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: product(x, lambda e: weights[e], 2), x)


@pytest.mark.parametrize(
    "family", ["gpt_oss", slow("qwen3_moe"), slow("mixtral"), slow("deepseek_v3")]
)
def test_gradients_are_those_of_the_dequantized_model(family, tmp_path, demo):
    packed, twin = pair(family, tmp_path, demo)
    found = []
    for model in (packed, twin):
        x = model.get_input_embeddings()(IDS).detach().requires_grad_()
        model(inputs_embeds=x, use_cache=False).logits.square().mean().backward()
        found.append(x.grad)
    assert found[1].abs().max() > 0
    assert_close(*found, most=1e-3, rms=1e-4)


def test_what_is_freed_of_expanded_matrices_is_given_back(monkeypatch):
    """Every 3 matrices of 40 bytes, in the forward and in the backward product."""
    given = []
    monkeypatch.setattr("qmoe.runtime.gradients.HOLES", 100)
    monkeypatch.setattr("qmoe.runtime.gradients.return_freed", lambda: given.append(1))
    monkeypatch.setattr("qmoe.runtime.gradients._Product.expanded", 0)
    x, matrix = torch.ones(1, 5, requires_grad=True), torch.ones(2, 5)
    for _ in range(2):
        product(x, lambda e: matrix, 0).sum().backward()
    assert given == [1]
    for _ in range(4):
        product(x, lambda e: matrix, 0).sum().backward()
    assert given == [1] * 3


def test_inference_does_not_take_the_way_of_gradients(quantized_short, monkeypatch):
    model, _ = qmoe.load(quantized_short, progress=False)
    monkeypatch.setattr("qmoe.runtime.modules.product", None)
    monkeypatch.setattr("qmoe.runtime.modules.moe_forward", None)
    model(input_ids=IDS)  # nothing here wants a gradient, though gradients are on


LORA = {
    "attention": {"target_modules": ["q_proj", "o_proj"]},
    "experts": {"target_modules": [], "target_parameters": ["experts.gate_up_proj",
                                                            "experts.down_proj"]},
    "dense": {"target_modules": "all-linear"},
}  # fmt: skip


@of_peft
@pytest.mark.parametrize(
    "family, on",
    [("gpt_oss", "experts"), ("qwen3_moe", "attention"), slow("qwen3_moe", "experts"),
     slow("deepseek_v3", "dense"), slow("qwen2_moe", "dense"), slow("mixtral", "experts")],
)  # fmt: skip
def test_an_adapter_of_another_model_gives_what_it_gives_there(peft, family, on, tmp_path, demo):
    """gpt-oss has transposed experts whose gate and up rows take turns."""
    packed, twin = pair(family, tmp_path, demo)
    config = peft.LoraConfig(r=2, task_type="CAUSAL_LM", init_lora_weights=False, **LORA[on])
    trained = peft.get_peft_model(twin, config)
    trained.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        before = packed(IDS).logits
        loaded = peft.PeftModel.from_pretrained(packed, tmp_path / "adapter")
        found, expected = loaded(IDS).logits, trained(IDS).logits
        assert (found - before).abs().max() > 0.01
        assert_close(found, expected, most=1e-3, rms=1e-4)
        with loaded.disable_adapter():
            assert torch.equal(loaded(IDS).logits, before)
    assert torch.equal(loaded.unload()(IDS).logits, before)


@of_peft
@pytest.mark.parametrize("on", ["attention", "experts"])
def test_training_lowers_the_loss_and_saves_the_adapter(peft, on, quantized_short, tmp_path):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(quantized_short)
    before = model(IDS, labels=IDS).loss.detach()
    if on == "experts":
        model.activation_checkpointing_enable()
    else:  # which also casts all parameters to float32
        model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    tuned = peft.get_peft_model(model, peft.LoraConfig(r=4, task_type="CAUSAL_LM", **LORA[on]))
    tuned.train()
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(4):
        tuned(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    tuned.eval()
    after = tuned(input_ids=IDS, labels=IDS).loss.detach()
    assert after < before - 0.1
    tuned.save_pretrained(tmp_path / "adapter")
    again = AutoModelForCausalLM.from_pretrained(quantized_short)
    again = peft.PeftModel.from_pretrained(again, tmp_path / "adapter")
    assert_close(again(input_ids=IDS, labels=IDS).loss.detach(), after, most=1e-2, rms=1e-2)


@of_peft
@pytest.mark.parametrize("on", ["attention", "experts"])
@pytest.mark.parametrize("safe", [True, False])
def test_merging_is_refused(peft, on, safe, quantized_short):
    model, _ = qmoe.load(quantized_short, progress=False)
    tuned = peft.get_peft_model(model, peft.LoraConfig(r=2, **LORA[on]))
    with pytest.raises(ConfigError, match="merge it into the original model"):
        tuned.merge_and_unload(safe_merge=safe)


@of_peft
def test_prompt_tuning_has_gradients(peft, quantized_short):
    model, _ = qmoe.load(quantized_short, progress=False)
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    tuned = peft.get_peft_model(model, config)
    tuned(input_ids=IDS, labels=IDS).loss.backward()
    (prompt,) = [p for p in tuned.parameters() if p.requires_grad]
    assert prompt.grad.abs().max() > 0


def test_placeholders_take_no_memory_and_cannot_be_written_to(quantized_short):
    model, _ = qmoe.load(quantized_short, progress=False)
    experts = model.model.layers[0].mlp.experts
    assert type(experts.gate_up_proj) is Placeholder
    assert experts.gate_up_proj.shape == (16, 256, 256)
    assert model.get_memory_footprint() < 2 * sum(
        file.stat().st_size for file in quantized_short.glob("*.safetensors")
    )
    model.to("cpu")
    assert not any(experts.gate_up_proj.to(torch.float64).stride())
    for weight in (experts.gate_up_proj, unchangeable(torch.ones(2, 2))):
        with pytest.raises(ConfigError, match="cannot take in an adapter"):
            weight.data = torch.ones(weight.shape)
        with pytest.raises(ConfigError, match="cannot take in an adapter"):
            weight.data += 1


def test_what_packed_experts_do_not_take(quantized_short):
    model, _ = qmoe.load(quantized_short, progress=False)
    experts = model.model.layers[0].mlp.experts
    torch.nn.utils.parametrize.register_parametrization(
        experts, "down_proj", torch.nn.Identity(), unsafe=True
    )
    with pytest.raises(ConfigError, match="adapters of PEFT's LoRA only, found Identity"):
        model(IDS)
    with pytest.raises(ConfigError, match="expert_memory"):
        expanding([SimpleNamespace()], 0)
