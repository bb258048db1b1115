"""A small MoE that no library knows, with its experts in three styles:

grok           softmax, top-2 of a list of gated MLPs, norms after the blocks as well (Grok-1)
deepseek       the first layer dense, then shared experts beside routed ones (DeepSeekMoE-16B)
expert_choice  every expert takes the tokens that suit it best (Zhou et al. 2022)

Rotary frequencies are computed in a constructor, as code from before transformers 5 does it.
"""

import torch
from torch import nn
from torch.nn import functional as F
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_tiny_remote import TinyRemoteConfig


class Norm(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5)


class Rotary(nn.Module):
    def __init__(self, size):
        super().__init__()
        inverse = 10000.0 ** (-torch.arange(0, size, 2).float() / size)
        self.register_buffer("inv_freq", inverse, persistent=False)

    def forward(self, x, start):
        at = torch.arange(start, start + x.shape[-2], device=x.device).float()
        angle = (at[:, None] * self.inv_freq).repeat(1, 2)
        a, b = x.chunk(2, dim=-1)
        return x * angle.cos().to(x.dtype) + torch.cat([-b, a], -1) * angle.sin().to(x.dtype)


class Attention(nn.Module):
    def __init__(self, config, index):
        super().__init__()
        self.index, self.heads = index, config.num_heads
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self, name, nn.Linear(config.hidden_size, config.hidden_size, bias=False))
        self.rotary = Rotary(config.hidden_size // config.num_heads)

    def forward(self, x, cache):
        projected = (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        q, k, v = (p.unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in projected)
        start = cache.get_seq_length(self.index) if cache is not None else 0
        q, k = self.rotary(q, start), self.rotary(k, start)
        if cache is not None:
            k, v = cache.update(k, v, self.index)
        seen = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=x.device).tril(start)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        return self.o_proj(y.transpose(1, 2).flatten(-2))


class GrokMLP(nn.Module):
    def __init__(self, hidden, size):
        super().__init__()
        self.linear_v = nn.Linear(hidden, size, bias=False)
        self.linear_1 = nn.Linear(size, hidden, bias=False)
        self.linear = nn.Linear(hidden, size, bias=False)
        self.act_fn = nn.GELU()

    def forward(self, x):
        return self.linear_1(self.act_fn(self.linear(x)) * self.linear_v(x))


class MLP(nn.Module):
    def __init__(self, hidden, size):
        super().__init__()
        self.gate_proj = nn.Linear(hidden, size, bias=False)
        self.up_proj = nn.Linear(hidden, size, bias=False)
        self.down_proj = nn.Linear(size, hidden, bias=False)
        self.act_fn = nn.SiLU()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class GrokMoE(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.top_k = config.experts_per_token
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        each = [GrokMLP(config.hidden_size, config.expert_size) for _ in range(config.num_experts)]
        self.experts = nn.ModuleList(each)

    def forward(self, hidden):
        x = hidden.view(-1, hidden.shape[-1])
        weights, chosen = F.softmax(self.gate(x), dim=1, dtype=torch.float).topk(self.top_k)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(chosen == e)
            if len(token):
                y.index_add_(0, token, expert(x[token]) * weights[token, slot, None].to(x.dtype))
        return y.view_as(hidden)


class MoEGate(nn.Module):
    """A router that is no linear."""

    def __init__(self, config):
        super().__init__()
        self.top_k = config.experts_per_token
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))

    def forward(self, x):
        return F.linear(x, self.weight).softmax(dim=-1).topk(self.top_k, dim=-1, sorted=False)


class DeepseekMoE(nn.Module):
    def __init__(self, config):
        super().__init__()
        each = [MLP(config.hidden_size, config.expert_size) for _ in range(config.num_experts)]
        self.experts = nn.ModuleList(each)
        self.gate = MoEGate(config)
        self.shared_experts = MLP(config.hidden_size, 2 * config.expert_size)

    def forward(self, hidden):
        x = hidden.view(-1, hidden.shape[-1])
        weights, chosen = self.gate(x)
        order = chosen.view(-1).argsort(stable=True)
        ends = chosen.view(-1).bincount(minlength=len(self.experts)).cumsum(0)
        token, start, y = order // chosen.shape[1], 0, torch.zeros_like(x)
        for end, expert in zip(ends.tolist(), self.experts, strict=True):
            if end > start:
                gate = weights.view(-1, 1)[order[start:end]].to(x.dtype)
                y.index_add_(0, token[start:end], expert(x[token[start:end]]) * gate)
            start = end
        return (y + self.shared_experts(x)).view_as(hidden)


class ExpertChoiceMoE(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.top_k = config.experts_per_token
        self.router = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        each = [MLP(config.hidden_size, config.expert_size) for _ in range(config.num_experts)]
        self.experts = nn.ModuleList(each)

    def forward(self, hidden):
        x = hidden.view(-1, hidden.shape[-1])
        scores = self.router(x).softmax(dim=-1).T  # [E, T]
        capacity = max(1, len(x) * self.top_k // len(self.experts))
        weights, tokens = scores.topk(capacity, dim=-1)
        y = torch.zeros_like(x)
        for expert, token, weight in zip(self.experts, tokens, weights, strict=True):
            y.index_add_(0, token, expert(x[token]) * weight[:, None])
        return y.view_as(hidden)


BLOCKS = {"grok": GrokMoE, "deepseek": DeepseekMoE, "expert_choice": ExpertChoiceMoE}


class Layer(nn.Module):
    def __init__(self, config, index):
        super().__init__()
        self.self_attn = Attention(config, index)
        self.before_attn, self.before_mlp = Norm(config.hidden_size), Norm(config.hidden_size)
        self.after_attn = Norm(config.hidden_size) if config.style == "grok" else nn.Identity()
        self.after_mlp = Norm(config.hidden_size) if config.style == "grok" else nn.Identity()
        dense = config.style == "deepseek" and index == 0
        self.mlp = (
            MLP(config.hidden_size, config.dense_size) if dense else BLOCKS[config.style](config)
        )

    def forward(self, x, cache=None):
        x = x + self.after_attn(self.self_attn(self.before_attn(x), cache))
        return (x + self.after_mlp(self.mlp(self.before_mlp(x))),)


class TinyRemoteModel(PreTrainedModel):
    config_class = TinyRemoteConfig
    base_model_prefix = "model"

    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_hidden_layers))
        self.norm = Norm(config.hidden_size)
        self.post_init()

    def forward(self, input_ids, cache=None):
        x = self.embed_tokens(input_ids)
        for layer in self.layers:
            x = layer(x, cache=cache)[0]
        return self.norm(x)


class TinyRemoteForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = TinyRemoteConfig
    base_model_prefix = "model"

    def __init__(self, config):
        super().__init__(config)
        self.model = TinyRemoteModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids, past_key_values=None, use_cache=None, **kwargs):
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        logits = self.lm_head(self.model(input_ids, past_key_values))
        return CausalLMOutputWithPast(logits=logits, past_key_values=past_key_values)
