"""Tables: the sizes of a tiny model of every family, by the names that families give them."""

from typing import Any

SIZES: dict[int, str] = {
    512: "vocab_size vocab_size_per_layer_input max_position_embeddings max_seq_len",
    96: "intermediate_size d_ff ffn_hidden_size encoder_ffn_dim decoder_ffn_dim",
    64: "hidden_size d_model out_hidden_size text_hidden_size moe_hidden_size "
    "projector_hidden_size adapter_in_dim adapter_input_size "
    "adapter_out_dim",
    32: "moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size "
    "moe_shared_expert_intermediate_size q_lora_rank kv_lora_rank d_kv o_lora_rank "
    "router_hidden_size hidden_size_per_layer_input index_topk qk_head_dim",
    16: "head_dim v_head_dim qk_rope_head_dim qk_nope_head_dim swa_head_dim linear_head_dim "
    "index_head_dim mamba_head_dim mamba_d_head ssm_state_size mamba_d_state rel_extent",
    8: "mamba_num_heads mamba_n_heads",
    6: "num_experts num_local_experts n_routed_experts moe_num_experts",
    4: "num_attention_heads n_heads num_heads encoder_attention_heads decoder_attention_heads "
    "swa_num_attention_heads linear_num_heads index_n_heads",
    2: "num_hidden_layers n_layers num_layers num_decoder_layers encoder_layers decoder_layers "
    "depth num_experts_per_tok moe_top_k moe_topk moe_k num_experts_per_token top_k_experts "
    "num_key_value_heads swa_num_key_value_heads kv_n_heads n_groups zero_expert_num o_groups",
    1: "num_dense_layers n_group topk_group num_expert_group first_k_dense_replace",
    0: "bos_token_id eos_token_id pad_token_id",
}
SMALL = {name: size for size, names in SIZES.items() for name in names.split()}
# Lists with a kind per layer: the first and the last kind there is.
KINDS = ("layer_types", "mlp_layer_types")

# What the sizes above leave inconsistent or switched off. Latent attention has no grouped heads.
LATENT = dict.fromkeys(
    ("axk1", "axk2", "bailing_hybrid", "deepseek_ocr2", "deepseek_v2", "deepseek_v3",
     "deepseek_v32", "dots3_note", "dots3_note_text", "glm4_moe_lite", "glm5_next", "glm_moe_dsa",
     "kimi_linear", "longcat_flash", "mistral4", "mistral_large4"),
    {"num_key_value_heads": 4},
)  # fmt: skip
INDEXER = {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16,
           "indexer_budget": 32, "indexer_compress_ratio": 1}  # fmt: skip
MOE = {"num_experts": 6, "top_k_experts": 2, "moe_intermediate_size": 32}
CHANGES: dict[str, dict[str, Any]] = LATENT | {
    "gemma4": MOE | {"enable_moe_block": True},
    "gemma4_text": MOE | {"enable_moe_block": True},
    "diffusion_gemma": MOE,
    "deepseek_v2": {"num_key_value_heads": 4, "num_experts_per_tok": 2},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0}},
    "deepseek_ocr2": {"mlp_layer_types": ["dense", "sparse"], "num_experts_per_tok": 2,
                      "num_key_value_heads": 4, "n_group": 1, "topk_group": 1},
    "doge": {"is_moe": True},
    "dots1": {"n_routed_experts": 6, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "flint": {"mlp_only_layers": [0]},
    "glm4v_moe": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0,
                                      "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]}},
    "hunyuan_v1_moe": {"head_dim": 16, "moe_topk": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "ernie4_5_vl_moe": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0,
                                            "mrope_section": [3, 3, 2]}},
    "glm5_next": {"num_key_value_heads": 4, "qk_rope_head_dim": 0, "head_dim": 0,
                  "qk_head_dim": 16},
    "mistral4": {"num_key_value_heads": 4, "head_dim": 32},
    "nllb-moe": {"encoder_sparse_step": 2, "decoder_sparse_step": 2},
    "step3p7": {"sliding_window": 32},
    "qwen4_exp": INDEXER,
    "qwen4_exp_text": INDEXER,
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip
