"""Write a packed Qwen3-MoE folder with random integers, without ever having the original."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import Qwen3MoeConfig

from gpu.uninstalled import ROOT
from qmoe.config import CHANNEL, Scheme
from qmoe.format.compressed_tensors import quantization_config

DEMO = ROOT / "tests" / "data" / "demo-moe"
GROUP = 128


def write_packed(path: Path, config: Qwen3MoeConfig, bits: int) -> Path:
    """Experts in `bits` with groups of 128 (32 where that does not divide K), every other linear
    and the head in 8 bits, a row a scale. Its predictions mean nothing."""
    path.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    group = GROUP if config.moe_intermediate_size % GROUP == 0 else 32
    dense = Scheme(8, CHANNEL)
    shards: dict[str, str] = {}
    for i, tensors in enumerate(_shards(config, Scheme(bits, group), dense)):
        name = f"model-{i:05}.safetensors"
        save_file(tensors, path / name, metadata={"format": "pt"})
        shards |= dict.fromkeys(tensors, name)
    index = {"metadata": {}, "weight_map": shards}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    ignore = [f"model.layers.{i}.mlp.gate" for i in range(config.num_hidden_layers)]
    quantized = quantization_config(Scheme(bits, group), dense, dense, ignore)
    written = config.to_dict() | {
        "architectures": ["Qwen3MoeForCausalLM"], "dtype": "bfloat16",
        "quantization_config": quantized,
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(written))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(DEMO / name, path / name)
    return path


def _shards(config: Qwen3MoeConfig, expert: Scheme, dense: Scheme) -> Iterator[dict[str, Tensor]]:
    H, I, D = config.hidden_size, config.moe_intermediate_size, config.head_dim  # noqa: E741
    heads, shared = config.num_attention_heads * D, config.num_key_value_heads * D
    ends = {
        "model.embed_tokens.weight": _normal(config.vocab_size, H),
        "model.norm.weight": _ones(H),
    }
    yield ends | _packed("lm_head", config.vocab_size, H, dense)
    for i in range(config.num_hidden_layers):
        at = f"model.layers.{i}"
        layer = {
            f"{at}.{n}.weight": _ones(H) for n in ("input_layernorm", "post_attention_layernorm")
        }
        layer |= {f"{at}.self_attn.{n}.weight": _ones(D) for n in ("q_norm", "k_norm")}
        for name, n, k in (("q", heads, H), ("k", shared, H), ("v", shared, H), ("o", H, heads)):
            layer |= _packed(f"{at}.self_attn.{name}_proj", n, k, dense)
        layer[f"{at}.mlp.gate.weight"] = _normal(config.num_experts, H)
        for e in range(config.num_experts):
            for name, n, k in (("gate", I, H), ("up", I, H), ("down", H, I)):
                layer |= _packed(f"{at}.mlp.experts.{e}.{name}_proj", n, k, expert)
        yield layer


def _packed(name: str, n: int, k: int, scheme: Scheme) -> dict[str, Tensor]:
    words = torch.randint(-(2**31), 2**31, (n, -(-k * scheme.bits // 32)), dtype=torch.int32)
    size = k**-0.5 / 2 ** (scheme.bits - 2)
    scale = torch.full((n, scheme.groups(k)), size, dtype=torch.bfloat16)
    return {
        f"{name}.weight_packed": words,
        f"{name}.weight_scale": scale,
        f"{name}.weight_shape": torch.tensor([n, k]),
    }


def _normal(n: int, k: int) -> Tensor:
    return (torch.randn(n, k) * k**-0.5).to(torch.bfloat16)


def _ones(n: int) -> Tensor:
    return torch.ones(n, dtype=torch.bfloat16)
