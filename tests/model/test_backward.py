"""A gradient with one layer in memory is that of the whole model."""

import pytest
import torch
from helpers import assert_close, save_random
from transformers import AutoModelForCausalLM

from qmoe.model.backward import backward, forward
from qmoe.model.last_layer import last_outputs, logits_of


def _run(i, forward, calls):
    return [forward(*call.args, **call.kwargs) for call in calls]


@pytest.fixture(params=["qwen3_moe", "deepseek_v3", "gpt_oss"])
def model(request, demo, tmp_path):
    source = save_random(request.param, tmp_path / "source", demo, torch.float32)
    return AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)


def test_the_gradient_is_that_of_the_whole_model(model):
    inputs = {"input_ids": torch.randint(4096, (2, 16)), "use_cache": False}
    model(**inputs).logits.square().mean().backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    output, passed = forward(model, list(model.model.layers), inputs, _run, lambda t: t)
    assert len(passed) == 2 and not passed[0].output.grad
    backward(output.logits.square().mean(), passed, _run)
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert set(found) == set(wanted) and len(found) > 20 and passed == []
    for name, gradient in found.items():
        assert_close(gradient, wanted[name], most=1e-3, rms=1e-4)
    assert all("forward" not in vars(layer) for layer in model.model.layers)


def test_without_a_leaf_in_front_the_first_layer_hands_nothing_on(model):
    model.requires_grad_(False)
    last = model.model.layers[1].input_layernorm.weight.requires_grad_()
    inputs = {"input_ids": torch.randint(4096, (1, 8)), "use_cache": False}
    output, passed = forward(model, list(model.model.layers), inputs, _run, lambda t: t)
    backward(output.logits.sum(), passed, _run)
    assert last.grad.isfinite().all() and last.grad.any()
    assert [name for name, p in model.named_parameters() if p.grad is not None] == [
        "model.layers.1.input_layernorm.weight"
    ]


@torch.no_grad()
def test_logits_follow_from_what_comes_out_of_the_last_layer(model):
    inputs = [{"input_ids": torch.randint(4096, (n, 8)), "use_cache": False} for n in (2, 1)]
    layers = list(model.model.layers)
    outputs = last_outputs(model, layers, inputs, _run)
    assert len(outputs) == 2
    for given, output in zip(inputs, outputs, strict=True):
        assert torch.equal(logits_of(model, layers, given, output), model(**given).logits)
