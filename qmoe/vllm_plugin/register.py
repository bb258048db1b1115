"""The entry point `vllm.general_plugins`, which vLLM calls in each of its processes."""

from importlib import import_module

GPT_OSS = "qmoe.vllm_plugin.gpt_oss:PackedGptOss"


def register() -> None:
    """Tell vLLM of qmoe's quantization method, and of its class for gpt-oss. Calling it again
    changes nothing."""
    import_module("qmoe.vllm_plugin.method")
    registry = import_module("vllm.model_executor.models.registry").ModelRegistry
    registry.register_model("GptOssForCausalLM", GPT_OSS)
