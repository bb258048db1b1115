"""Attention layers and decoder layers that run as calls of C: which ones do, that they give what
the family's own code gives, and what is left to that code."""

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache
from transformers.cache_utils import StaticCache

import qmoe
from qmoe.config import QuantConfig, Scheme
from qmoe.fused.decoder_layers import Known
from qmoe.kernels.cpu.library import library

pytestmark = pytest.mark.skipif(library() is None, reason="installed without a C compiler")
SIZES = dict(
    vocab_size=64, hidden_size=64, intermediate_size=32, moe_intermediate_size=32,
    num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
    num_local_experts=4, num_experts=4, num_experts_per_tok=2, pad_token_id=0,
    max_position_embeddings=2048, tie_word_embeddings=False,
)  # fmt: skip
# Whether attention layers, and whether decoder layers run in C.
FAMILIES = {
    "qwen3_moe": ({"norm_topk_prob": True}, True, True),
    "mixtral": ({}, True, True),
    "olmoe": ({}, True, True),
    "qwen2_moe": ({"shared_expert_intermediate_size": 32}, True, False),
    "glm4_moe": (
        {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 0,
         "partial_rotary_factor": 0.5, "attention_bias": True, "use_qk_norm": True},
        True, False,
    ),
    # Its positions are complex numbers, and every second layer has none.
    "llama4_text": ({"intermediate_size_mlp": 32, "no_rope_layers": [1, 0]}, False, False),
    "deepseek_v3": (
        {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 0,
         "q_lora_rank": None, "kv_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
         "v_head_dim": 16, "num_key_value_heads": 4, "head_dim": 8},
        False, False,
    ),
}  # fmt: skip
MADE_BY = ("qmoe.fused.attention_layers", "qmoe.fused.decoder_layers")
ROUNDED = QuantConfig(method="rtn", experts=Scheme(4, 32), dense=Scheme(8, 32))


def loaded(family, dtype, tmp_path):
    changes, *wanted = FAMILIES[family]
    config = AutoConfig.for_model(family, **SIZES | changes)
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        spread = 0.05 if parameter.dim() > 1 else 0.3
        parameter.data.normal_(1 if "norm" in name else 0, spread)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "source")
    qmoe.quantize(tmp_path / "source", tmp_path / "q", ROUNDED, progress=False)
    return qmoe.load(tmp_path / "q", dtype=dtype, progress=False)[0], wanted


def families_own(model):
    """The same model whose layers run the family's own code."""
    other = copy.deepcopy(model)
    for module in other.modules():
        if type(module).__module__ in MADE_BY:
            module.__class__ = type(module).__mro__[1]
    return other


def states(model, ids, steps=(), **kwargs):
    """Logits of a prompt [B, T] and of tokens decoded behind it, then keys and values."""
    cache = DynamicCache(config=model.config)
    found = []
    for part in (ids, *steps):
        out = model(part, past_key_values=cache, use_cache=True, **kwargs)
        kwargs, cache = {}, out.past_key_values
        found.append(out.logits)
    for layer in cache.layers:
        found += [layer.keys, layer.values]
    return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_same_bits_as_the_family_s_own_code(family, dtype, tmp_path):
    model, (attention, decoder) = loaded(family, dtype, tmp_path)
    own = families_own(model)
    ids = torch.randint(1, 64, (3, 9))
    steps = [torch.randint(1, 64, (3, 1)) for _ in range(4)]
    many = torch.randint(1, 64, (1, 300))  # more keys than one share of an attention
    for one, rest in ((ids, steps), (many, [step[:1] for step in steps]), (ids[:1, :1], ())):
        for found, wanted in zip(states(model, one, rest), states(own, one, rest), strict=True):
            assert found.equal(wanted)
    layers = model.model.layers
    for layer in layers:
        assert layer.self_attn.__dict__.get("qmoe_computes_alike", False) == attention
        assert layer.__dict__.get("qmoe_known", Known()).alike == (decoder or None)


@pytest.fixture
def model(quantized_short):
    return qmoe.load(quantized_short, progress=False)[0]


def decodes_in_c(model, monkeypatch, run):
    """How many layers `run(model)` decodes by one call."""
    import qmoe.fused.decoder_layers as module

    calls, real = [], module.decode
    monkeypatch.setattr(module, "decode", lambda *args: calls.append(1) or real(*args))
    with torch.no_grad():
        run(model)
    return len(calls)


IDS = torch.randint(1, 500, (2, 7))


def step(model, batch=2, cache=None, **kwargs):
    first = model(IDS[:1].expand(batch, -1), past_key_values=cache, use_cache=True)
    model(IDS[:1, :1].expand(batch, -1), past_key_values=first.past_key_values, **kwargs)


def test_tokens_are_decoded_by_one_call_a_layer(model, monkeypatch):
    step(model)  # the first call of each layer is compared
    assert decodes_in_c(model, monkeypatch, step) == 2
    assert decodes_in_c(model, monkeypatch, lambda m: step(m, batch=8)) == 2
    assert decodes_in_c(model, monkeypatch, lambda m: step(m, batch=9)) == 0
    copied = copy.deepcopy(model)
    step(copied)
    assert decodes_in_c(copied, monkeypatch, step) == 2


def test_what_is_left_to_the_family_s_own_code(model, monkeypatch):
    step(model)
    cache = StaticCache(config=model.config, max_cache_len=16)
    assert decodes_in_c(model, monkeypatch, lambda m: step(m, cache=cache)) == 0
    mask = torch.ones(2, 8, dtype=torch.long)
    mask[0, 0] = 0
    assert decodes_in_c(model, monkeypatch, lambda m: step(m, attention_mask=mask)) == 0
    norm = model.model.layers[0].self_attn.q_norm
    seen = []
    handle = norm.register_forward_hook(lambda *args: seen.append(1))
    assert decodes_in_c(model, monkeypatch, step) == 1
    assert len(seen) == 2
    handle.remove()
    assert decodes_in_c(model, monkeypatch, step) == 2
    model.set_attn_implementation("eager")
    assert decodes_in_c(model, monkeypatch, step) == 0


def test_a_weight_that_has_moved_is_found(model):
    own = families_own(model)
    ids, steps = IDS, [IDS[:, :1], IDS[:, 1:2]]
    with torch.no_grad():
        states(model, ids, steps)
        for changed in (model, own):
            norm = changed.model.layers[1].input_layernorm
            norm.weight.data = norm.weight.data.clone() * 1.5
        for found, wanted in zip(states(model, ids, steps), states(own, ids, steps), strict=True):
            assert found.equal(wanted)


def test_inputs_may_be_slices(model):
    """Rows of embeddings that do not lie one behind the other."""
    own = families_own(model)
    embeddings = model.get_input_embeddings()(IDS)
    found = []
    with torch.no_grad():
        for one in (model, own):
            cache = one(inputs_embeds=embeddings[:, :5], use_cache=True).past_key_values
            for i in (5, 6):
                out = one(inputs_embeds=embeddings[:, i : i + 1], past_key_values=cache)
            found.append(out.logits)
    assert found[0].equal(found[1])


def test_a_trained_norm_gets_its_gradient(model):
    norm = model.model.layers[1].post_attention_layernorm
    norm.weight.requires_grad_()
    with torch.no_grad():
        cache = model(IDS, use_cache=True).past_key_values
    model(IDS[:, :1], past_key_values=cache).logits.float().sum().backward()
    assert norm.weight.grad is not None and norm.weight.grad.abs().max() > 0


def test_gradients_go_through_the_family_s_own_code(model):
    table = model.get_input_embeddings()
    inputs = table(IDS).detach().requires_grad_()
    model(inputs_embeds=inputs).logits.float().sum().backward()
    assert inputs.grad is not None and inputs.grad.abs().max() > 0
