"""Config of a small MoE that no library knows, as its authors would put it beside the weights."""

from transformers import PretrainedConfig


class TinyRemoteConfig(PretrainedConfig):
    """style: grok, deepseek or expert_choice (see the modeling file)."""

    model_type = "tiny_remote"

    def __init__(
        self,
        style="grok",
        vocab_size=4096,
        hidden_size=64,
        expert_size=32,
        dense_size=96,
        num_hidden_layers=2,
        num_heads=4,
        num_experts=6,
        experts_per_token=2,
        max_position_embeddings=512,
        **kwargs,
    ):
        self.style, self.vocab_size, self.hidden_size = style, vocab_size, hidden_size
        self.expert_size, self.dense_size = expert_size, dense_size
        self.num_hidden_layers, self.num_heads = num_hidden_layers, num_heads
        self.num_experts, self.experts_per_token = num_experts, experts_per_token
        self.max_position_embeddings = max_position_embeddings
        super().__init__(**{"tie_word_embeddings": False, **kwargs})
