"""The entry point `vllm.general_plugins`, which vLLM calls in each of its processes."""

from importlib import import_module


def register() -> None:
    """Tell vLLM of qmoe's quantization method. Calling it again changes nothing."""
    import_module("qmoe.vllm_plugin.method")
