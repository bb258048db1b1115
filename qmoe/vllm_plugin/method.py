"""The quantization method that vLLM learns of: which layers of a qmoe folder run packed."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
    UnquantizedFusedMoEMethod,
)
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.platforms import current_platform

from qmoe.config import Scheme
from qmoe.errors import CheckpointError
from qmoe.format.compressed_tensors import Schemes
from qmoe.vllm_plugin.choose import METHOD, takes
from qmoe.vllm_plugin.experts import PackedExpertsMethod
from qmoe.vllm_plugin.linear import PackedLinearMethod


@register_quantization_config(METHOD)
class PackedConfig(QuantizationConfig):  # type: ignore[misc]
    """`quantization_config` of a folder that qmoe wrote. CheckpointError if qmoe cannot run it."""

    def __init__(self, entry: dict[str, Any]):
        super().__init__()
        self.entry = entry
        self.schemes = Schemes({"quantization_config": entry}, "config.json")

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """vLLM asks every registered method whether a folder is its own."""
        gpu = not current_platform.is_cpu()
        return METHOD if takes(hf_quant_cfg, user_quant, gpu) else None

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "PackedConfig":
        return cls(deepcopy(config))

    def get_name(self) -> str:
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Modules by vLLM's names from here on."""

        def renamed(targets: list[str]) -> list[str]:
            exact = [t for t in targets if "." in t and not t.startswith("re:")]
            names = {t: hf_to_vllm_mapper._map_name(t) for t in exact}
            return [name for t in targets if (name := names.get(t, t)) is not None]

        self.entry = _with_targets(self.entry, renamed)
        self.schemes = Schemes({"quantization_config": self.entry}, "config.json")

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        """How vLLM runs a layer: packed, as it is, or (None) as vLLM decides."""
        if isinstance(layer, LinearBase | ParallelLMHead):
            schemes = [self.schemes.of(name) for name in self._joined(prefix)]
            if any(schemes):
                return PackedLinearMethod(schemes)
            return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None
        if isinstance(layer, RoutedExperts):
            return self._experts(layer, prefix)
        return None

    def _joined(self, prefix: str) -> list[str]:
        """The checkpoint's modules that are in a linear."""
        owner, dot, name = prefix.rpartition(".")
        parts = self.packed_modules_mapping.get(name, [name])
        return [f"{owner}{dot}{part}" for part in parts]

    def _experts(self, layer: Any, prefix: str) -> Any:
        names = [layer.ckpt_gate_proj_name, layer.ckpt_up_proj_name, layer.ckpt_down_proj_name]
        kinds: dict[str, dict[Scheme | None, None]] = {
            name: dict.fromkeys(
                self.schemes.of(f"{prefix}.{e}.{name}") for e in range(layer.global_num_experts)
            )
            for name in names
            if name is not None
        }
        every = {scheme for found in kinds.values() for scheme in found}
        if every == {None}:
            return UnquantizedFusedMoEMethod(layer.moe_config)
        if None in every:
            raise CheckpointError(
                f"{prefix}: some of its experts are quantized and some are not; quantize the model "
                "again"
            )
        down: Any = kinds.pop(layer.ckpt_down_proj_name)
        first: Any = dict.fromkeys(scheme for found in kinds.values() for scheme in found)
        return PackedExpertsMethod(layer.moe_config, list(first), list(down))


def _with_targets(
    entry: dict[str, Any], renamed: Callable[[list[str]], list[str]]
) -> dict[str, Any]:
    """A copy of `quantization_config` with other names of modules."""
    made = deepcopy(entry)
    made["ignore"] = renamed(made.get("ignore") or [])
    for group in made["config_groups"].values():
        group["targets"] = renamed(group["targets"])
    transforms = (made.get("transform_config") or {}).get("config_groups", {})
    for transform in transforms.values():
        for apply in transform["apply"]:
            apply["targets"] = renamed(apply["targets"])
            apply["ignore"] = renamed(apply.get("ignore") or [])
    return made
