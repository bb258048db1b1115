"""vLLM's gpt-oss for folders that qmoe wrote, which have every expert's matrices one by one.

vLLM's own loader knows gpt-oss's experts joined only. vLLM's way for a plugin to change how a model
loads is a class of its own.
"""

from collections.abc import Iterable

from torch import Tensor
from vllm.model_executor.models.gpt_oss import GptOssForCausalLM
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper

from qmoe.vllm_plugin.method import PackedConfig

# Without the endings of other formats, which single experts' names have too.
NAMES = WeightsMapper(
    orig_to_new_substr={
        ".self_attn.": ".attn.",
        ".mlp.experts.": ".mlp.experts.routed_experts.",
    },
    orig_to_new_suffix={
        ".embed_tokens.weight": ".embedding.weight",
        ".gate_up_proj_bias": ".w13_bias",
        ".down_proj_bias": ".w2_bias",
    },
)


class PackedGptOss(GptOssForCausalLM):  # type: ignore[misc]
    """The same model; weights of qmoe's folders go to places by their own names (experts.py)."""

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        if not isinstance(self.vllm_config.quant_config, PackedConfig):
            return super().load_weights(weights)  # type: ignore[no-any-return]
        return AutoWeightsLoader(self).load_weights(weights, mapper=NAMES)  # type: ignore[no-any-return]
