"""Attention of packed models on a CPU: what the kernel takes, and what it leaves to torch."""

import pytest
import torch
from helpers import QUICK
from transformers import AutoConfig, AutoModelForCausalLM

import qmoe
from qmoe.fused.attention import NAME, attention_forward, fuse_attention
from qmoe.kernels.cpu.library import library
from qmoe.runtime.run_on import RunOn

CPU = RunOn(torch.device("cpu"))
pytestmark = pytest.mark.skipif(library() is None, reason="installed without a C compiler")


def model_of(family, **changes):
    sizes = dict(
        vocab_size=64, hidden_size=32, intermediate_size=32, moe_intermediate_size=16,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        num_local_experts=4, num_experts=4, num_experts_per_tok=2, pad_token_id=0,
    )  # fmt: skip
    config = AutoConfig.for_model(family, **sizes | changes)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


@pytest.mark.parametrize("family, changes", [("mixtral", {}), ("mixtral", {"sliding_window": 5})])
def test_logits_are_those_of_sdpa(family, changes):
    model = model_of(family, **changes)
    ids = torch.randint(1, 64, (3, 12))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0  # padded on the left
    seen = mask.bool()
    wanted = model(ids, attention_mask=mask).logits[seen], model(ids).logits
    said = model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False)
    fuse_attention(model, CPU)
    assert model.config._attn_implementation == NAME
    torch.testing.assert_close(model(ids, attention_mask=mask).logits[seen], wanted[0])
    torch.testing.assert_close(model(ids).logits, wanted[1])
    assert model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False).equal(said)
    options = dict(max_new_tokens=8, do_sample=False, cache_implementation="static")
    assert model.generate(ids, attention_mask=mask, disable_compile=True, **options).equal(said)


def test_a_family_that_asks_for_its_implementation_keeps_it():
    model = model_of("deepseek_v32", q_lora_rank=8, kv_lora_rank=8, index_n_heads=2)
    assert model.config._attn_implementation == "sdpa"
    fuse_attention(model, CPU)
    assert model.config._attn_implementation == "sdpa"


def test_a_family_without_sdpa_keeps_eager():
    model = model_of("gpt_oss")
    fuse_attention(model, CPU)
    assert model.config._attn_implementation == "eager"


def test_what_is_left_to_torch(monkeypatch):
    import qmoe.fused.attention as module

    calls = []

    def torch_s(*args, **kwargs):
        calls.append(1)
        return torch.zeros(1), None

    monkeypatch.setattr(module, "sdpa_attention_forward", torch_s)
    monkeypatch.setattr(module, "attention", lambda *args: torch.zeros(1))
    q, k = torch.randn(1, 4, 3, 16), torch.randn(1, 2, 3, 16)
    layer = torch.nn.Module()
    left = [
        dict(query=q.clone().requires_grad_()),
        dict(dropout=0.1),
        dict(attention_mask=torch.zeros(1, 1, 3, 3)),
        dict(query=torch.randn(1, 4, 3, 257), key=torch.randn(1, 2, 3, 257)),
        dict(position_bias=torch.zeros(1, 4, 3, 3)),
        dict(key=k.bfloat16()),
    ]
    for change in left:
        arguments = dict(query=q, key=k, value=k, attention_mask=None) | change
        attention_forward(layer, **arguments)
    assert len(calls) == len(left)
    attention_forward(layer, q, k, k, torch.ones(1, 1, 3, 3, dtype=torch.bool))
    assert len(calls) == len(left)


def test_a_loaded_model_uses_all_of_it(short, tmp_path):
    qmoe.quantize(short, tmp_path / "q4", QUICK, progress=False)
    model, tokenizer = qmoe.load(tmp_path / "q4", progress=False)
    assert model.config._attn_implementation == NAME
    kinds = {type(m).__name__ for m in model.modules() if "RMSNorm" in type(m).__name__}
    assert kinds and all(kind.startswith("Fused") for kind in kinds)
    ids = tokenizer("Once upon a time", return_tensors="pt").input_ids
    with torch.no_grad():
        first = model(ids, use_cache=True)
    assert {type(layer).__name__ for layer in first.past_key_values.layers} == {"GrowingLayer"}
