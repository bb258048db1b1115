"""The families that llama.cpp runs and whose export is proven, and what its file says of each.

Metadata are those that llama.cpp's own converter writes, read from transformers' config. Where
llama.cpp's graph of a family has something fixed that a config can change, another value is
refused: the file would load, and be another model. scripts/gguf_families.py proves every family.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import gguf

from qmoe.errors import UnsupportedModelError

ARCH = gguf.MODEL_ARCH


@dataclass(frozen=True)
class Family:
    """arch: llama.cpp's. layers, heads, kv_heads, head_size, expert_size: of the model.
    metadata: values by the name of `gguf.GGUFWriter`'s method that writes them, without "add_".
    permuted: q and k have the rows of a head in the order of Llama's own code.
    latent: the key and value size of heads that are stored in kv_b_proj together.
    own_output: llama.cpp needs an output matrix of its own even if it is the embeddings'.
    notes: in words, where llama.cpp's model is a little different."""

    arch: gguf.MODEL_ARCH
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    expert_size: int
    metadata: dict[str, Any] = field(default_factory=dict)
    permuted: bool = False
    latent: tuple[int, int] | None = None
    own_output: bool = False
    notes: tuple[str, ...] = ()

    @property
    def arch_name(self) -> str:
        return str(gguf.MODEL_ARCH_NAMES[self.arch])


def family_of(config: Any) -> Family:
    """The family of a transformers config. UnsupportedModelError, with the reason, for one that
    cannot be exported."""
    make = FAMILIES.get(config.model_type)
    if make is None:
        raise UnsupportedModelError(
            f"{config.model_type}: qmoe cannot export this family to GGUF; it can export "
            f"{', '.join(FAMILIES)}. Run the folder in qmoe, or convert the original model with "
            "llama.cpp's own converter"
        )
    return make(config)


def _need(config: Any, name: str, wanted: Any, fact: str) -> None:
    """Raises UnsupportedModelError unless the config has this value, or none."""
    found = getattr(config, name, wanted)
    if found != wanted:
        raise UnsupportedModelError(
            f"{config.model_type}: config.json says {name} = {found!r:.100}, and {fact}; the model "
            "cannot run in llama.cpp as it is, so it is not exported"
        )


def _rope(config: Any) -> dict[str, Any]:
    rope = dict(config.rope_parameters)
    out: dict[str, Any] = {"rope_freq_base": float(rope["rope_theta"])}
    kind = rope.get("rope_type", "default")
    if kind == "linear":
        out |= {
            "rope_scaling_type": gguf.RopeScalingType.LINEAR,
            "rope_scaling_factor": float(rope["factor"]),
        }
    elif kind == "yarn":
        length = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        out |= {
            "rope_scaling_type": gguf.RopeScalingType.YARN,
            "rope_scaling_factor": float(rope["factor"]),
            "rope_scaling_orig_ctx_len": length,
            "rope_scaling_yarn_beta_fast": float(rope.get("beta_fast") or 32),
            "rope_scaling_yarn_beta_slow": float(rope.get("beta_slow") or 1),
        }
    elif kind != "default":
        raise UnsupportedModelError(
            f"{config.model_type}: expected rotary embeddings of type default, linear or yarn, "
            f"found {kind!r}; the model is not exported"
        )
    return out


def _common(config: Any, experts: int, expert_size: int) -> dict[str, Any]:
    """What every family's file says."""
    return {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "head_count": config.num_attention_heads,
        "layer_norm_rms_eps": config.rms_norm_eps,
        "vocab_size": config.vocab_size,
        "expert_count": experts,
        "expert_used_count": config.num_experts_per_tok,
        "expert_feed_forward_length": expert_size,
    } | _rope(config)


def _plain(
    config: Any, arch: gguf.MODEL_ARCH, experts: int, expert_size: int, **more: Any
) -> Family:
    """A family with grouped heads, each of one size for keys and values."""
    _need(config, "hidden_act", "silu", "llama.cpp runs SiLU")
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    own = {
        "head_count_kv": kv_heads,
        "key_length": size,
        "value_length": size,
        "rope_dimension_count": size,
    }
    metadata = _common(config, experts, expert_size) | own | more.pop("metadata", {})
    layers = config.num_hidden_layers
    return Family(arch, layers, heads, kv_heads, size, expert_size, metadata, **more)


def _every_layer(config: Any) -> None:
    """Raises UnsupportedModelError for a model with windows, or with layers without experts."""
    _need(config, "use_sliding_window", False, "llama.cpp runs full attention")
    _need(config, "mlp_only_layers", [], "llama.cpp expects experts in every layer")
    _need(config, "decoder_sparse_step", 1, "llama.cpp expects experts in every layer")


def _qwen2_moe(config: Any) -> Family:
    _every_layer(config)
    fact = "llama.cpp never divides the chosen experts' weights by their sum in this family"
    _need(config, "norm_topk_prob", False, fact)
    shared = {"expert_shared_feed_forward_length": config.shared_expert_intermediate_size}
    size = config.moe_intermediate_size
    return _plain(config, ARCH.QWEN2MOE, config.num_experts, size, metadata=shared, own_output=True)


def _qwen3_moe(config: Any) -> Family:
    _every_layer(config)
    fact = "llama.cpp always divides the chosen experts' weights by their sum in this family"
    _need(config, "norm_topk_prob", True, fact)
    experts = config.num_experts
    return _plain(config, ARCH.QWEN3MOE, experts, config.moe_intermediate_size)


def _mixtral(config: Any) -> Family:
    _need(config, "sliding_window", None, "llama.cpp runs full attention")
    experts = config.num_local_experts
    return _plain(config, ARCH.LLAMA, experts, config.intermediate_size, permuted=True)


def _olmoe(config: Any) -> Family:
    fact = "llama.cpp never divides the chosen experts' weights by their sum in this family"
    _need(config, "norm_topk_prob", False, fact)
    _need(config, "clip_qkv", None, "llama.cpp does not clip q, k and v in this family")
    experts = config.num_experts
    return _plain(config, ARCH.OLMOE, experts, config.intermediate_size, own_output=True)


def _gpt_oss(config: Any) -> Family:
    kinds = ["sliding_attention", "full_attention"]
    wanted = [kinds[i % 2] for i in range(config.num_hidden_layers)]
    _need(config, "layer_types", wanted, "llama.cpp has windows in every second layer")
    _need(config, "swiglu_limit", 7.0, "llama.cpp has 7 in its place")
    size = config.intermediate_size
    metadata = {"sliding_window": config.sliding_window}
    exact = config.rope_parameters.get("truncate", True)
    rounded = "llama.cpp rounds the ends of YaRN's range, which config.json says not to (truncate)"
    return _plain(
        config, ARCH.GPT_OSS, config.num_local_experts, size, metadata=metadata, own_output=True,
        notes=() if exact else (rounded,),
    )  # fmt: skip


def _deepseek(config: Any, own: dict[str, Any]) -> Family:
    """Both versions: keys and values of a layer are one short vector per token, so llama.cpp sees
    one key-value head, and the heads' own matrices beside it."""
    _need(config, "hidden_act", "silu", "llama.cpp runs SiLU")
    key, value = config.qk_nope_head_dim, config.v_head_dim
    rope, latent = config.qk_rope_head_dim, config.kv_lora_rank
    size = config.moe_intermediate_size
    metadata = _common(config, config.n_routed_experts, size) | {
        "head_count_kv": 1,
        "leading_dense_block_count": config.first_k_dense_replace,
        "q_lora_rank": config.q_lora_rank or 0,
        "kv_lora_rank": latent,
        "key_length": latent + rope,
        "value_length": latent,
        "key_length_mla": key + rope,
        "value_length_mla": value,
        "rope_dimension_count": rope,
        "expert_shared_count": config.n_shared_experts,
        "expert_weights_scale": float(config.routed_scaling_factor),
    }
    parameters = config.rope_parameters
    if parameters.get("rope_type") == "yarn":
        scale = parameters.get("mscale_all_dim") or 0
        if parameters.get("mscale") != parameters.get("mscale_all_dim"):
            raise UnsupportedModelError(
                f"{config.model_type}: config.json has different values of mscale and "
                "mscale_all_dim, llama.cpp has one; the model is not exported"
            )
        metadata["rope_scaling_yarn_log_mul"] = 0.1 * scale
    heads = config.num_attention_heads
    return Family(
        ARCH.DEEPSEEK2, config.num_hidden_layers, heads, heads, key + rope, size, metadata | own,
        latent=(key, value),
    )  # fmt: skip


def _deepseek_v2(config: Any) -> Family:
    fact = "llama.cpp rates a group of experts by its two best, this model by the best alone"
    _need(config, "topk_method", "greedy", fact)
    gating = gguf.ExpertGatingFuncType.SOFTMAX
    return _deepseek(config, {"expert_gating_func": gating, "expert_weights_norm": False})


def _deepseek_v3(config: Any) -> Family:
    own = {
        "expert_gating_func": gguf.ExpertGatingFuncType.SIGMOID,
        "expert_weights_norm": bool(config.norm_topk_prob),
        "expert_group_count": config.n_group,
        "expert_group_used_count": config.topk_group,
    }
    return _deepseek(config, own)


FAMILIES: dict[str, Callable[[Any], Family]] = {
    "qwen2_moe": _qwen2_moe,
    "qwen3_moe": _qwen3_moe,
    "mixtral": _mixtral,
    "olmoe": _olmoe,
    "deepseek_v2": _deepseek_v2,
    "deepseek_v3": _deepseek_v3,
    "gpt_oss": _gpt_oss,
}
